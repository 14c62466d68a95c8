"""The schedules that rules give now, held against what a record has timed: without a GPU.

    python benchmarks/held.py benchmarks/results/2026-11-28-h200-picked.json

The record is one of ``schedules.py``. A plan whose kernels were not timed under these schedules is said to be so.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch
from rule_cases import any_case
from schedules import WIDTH, words
from tttc.codegen.loop import Loop

from tttc.runtime import forward_kernels
from tttc.tuning.plan import Plan, by_rules, setting_of

Row = dict[str, Any]


@functools.cache
def forward(name: str, d: int) -> tuple[Loop, int]:
    """The loop of a forward without states, as a model calls it, and the tokens of one of its turns."""
    tokens = 256
    case = any_case(name, 1, tokens, 2, d, device="cpu")
    program = case.program()
    turns = case.flat().tokens[0].shape[2] // program.unit
    part = "tokens" if program.sequential else "full"
    return forward_kernels.forward_loop(program, part, False), tokens // turns


def rules_now(shape: str) -> Plan:
    """The plan that rules give a shape of a record, on the device whose figures stand for an absent one: an H200."""
    name, *sizes = shape.rsplit("_", 3)
    d, batch, length = (int(x[1:]) for x in sizes)
    loop, tokens = forward(name, d)
    setting = setting_of(
        batch * WIDTH // d, -(-length // tokens), torch.bfloat16, torch.device("cpu"), gluon=True
    )
    return by_rules(loop, setting)


def microseconds(row: Row, plan: Plan) -> float | None:
    """What the kernels of a plan took together; None where not all were timed."""
    given = words(plan)
    if row["rules"]["plan"] == given:  # the same plan in segments, where it was so
        return row["rules"]["us"]
    times = [row.get("times", {}).get(name, {}).get(its) for name, its in given.items()]
    if None not in times:
        return sum(times)
    kept = (row[k] for k in ("best", "searched", "model"))
    return next((x["us"] for x in kept if x["plan"] == given), None)


def ratios(record: dict[str, Any]) -> dict[str, float | None]:
    """How many times as long as the fastest the rules' plan took, by shape of a forward; None where it was not timed."""
    found = {}
    for row in record["rows"]:
        if row["direction"] == "forward" and not {"error", "partial"} & set(row):
            us = microseconds(row, rules_now(row["shape"]))
            found[row["shape"]] = None if us is None else us / row["best"]["us"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    for shape, ratio in ratios(json.loads(parser.parse_args().record.read_text())).items():
        print(f"{shape:34s} {'not timed' if ratio is None else format(ratio, '.2f')}")


if __name__ == "__main__":
    main()
