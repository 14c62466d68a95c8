"""Thousands of random programs, compiled and compared with the naive ones: what a run found, as JSON.

    python benchmarks/random_programs.py --count 5000 --out benchmarks/results/2026-11-25-random-programs.json

One line for every program goes to ``runs/`` as soon as it is known; a run that was killed goes on from there. With
``--program '{"layers": ...}'`` (as a failure prints it) one program is shown and checked.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("TRITON_INTERPRET", "1")  # a few programs run as kernels, without a GPU

import hypothesis  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from generator.check import TOLERANCES, check  # noqa: E402
from generator.description import Program  # noqa: E402
from generator.strategies import loops, scans  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402

# What a batch of programs is drawn from, in turn: mostly scans without what surrounds them, which are cheap.
KINDS = {
    "scans": scans(),
    "single precision": scans(dtypes=("float32", "bfloat16")),
    "larger model": scans("dynamo", largest=4, small=True),
    "loops": loops(),
    "kernels": scans("triton", ("float32",), largest=4, small=True),
}
TURNS = ("scans",) * 12 + ("single precision", "larger model", "loops", "kernels")
BATCH = {"scans": 25, "single precision": 25, "larger model": 8, "loops": 8, "kernels": 8}


def commit() -> str:
    """What of the repository is checked out, "" where git does not say."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


COMMIT = commit()


def drawn(kind: str, number: int) -> list[Program]:
    """The programs of a batch: the same for the same seed and version of hypothesis."""
    found: list[Program] = []

    @seed(number)
    @settings(
        max_examples=BATCH[kind], deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(KINDS[kind])
    def draw(program: Program) -> None:
        found.append(program)

    draw()
    return found


def line_of(program: Program, kind: str, number: int) -> dict[str, object]:
    """Check one program; what is recorded of it."""
    outcome = check(program)
    line = {
        "digest": program.digest, "kind": kind, "seed": number, "status": outcome.status, "form": outcome.form,
        "reason": outcome.reason, "errors": outcome.errors, "seconds": round(outcome.seconds, 3),
        "features": program.features(), "commit": COMMIT,
    }  # fmt: skip
    if outcome.status != "same":
        line["program"] = program.to_json()
    return line


def summary(lines: list[dict], seeds: int) -> dict[str, object]:
    """Counts, the worst error of each kind, and every program that was not compiled and the same."""
    worst: dict[str, dict[str, float]] = {}
    for x in lines:
        if x["status"] == "same":
            mine = worst.setdefault(x["kind"], {})
            for name, error in x["errors"].items():
                mine[name] = max(error, mine.get(name, 0.0))
    reasons = Counter(
        " ".join(x["reason"].split("random_program_")[-1].split()[1:])[:200] if x["status"] == "eager" else x["reason"]
        for x in lines if x["reason"] and x["status"] != "crash"
    )  # fmt: skip
    compared = [x for x in lines if x["status"] == "same"]
    return {
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
            "hypothesis": hypothesis.__version__, "machine": platform.machine(),
        },
        "commits": dict(Counter(x["commit"] for x in lines)),
        "seeds": f"0 to {seeds - 1}, one a batch",
        "tolerances": TOLERANCES,
        "programs": len(lines),
        "status": dict(Counter(x["status"] for x in lines)),
        "kinds": dict(Counter(x["kind"] for x in lines)),
        "forms": dict(Counter(x["form"] for x in compared)),
        "reasons": dict(reasons.most_common()),
        "features": dict(sorted(Counter(f for x in compared for f in x["features"]).items())),
        "worst_error": worst,
        "cpu_seconds": round(sum(x["seconds"] for x in lines)),
        "failures": [
            {k: x[k] for k in ("status", "digest", "seed", "kind", "reason", "errors", "program")}
            for x in lines if x["status"] in ("different", "crash")
        ],
    }  # fmt: skip


def read(path: Path) -> list[dict]:
    """The lines of earlier runs; one that was cut off is dropped."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def write(path: Path, content: dict) -> None:
    """All of it or none."""
    other = path.with_suffix(".tmp")
    other.write_text(json.dumps(content, indent=1, sort_keys=False) + "\n")
    other.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=5000, help="distinct programs")
    parser.add_argument("--out", type=Path, help="the summary, JSON")
    parser.add_argument("--program", help="check this one, given as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.program:
        outcome = check(Program.from_json(json.loads(options.program)))
        print(outcome.source)
        print(outcome.status, outcome.form, outcome.reason, outcome.errors)
        sys.exit(outcome.failed)
    if options.out is None:
        parser.error("--out: expected a file for the summary")
    record = ROOT / "runs" / f"{options.out.stem}.jsonl"
    record.parent.mkdir(exist_ok=True)
    lines = read(record)
    known = {x["digest"] for x in lines}
    number = 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress, record.open("a") as file:
        task = progress.add_task("random programs", total=options.count, completed=len(lines))
        while len(lines) < options.count:
            kind = TURNS[number % len(TURNS)]
            for program in drawn(kind, number):
                if program.digest in known or len(lines) >= options.count:
                    continue
                known.add(program.digest)
                lines.append(line_of(program, kind, number))
                file.write(json.dumps(lines[-1]) + "\n")
                file.flush()
                failed = sum(x["status"] in ("different", "crash") for x in lines)
                progress.update(task, completed=len(lines), description=f"{failed} failed")
            number += 1
            if number % 4 == 0:
                write(options.out, summary(lines, number))
    write(options.out, summary(lines, number))
    print(
        json.dumps(
            {
                k: v
                for k, v in summary(lines, number).items()
                if k in ("programs", "status", "forms")
            }
        )
    )
    sys.exit(any(x["status"] in ("different", "crash") for x in lines))


if __name__ == "__main__":
    main()
