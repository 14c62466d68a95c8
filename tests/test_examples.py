"""The examples as scripts: each says how long it takes to compile, cold and warm, and how far it is from its own loop."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RULES = sorted(p for p in (ROOT / "examples" / "rules").glob("*.py") if p.name != "_run.py")
LOOPS = sorted(p for p in (ROOT / "examples" / "loops").glob("*.py") if p.name != "_run.py")
COLD = 60  # seconds from nothing, forward and backward


@pytest.mark.parametrize("path", [*RULES, *LOOPS], ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_example_runs_as_a_script(path):
    last = ast.parse(path.read_text()).body[-1]
    assert isinstance(last, ast.If) and "__main__" in ast.unparse(last.test)
    assert ast.unparse(last.body[-1]).startswith("run(")


@pytest.mark.parametrize(
    "command",
    [
        [str(ROOT / "examples" / "rules" / "linear_attention.py")],
        [str(ROOT / "examples" / "rules" / "ttt_mlp_chunk.py")],
        ["-m", "examples.loops.delta_memory"],
        ["-m", "examples.loops.ttt_linear"],
    ],
    ids=lambda c: c[-1].split("/")[-1],
)
def test_compile_times_are_printed(command):
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        cwd=ROOT,
    )
    lines = done.stdout.splitlines()
    said = [x.split(":")[0] for x in lines]
    seconds = [float(x.split(": ")[-1].removesuffix(" s")) for x in lines[:2]]
    assert said[0] == "first forward and backward, from nothing" and seconds[0] < COLD
    assert said[1].startswith("again") and seconds[1] < seconds[0]
    errors = [float(x.split(": ")[-1].split()[0]) for x in lines[2:]]
    assert errors and max(errors) < 1e-8
