"""The command line: what it prints, its exit codes, a line instead of a stack trace for every mistake."""

from __future__ import annotations

import json
import os
import re
import sys
import time

import pytest
import torch
from tttc.codegen.kernel import Kernel, cache_dir, write_atomically

from tttc import cli
from tttc.commands import cache, doctor
from tttc.commands.model import make_input
from tttc.models import TTTConfig, TTTLanguageModel
from tttc.warm.store import path_of

MODULE = """
import tttc, torch

def build():
    return tttc.nn.TTTLinear(16, 2, mini_batch_size=4)

def broken():
    return torch.nn.Linear(3, 3)

def step(anchor, W, token, shared):
    loss = lambda w: 0.5 * (torch.tanh(token @ w) - token).square().sum()
    return W - 0.1 * torch.func.grad(loss)(anchor), token @ W

def rule():
    return lambda x: tttc.scan(step, torch.zeros(2, x.shape[-1], x.shape[-1]), x, 4)[1]

def closes_over():
    factor = torch.tensor(2.0)
    def step(anchor, W, token, shared):
        return W + token * factor, W
    return lambda x: tttc.scan(step, torch.zeros(2, 16), x)[1]

number = 3

def needs(size):
    return None

def nothing_returned():
    pass
"""


def run(text: str) -> int:
    """The exit code of a command line."""
    return cli.main(text.split())


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "mymodel.py").write_text(MODULE)
    (tmp_path / "syntax.py").write_text("x = 1\ny = = 2\n")
    (tmp_path / "needy.py").write_text("import a_module_nobody_has\n")
    (tmp_path / "raises.py").write_text("x = 1\nraise RuntimeError('not today')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    # Inductor takes long to compile and has tests of its own.
    monkeypatch.setattr("tttc.report.measurement.has_compiler", lambda: False)
    yield tmp_path
    for name in ("mymodel", "syntax", "needy", "raises"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    """What ``tttc explain --html --json`` leaves: exit code, standard output, errors, the file."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    folder = tmp_path_factory.mktemp("explain")
    (folder / "explained_model.py").write_text(MODULE)
    out, err = StringIO(), StringIO()
    before = os.getcwd()
    os.chdir(folder)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = run(
                "explain explained_model:build --input 1x6x16 --backend torch --target sm_90 "
                "--html report.html --json"
            )
    finally:
        os.chdir(before)
        sys.path.remove(str(folder))
    return code, out.getvalue(), err.getvalue(), folder / "report.html"


# -- explain ------------------------------------------------------------------------------------------------


def test_explain_prints_a_report(module, capsys):
    command = "explain mymodel:build --input 1x6x16 --backend torch --target sm_80"
    assert run(command) == 0
    shown = capsys.readouterr()
    assert "dualise" in shown.out and not shown.err  # no progress where there is no terminal
    assert "simplify_backward" in shown.out
    assert run(f"{command} --no-backward") == 0
    assert "simplify_backward" not in capsys.readouterr().out


def test_explain_writes_html_and_json(explained):
    code, out, err, path = explained
    assert code == 0
    found = json.loads(out)
    assert "dualise" in json.dumps(found)
    assert path.read_text().lstrip().lower().startswith("<!doctype html")
    assert "wrote report.html" in err


def test_strict_fails_where_a_scan_runs_as_the_naive_loop(module, capsys):
    with pytest.warns(UserWarning):
        assert run("explain mymodel:closes_over --input 1x2x3x16 --backend torch --strict") == 1
    assert "closes over" in capsys.readouterr().err


# -- bench --------------------------------------------------------------------------------------------------


def test_bench_saves_and_prints_json(module, capsys):
    command = "bench mymodel:build --input 1x6x16 --repeats 2"
    assert run(f"{command} --save r.json") == 0
    assert "times eager" in capsys.readouterr().out
    rows = json.loads((module / "r.json").read_text())["rows"]
    assert [r["name"] for r in rows] == ["eager", "torch.compile", "tttc", "attention"]
    assert run(f"{command} --only tttc --json") == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["name"] == "tttc" and row["error"] < 1e-5


def test_bench_sweeps_over_letters_and_mini_batches(module, capsys):
    pytest.importorskip("matplotlib")
    command = "bench mymodel:rule --input Bx2xTx8 --only tttc --repeats 1 --plot s.png --json"
    with pytest.warns(UserWarning, match="approximates"):
        assert run(f"{command} --sweep T=8 --sweep B=2 --sweep mini-batch-size=4,8") == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [p["sizes"] for p in points] == [{"T": 8, "B": 2, "mini_batch_size": b} for b in (4, 8)]
    assert [p["tokens"] for p in points] == [16, 16]
    # Mini-batches of four are what the model says, of eight they approximate it.
    exact, approximate = (p["result"]["rows"][0]["error"] for p in points)
    assert exact < 1e-5 < approximate
    assert (module / "s.png").read_bytes().startswith(b"\x89PNG")


# -- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("explain mymodel --input 2x3", "expected package.module:name"),
        ("explain mymodel.py:build --input 2x3", "the name of a module, 'mymodel', got a path"),
        ("explain nowhere:build --input 2x3", "there is no module 'nowhere'"),
        ("explain syntax:build --input 2x3", "syntax.py:2"),
        ("explain needy:build --input 2x3", "needs 'a_module_nobody_has', which is not installed"),
        ("explain raises:build --input 2x3", "RuntimeError: not today ("),
        ("explain mymodel:buld --input 2x3", "has no 'buld'; did you mean 'build'?"),
        ("explain mymodel:number --input 2x3", "is a int"),
        ("explain mymodel:needs --input 2x3", "can't be called without arguments"),
        ("explain mymodel:nothing_returned --input 2x3", "returned a NoneType"),
        ("explain mymodel:build --input 2y3", "expected a shape like 4x2048"),
        ("explain mymodel:build --input 2xT", "T has no value"),
        ("explain mymodel:build --input 2x3:floats", "expected ids=N or one of"),
        ("explain mymodel:build --input 2x3:int64", "integers need a bound"),
        ("explain mymodel:build --input 2x3 --dtype int64", "expected a floating dtype"),
        ("explain mymodel:build --input 2x3 --device nowhere", "--device"),
        (
            "explain mymodel:build --input 2x3x16 --target h100",
            "--target: expected a name like sm_90",
        ),
        ("bench mymodel:build --input 2x3 --sweep T=3", "a letter in the shape"),
        ("bench mymodel:build --input 2xT --sweep T=a", "expected NAME=256,512,1024"),
        ("bench mymodel:build --input 2x3 --plot a.png", "expected a --sweep"),
        ("bench mymodel:build --input 2x3 --only jax", "expected some of eager"),
    ],
)
def test_mistakes_get_a_line_and_exit_code_2(module, capsys, arguments, message):
    assert run(arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "required: command"),
        ("explain mymodel:build", "required: --input"),
        ("explain mymodel:build --input 2x3 --backend jax", "invalid choice: 'jax'"),
        ("bench mymodel:build --input 2x3 --repeats 0", "a whole number of at least 1, got '0'"),
        ("bench mymodel:build --input 2x3 --budget -1", "a number above 0, got '-1'"),
        ("cache burn", "invalid choice: 'burn'"),
    ],
)
def test_what_argparse_refuses_is_exit_code_2_too(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_a_mistake(module, capsys):
    assert (
        run("bench mymodel:rule --input 1x2x4x8 --only tttc --repeats 1 --save no/where.json") == 2
    )
    assert "no/where.json: can't be written" in capsys.readouterr().err


def test_a_failing_model_gets_a_line_and_debug_a_trace(module, capsys):
    arguments = ["explain", "mymodel:broken", "--input", "2x4"]
    assert cli.main(arguments) == 1
    shown = capsys.readouterr().err
    assert "--debug shows where" in shown and "Traceback" not in shown
    assert cli.main([*arguments, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_shape_the_model_cannot_take_is_said_in_one_line(module, capsys):
    assert run("explain mymodel:build --input 2x4x15 --backend torch") == 1
    shown = capsys.readouterr().err
    # What the model raises, not what TorchDynamo makes of it.
    assert shown.splitlines()[0].startswith("tttc: ") and len(shown.splitlines()) == 2
    assert "15" in shown and "Dynamo" not in shown and "File" not in shown


def test_help_has_examples_and_exit_codes(capsys):
    for command in ("explain", "bench", "demo", "doctor", "cache"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        assert f"  tttc {command}" in shown and "exit codes:" in shown and "--json" in shown


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert re.fullmatch(r"tttc \d+\.\d+.*\n", capsys.readouterr().out)


# -- inputs -------------------------------------------------------------------------------------------------


def test_plain_shapes_are_ids_for_a_model_with_an_embedding():
    config = TTTConfig(vocab_size=7, hidden_size=8, intermediate_size=16, num_layers=1, num_heads=2)
    model, cpu = TTTLanguageModel(config), torch.device("cpu")
    ids = make_input("2x50", model, cpu, None)
    assert ids.shape == (2, 50) and ids.dtype == torch.int64
    assert set(ids.unique().tolist()) <= set(range(7))
    assert make_input("2x5:ids=3", None, cpu, None).max() < 3
    assert make_input("2x5x8:bf16", model, cpu, None).dtype == torch.bfloat16
    assert make_input("2x5x8", model, cpu, torch.float64).dtype == torch.float64
    assert make_input("BxTx8", None, cpu, None, {"B": 3, "T": 4}).shape == (3, 4, 8)


# -- doctor -------------------------------------------------------------------------------------------------


def test_doctor_finds_this_place_well(capsys):
    assert run("doctor --json") == 0
    found = json.loads(capsys.readouterr().out)
    by_name = {f["name"]: f for f in found["findings"]}
    for name in ("python", "torch", "triton", "cpu", "cache", "torch operations"):
        assert by_name[name]["state"] == "ok", by_name[name]
    assert "tttc.compile works" in found["verdict"][0]


def test_doctor_says_how_to_mend(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(doctor, "NEEDED", ("torch", "a-package-nobody-has"))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert run("doctor --no-trial") == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "pip install a-package-nobody-has" in shown
    assert "TTTC_CACHE_DIR=" in shown and "apt install" in shown
    assert "To mend first: a-package-nobody-has, cache" in shown


def test_doctor_reports_a_compiler_that_fails(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("nothing compiles today")

    monkeypatch.setattr("tttc.compile", fails)
    found = doctor._guarded("torch operations", doctor._try_torch)
    assert found.state == "bad" and "nothing compiles today" in found.found


# -- cache --------------------------------------------------------------------------------------------------


def test_cache_shows_and_clears_what_is_ours_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    kernels = [Kernel(f"made_up_{i}", f"x = {i}\n") for i in range(3)]
    for kernel in kernels:
        kernel.module()
    foreign = cache_dir() / "kernels" / "notes.txt"
    foreign.write_text("mine")
    old = time.time() - 40 * 86400
    os.utime(kernels[0].path, (old, old))
    assert run("cache --entries") == 0
    shown = capsys.readouterr().out
    assert "3 entries" in shown and kernels[1].path.name in shown and "40 d" in shown
    assert run("cache clear --older-than 30 --json") == 0
    assert json.loads(capsys.readouterr().out)["deleted"] == 1
    assert not kernels[0].path.exists() and kernels[1].path.exists()
    assert run("cache clear") == 0
    assert "deleted 2 entries" in capsys.readouterr().out
    assert cache.contents()["bytes"] == 0
    assert foreign.read_text() == "mine"


def test_cache_of_schedules(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    Kernel("made_up", "x = 1\n").module()
    found = {"key": {"device": {"name": "H200"}, "dtype": "bfloat16"}, "seconds": 3.46e-4, "plan": [{}]}  # fmt: skip
    for i, text in enumerate((json.dumps(found), "damaged")):
        write_atomically(tmp_path / "schedules" / f"scan_full_{i:016x}.json", text)
    assert run("cache --kind schedules --entries") == 0
    shown = capsys.readouterr().out
    assert "2 entries" in shown and "346 us on H200" in " ".join(shown.split())
    assert run("cache clear --kind schedules") == 0
    assert "deleted 2 entries" in capsys.readouterr().out
    assert [e["kind"] for e in cache.contents()["entries"]] == ["kernels"]


def test_cache_of_programs(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    write_atomically(path_of("forward", 64 * "a"), b"a program")
    assert run("cache --kind programs --json") == 0
    (entry,) = json.loads(capsys.readouterr().out)["entries"]
    assert entry["kind"] == "programs" and entry["size"] == 9
    assert run("cache clear --kind programs") == 0
    assert not cache.contents()["entries"] and not (tmp_path / "programs").exists()


def test_cache_of_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path / "not there"))
    assert run("cache show --json") == 0
    assert json.loads(capsys.readouterr().out)["entries"] == []
