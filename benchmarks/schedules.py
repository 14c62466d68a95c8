"""How good the picked schedules are: on many shapes, exhaustive timing beside what rules and search pick.

    python benchmarks/schedules.py benchmarks/results/OUT.json --seconds 200 [--only ttt_linear_b16] [--candidates 16]

For every shape and direction the kernels of each way to split the loop are timed under the best ``--candidates``
schedules by the cost model (0 for all there are), and under some that differ from the fastest in one choice, on inputs as
projections leave them. Against the fastest of them stand the schedule that rules give without measuring, the one the cost
model ranks first, and the one a search of ordinary size finds: all by the same measurements. While one shape is timed the
kernels of the next are compiled; shapes of one rule, width and mini-batch size share them.

Every row is saved when it is there, and shapes that OUT.json has already are skipped: a run that ended with its time, or
with an error of the GPU (exit code 1), goes on when it is started again. Where time runs short, fewer schedules are timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from pool import Pool
from rule_cases import any_case
from tttc.codegen.candidates import shortlist
from tttc.codegen.kernel import write_atomically
from tttc.codegen.loop import Loop
from tttc.codegen.schedule import Schedule

import tttc.runtime.fused_scan_backward
from tttc.ir.errors import NotLowerable
from tttc.runtime import triton_scan
from tttc.runtime.launch import Launch
from tttc.tuning import choose, search
from tttc.tuning.compiling import Compiler, target_of, workers
from tttc.tuning.plan import Plan, Setting, by_rules

AT_ONCE = 4  # shapes: one is timed, the kernels of the others are compiled
SURE = 6  # rows after which is known how long one takes
WIDTH = 2048  # of a layer: heads times head dimension
# Rule and mini-batch size, head dimension, then B and T.
SHAPES: list[tuple[str, int, int, int]] = [
    *(("ttt_linear_b16", 64, b, t) for b, t in ((1, 256), (1, 2048), (1, 32768), (1, 131072), (4, 2048), (8, 8192), (16, 256), (16, 2048), (64, 256), (64, 2048))),
    *(("ttt_linear_b64", 64, b, t) for b, t in ((1, 2048), (1, 32768), (8, 8192), (16, 2048), (64, 1024))),
    *(("ttt_linear_b16", 128, b, t) for b, t in ((1, 2048), (1, 32768), (8, 8192), (16, 2048))),
    *(("ttt_linear_b16", 32, b, t) for b, t in ((1, 2048), (1, 32768), (16, 2048), (64, 512))),
    *(("ttt_linear_b32", 64, b, t) for b, t in ((1, 4096), (4, 16384), (16, 2048))),
    *(("ttt_linear_b128", 64, b, t) for b, t in ((1, 8192), (2, 65536), (16, 2048))),
    *(("ttt_linear_b64", 128, b, t) for b, t in ((1, 8192), (16, 2048))),
    *(("ttt_linear_b64", 32, b, t) for b, t in ((1, 8192), (16, 2048))),
    *(("ttt_mlp_b16", 64, b, t) for b, t in ((1, 2048), (8, 2048), (16, 2048))),
    *(("ttt_mlp_chunk64", 64, b, t) for b, t in ((1, 2048), (16, 2048))),
    *((rule, 64, b, t) for rule in ("delta_net", "gated_delta_net") for b, t in ((1, 8192), (4, 4096), (16, 2048))),
]  # fmt: skip
ALL = 1 << 30
Shape = tuple[str, int, int, int]


class _Asked(Exception):
    """Raised in the place of a search, with what it was asked for."""


Searched = tuple[Loop, search.Call, Setting]


def asked(shape: Shape, direction: str, device: str = "cuda") -> Searched:
    """The search that a call of a shape asks for: its loop, arguments and size class; no sequence is in segments."""

    def instead(
        loop: Loop, call: search.Call, setting: Setting, its: bool, *means: Any
    ) -> search.Found | None:
        if its == (direction == "backward"):
            raise _Asked(loop, call, setting)
        return None

    with mock.patch.object(triton_scan, "by_segments", lambda *_: None):
        try:
            _call(shape, direction, device, instead)
        except _Asked as found:
            loop, arguments, setting = found.args
            return loop, arguments, setting
    raise RuntimeError("nothing was searched for")


def asked_in_segments(shape: Shape, device: str = "cuda") -> list[Searched]:
    """The searches of a forward whose sequences are in segments: states first, then segments; empty where they are not."""
    found: list[Searched] = []

    def instead(
        loop: Loop, call: search.Call, setting: Setting, its: bool, *means: Any
    ) -> search.Found | None:
        found.append((loop, call, setting))
        return None

    with mock.patch.object(triton_scan, "run_staged", lambda *_: {}):  # nothing needs to run
        _call(shape, "forward", device, instead)
    for _, call, _ in found[1:]:  # states that no kernel has made
        for name, x in call.tensors.items():
            if name.startswith("anchor_"):
                x.zero_()
    return found if len(found) > 1 else []


def _call(shape: Shape, direction: str, device: str, instead: Callable[..., Any]) -> None:
    """A call of a shape that asks ``instead`` of a search for its schedules."""
    name, d, batch, length = shape
    case = any_case(name, batch, length, WIDTH // d, d, device=device)
    call, program = case.flat(), case.program()
    for table in (
        program.calls,
        program.plans,
        program.searched,
        program.kernels,
        program.schedules,
    ):
        table.clear()
    backward = direction == "backward"
    groups = [
        [x.detach().requires_grad_(backward and x.is_floating_point()) for x in g]
        for g in (call.anchor, [], call.tokens, call.shared)
    ]
    # What is remembered must not stand in for what is measured.
    with mock.patch.multiple(choose, search=instead, recall=lambda *_: None):
        interval = 0
        if backward:
            interval = tttc.runtime.fused_scan.saving_interval(*groups, call.key, case.mini_batch_size, "triton")  # fmt: skip
        z = torch.ops.tttc.fused_scan(*groups, call.key, case.mini_batch_size, 0, "triton", False, interval, "", True)[0]  # fmt: skip
        if backward:
            z.backward(torch.randn_like(z))


def study(
    loop: Loop,
    call: search.Call,
    setting: Setting,
    backward: bool,
    candidates: int,
    timer: search.Timer,
    compiler: Compiler | None,
    end: float,
) -> dict[str, Any]:
    """Time schedules until ``end``, and say what the fastest and the picked ones take."""
    splits = search._splits(loop, call, setting, backward, float("inf"))
    first = [{k.loop.name: shortlist(k.ranked, candidates) for k in x.kernels} for x in splits]
    search._try(splits, first, call, timer, compiler, end)
    usual = _usual(splits)
    best, picked = (min(x, key=search._Split.seconds) for x in (splits, usual))
    if best.seconds() == float("inf"):
        raise TimeoutError("no schedule could be timed")
    more = {x.stages: {k.loop.name: list[Schedule]() for k in x.kernels} for x in splits}
    for split in (best, picked):
        for k in split.kernels:
            more[split.stages][k.loop.name] += search._changed(k)
    for split in splits:
        for k in split.kernels:
            wanted = more[split.stages][k.loop.name]
            new = [s for s in dict.fromkeys(wanted) if s not in k.times and s not in k.refused]
            more[split.stages][k.loop.name] = new
    again = [x for x in splits if any(more[x.stages].values())]
    search._try(again, [more[x.stages] for x in again], call, timer, compiler, end)
    rules = by_rules(loop, setting, backward)
    model = Plan(tuple((k.loop.name, _first(k)) for k in min(splits, key=_estimate).kernels))
    for plan in (rules, model):  # whatever they spill
        _time_also(splits, plan, call, timer, end)
    times = {(k.loop.name, s): t for x in splits for k in x.kernels for s, t in k.times.items()}
    searched = [(k.loop.name, _found(k, times)) for k in picked.kernels if k.times]
    whole = len(searched) == len(picked.kernels)  # else a search leaves it to the rules
    plans = {"searched": Plan(tuple(searched)) if whole else rules, "rules": rules, "model": model}
    best = min(splits, key=search._Split.seconds)
    row: dict[str, Any] = {
        "best": {
            "us": 1e6 * best.seconds(),
            "plan": words(Plan(tuple((k.loop.name, k.fastest()) for k in best.kernels))),
        }
    }
    for name, plan in plans.items():
        known = all(key in times for key in plan.schedules)
        us = 1e6 * sum(times[key] for key in plan.schedules) if known else None
        ratio = None if us is None else us / row["best"]["us"]
        row[name] = {"us": us, "of best": ratio, "plan": words(plan)}
    return row | {"timed": len(times), "times": _table(times)}


def joined(row: dict[str, Any], parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of a scan in segments: of the whole sequences, and of what makes and handles segments one after another."""
    found = dict(row)
    names = ("states", "segments", "rest")
    for name in ("best", "searched", "rules", "model"):
        times = [part[name]["us"] for part in parts]
        plan = {
            f"{of} {kernel}": its
            for of, part in zip(names, parts, strict=False)
            for kernel, its in part[name]["plan"].items()
        }
        found[name] = {"us": None if None in times else sum(times), "plan": plan}
    found["rules"]["plan"] = row["rules"]["plan"]  # which says that there are segments
    found["best"] = min(found["best"], row["best"], key=lambda x: x["us"])
    for name in ("searched", "rules", "model"):
        us = found[name]["us"]
        found[name]["of best"] = None if us is None else us / found["best"]["us"]
    found["timed"] += sum(part["timed"] for part in parts)
    for of, part in zip(names, parts, strict=False):
        found["times"] = found["times"] | {f"{of} {k}": x for k, x in part["times"].items()}
    return found


def _table(times: dict[tuple[str, Schedule], float]) -> dict[str, dict[str, float]]:
    """Microseconds by kernel and schedule: ``held.py`` looks what rules give later up in it."""
    table: dict[str, dict[str, float]] = {}
    for (name, schedule), seconds in times.items():
        table.setdefault(name, {})[differing(schedule)] = round(1e6 * seconds, 2)
    return table


def _found(kernel: search._Kernel, times: dict[tuple[str, Schedule], float]) -> Schedule:
    """The fastest after the second round of a search, which follows from the first."""
    name = kernel.loop.name
    tried = [*kernel.times, *(s for s in search._changed(kernel) if (name, s) in times)]
    return min(tried, key=lambda s: times[name, s])


def _usual(splits: list[search._Split]) -> list[search._Split]:
    """What the first round of a search of ordinary size would have timed."""
    least = min(map(_estimate, splits))
    found = []
    for split in splits:
        if split is not splits[0] and _estimate(split) > search.WORSE * least:
            continue
        kernels = []
        for k in split.kernels:
            tried = shortlist(k.ranked, search.TRIED)
            times = {s: k.times[s] for s in tried if s in k.times}
            kernels.append(replace(k, times=times, refused=k.refused & set(tried)))
        found.append(replace(split, kernels=kernels))
    return found


def _estimate(split: search._Split) -> float:
    """The cost model's seconds of a split under the schedules that rules give its kernels."""
    return sum(k.model.estimate(k.ranked[0]).seconds for k in split.kernels)


def _first(kernel: search._Kernel) -> Schedule:
    """The schedule that the cost model ranks first; what rules give stands before all."""
    return min(kernel.ranked[:2], key=lambda s: kernel.model.estimate(s).seconds)


def _time_also(
    splits: list[search._Split], plan: Plan, call: search.Call, timer: search.Timer, end: float
) -> None:
    """Time the kernels of a plan that were not."""
    names = [name for name, _ in plan.schedules]
    split = next(x for x in splits if [k.loop.name for k in x.kernels] == names)
    timed = {k.loop.name: k.times for k in split.kernels}
    missing = {name: [] if s in timed[name] else [s] for name, s in plan.schedules}
    if any(missing.values()):
        with suppress(NotLowerable):
            search._measure(split, missing, call, timer, end, lambda what: None)


def differing(schedule: Schedule) -> str:
    """What differs from the plain schedule."""
    plain = Schedule().choices()
    return " ".join(f"{k}={v}" for k, v in schedule.choices().items() if v != plain[k])


def words(plan: Plan) -> dict[str, str]:
    """What differs from the plain schedule, by kernel."""
    return {name: differing(s) for name, s in plan.schedules}


def quick(call: Launch) -> float:
    """The median of repeated launches."""
    return search.time_on_device(call, warmup=2, repeats=10)


class Run:
    """All rows of a run, and the file they are kept in."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.end = options, time.monotonic() + options.seconds
        self.turn = threading.Lock()
        self.pool = Pool(target_of(torch.device("cuda")), workers(), self.turn)
        self.document = self._begun()
        self.broken = False
        rows = self.document["rows"]
        failed = {(r["shape"], r["direction"]) for r in rows if {"error", "partial"} & set(r)}
        done = {(r["shape"], r["direction"]) for r in rows} - failed
        both = ("forward", "backward")
        directions = both if options.direction == "both" else (options.direction,)
        named = {"{}_d{}_B{}_T{}".format(*s): s for s in SHAPES}
        wanted = [(n, s, d) for d in directions for n, s in named.items() if n.startswith(options.only)]  # fmt: skip
        wanted = [x for x in wanted if (x[0], x[2]) not in done]
        wanted.sort(key=lambda x: (x[0], x[2]) in failed)
        self.wanted = wanted
        self.began, self.ended = 0.0, 0

    def _begun(self) -> dict[str, Any]:
        """What the file has, or a record without rows."""
        device = torch.cuda.get_device_name()
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        if self.options.out.exists():
            before: dict[str, Any] = json.loads(self.options.out.read_text())
            if (before["device"], before["versions"]) != (device, versions):
                raise SystemExit(
                    f"{self.options.out} is of {before['device']}, {before['versions']}"
                )
            return before
        command = f"python benchmarks/schedules.py benchmarks/results/{self.options.out.name}"
        return {"command": command, "date": str(datetime.date.today()), "device": device, "versions": versions, "rows": []}  # fmt: skip

    def candidates(self) -> int:
        """As many as were asked for, or fewer where the rows that are left would not be done in time."""
        asked = self.options.candidates or ALL
        if self.ended < SURE:
            return asked
        each = max(time.monotonic() - self.began, 1.0) / self.ended
        share = (self.end - time.monotonic()) / (each * (len(self.wanted) - self.ended))
        return max(min(asked, search.TRIED), min(asked, int(asked * share)))

    def row(self, place: int) -> None:
        """Measure one of what is wanted, and save it."""
        name, shape, direction = self.wanted[place]
        with self.turn:
            if self.broken or self.end - time.monotonic() < 10:
                return
            start = time.monotonic()
            self.began = self.began or start
            row: dict[str, Any] = {"shape": name, "direction": direction, "candidates": self.candidates()}  # fmt: skip
            try:
                rest = (direction == "backward", row["candidates"], quick, self.pool.compiler(place), self.end)  # fmt: skip
                row |= study(*asked(shape, direction), *rest)
                if direction == "forward" and (parts := asked_in_segments(shape)):
                    row = joined(row, [study(*x, *rest) for x in parts])
                if time.monotonic() > self.end:
                    row["partial"] = True
                ratios = [f"{k} {row[k]['of best'] or 0:.2f}" for k in ("searched", "rules", "model")]  # fmt: skip
                said = f"best {row['best']['us']:.0f} us of {row['timed']}; {', '.join(ratios)}"
            except Exception as error:  # a shape that fails is a row of the table
                said = row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                self.broken = not usable()
            row["seconds"] = time.monotonic() - start
            print(f"{name} {direction}: {said} ({row['seconds']:.0f} s, {self.end - time.monotonic():.0f} left)", flush=True)  # fmt: skip
            self.ended += 1
            rows = self.document["rows"]
            others = [r for r in rows if (r["shape"], r["direction"]) != (name, direction)]
            self.document["rows"] = [*others, row]
            write_atomically(self.options.out, json.dumps(self.document, indent=1))
            if not self.broken:
                torch.cuda.empty_cache()


def usable() -> bool:
    """Whether the GPU takes more work from this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "out", type=Path, help="JSON file; what is in it already is not measured again"
    )
    parser.add_argument(
        "--seconds", type=float, default=200, help="end after so long (default 200)"
    )
    parser.add_argument("--candidates", type=int, default=16, help="schedules of a kernel; 0: all")
    parser.add_argument(
        "--only", default="", help="shapes whose name starts so: ttt_linear_b16_d64"
    )
    parser.add_argument("--direction", choices=("forward", "backward", "both"), default="both")
    run = Run(parser.parse_args())
    with ThreadPoolExecutor(AT_ONCE) as threads:
        list(threads.map(run.row, range(len(run.wanted))))
    print(f"{run.options.out} has {len(run.document['rows'])} rows")
    return int(run.broken)


if __name__ == "__main__":
    sys.exit(main())
