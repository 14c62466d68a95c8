"""How good the picked schedules are: on many shapes, exhaustive timing beside what rules and search pick.

    python benchmarks/schedules.py benchmarks/results/OUT.json --seconds 200 [--only ttt_linear_b16] [--candidates 16]

For every shape and direction the kernels of each way to split the loop are timed under the best ``--candidates``
schedules by the cost model (0 for all there are), on inputs as projections leave them. Against the fastest of them stand
the schedule that rules give without measuring, the one the cost model ranks first, and the one a search of ordinary size
finds. Shapes that OUT.json has already are skipped, so that a run that ended with its time goes on; kernels are compiled
in parallel processes first, and those of one rule, width and mini-batch size are shared by its shapes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from scans import make_case
from tttc.codegen.heuristics import default_schedule
from tttc.codegen.kernel import write_atomically
from tttc.codegen.loop import Loop
from tttc.codegen.schedule import Schedule
from tttc.codegen.stages import stages

import tttc.runtime.fused_scan_backward
from tttc.runtime.launch import Launch
from tttc.tuning import choose, search
from tttc.tuning.plan import Plan, Setting

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
]  # fmt: skip
ALL = 1 << 30


class Study:
    """Stands in the place of the search of a call: times everything, and keeps what came of it."""

    def __init__(self, candidates: int, seconds: float) -> None:
        self.candidates, self.end = candidates or ALL, time.monotonic() + seconds
        self.wanted = ""
        self.found: dict[str, Any] | None = None

    def __call__(
        self,
        loop: Loop,
        call: search.Call,
        setting: Setting,
        backward: bool,
        timer: Any,
        compiler: Any,
    ) -> search.Found | None:
        if self.wanted != ("backward" if backward else "forward"):
            return None
        start = time.monotonic()
        self.found = None
        made = search.search(
            loop, call, setting, backward, quick, compiler, self.end - time.monotonic(),
            tried=self.candidates, worse=float("inf"),
        )  # fmt: skip
        if made is None:
            return None
        times = dict(made.times)

        def looked_up(x: Launch) -> float:
            key = (x.kernel.name, x.kernel.config["schedule"])
            if key not in times:
                times[key] = quick(x)
            return times[key]

        searched = search.search(loop, call, setting, backward, looked_up, None, 60.0)
        assert searched is not None
        best = min(made, searched, key=lambda f: f.seconds)
        rules = _by_rules(loop, setting, backward)
        first = search._splits(loop, call, setting, backward, 1.0)
        model = {k.loop.name: k.ranked[0] for k in min(first, key=_estimate).kernels}
        picked = {
            "searched": {"us": 1e6 * searched.seconds, "plan": _words(searched.plan)},
            "rules": {"us": _seconds(times, rules), "plan": _words(rules)},
            "model": {"us": _seconds(times, Plan(tuple(model.items())))},
        }
        for x in picked.values():
            x["of best"] = None if x["us"] is None else x["us"] / (1e6 * best.seconds)
        self.found = {
            "best": {"us": 1e6 * best.seconds, "plan": _words(best.plan)},
            **picked,
            "timed": len(times),
            "seconds": time.monotonic() - start,
        }
        return best


def _estimate(split: Any) -> float:
    """The cost model's seconds of the best schedules of a split."""
    return sum(k.model.estimate(k.ranked[0]).seconds for k in split.kernels)


def _by_rules(loop: Loop, setting: Setting, backward: bool) -> Plan:
    whole = default_schedule(loop, setting.crowd, backward)
    common = {"stages": whole.stages, "narrow": whole.narrow}
    parts = stages(loop, whole.stages)
    return Plan(
        tuple(
            (p.name, replace(default_schedule(p, setting.crowd, backward), **common)) for p in parts
        )
    )


def _seconds(times: dict[tuple[str, Schedule], float], plan: Plan) -> float | None:
    """Microseconds of a plan, where all its kernels were timed."""
    if any(key not in times for key in plan.schedules):
        return None
    return 1e6 * sum(times[key] for key in plan.schedules)


def _words(plan: Plan) -> dict[str, str]:
    """What differs from the plain schedule, by kernel."""
    plain = Schedule().choices()
    return {
        name: " ".join(f"{k}={v}" for k, v in s.choices().items() if v != plain[k])
        for name, s in plan.schedules
    }


def quick(call: Launch) -> float:
    """The median of repeated launches."""
    run = lambda: search.launch(call)  # noqa: E731
    return 1e-3 * triton.testing.do_bench(run, warmup=2, rep=10, return_mode="median")


def measured(study: Study, shape: tuple[str, int, int, int], direction: str) -> dict[str, Any]:
    """The row of one shape and direction."""
    name, d, batch, length = shape
    case = make_case(name, batch, length, WIDTH // d, d)
    call, program = case.flat(), case.program()
    for table in (program.plans, program.searched, program.kernels, program.schedules):
        table.clear()
    study.wanted, study.found = direction, None
    backward = direction == "backward"
    groups = [
        [x.detach().requires_grad_(backward and x.is_floating_point()) for x in g]
        for g in (call.anchor, [], call.tokens, call.shared)
    ]
    interval = 0
    if backward:
        interval = tttc.runtime.fused_scan.saving_interval(*groups, call.key, case.mini_batch_size, "triton")  # fmt: skip
    z = torch.ops.tttc.fused_scan(*groups, call.key, case.mini_batch_size, 0, "triton", False, interval, "", True)[0]  # fmt: skip
    if backward:
        z.backward(torch.randn_like(z))
    torch.cuda.synchronize()
    if study.found is None:
        raise RuntimeError("nothing was timed")
    return study.found


def main() -> None:
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
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    document: dict[str, Any] = {"command": "python benchmarks/schedules.py", "date": str(datetime.date.today()), "device": torch.cuda.get_device_name(), "versions": versions, "rows": []}  # fmt: skip
    if options.out.exists():
        before = json.loads(options.out.read_text())
        if (before["device"], before["versions"]) != (document["device"], versions):
            raise SystemExit(f"{options.out} is of {before['device']}, {before['versions']}")
        document = before
    done = {
        (r["shape"], r["direction"]) for r in document["rows"] if not {"error", "partial"} & set(r)
    }
    study = Study(options.candidates, options.seconds)
    choose.search = study  # type: ignore[assignment]
    directions = ("forward", "backward") if options.direction == "both" else (options.direction,)
    # What is remembered must not stand in for what is measured.
    with tempfile.TemporaryDirectory() as folder:
        tttc.tuning.remembered.cache_dir = lambda: Path(folder)  # type: ignore[assignment]
        for direction in directions:
            for shape in SHAPES:
                name = "{}_d{}_B{}_T{}".format(*shape)
                if (name, direction) in done or not name.startswith(options.only):
                    continue
                left = end - time.monotonic()
                if left < 15:
                    print(f"time is over; {options.out} has {len(document['rows'])} rows")
                    return
                row: dict[str, Any] = {"shape": name, "direction": direction, "candidates": options.candidates}  # fmt: skip
                try:
                    row |= measured(study, shape, direction)
                    if time.monotonic() > study.end:
                        row["partial"] = True
                    print(
                        f"{name} {direction}: best {row['best']['us']:.0f} us of {row['timed']}; "
                        + ", ".join(
                            f"{k} {row[k]['of best']:.2f}"
                            for k in ("searched", "rules", "model")
                            if row[k]["of best"]
                        )
                        + f" ({row['seconds']:.0f} s)",
                        flush=True,
                    )
                except Exception as error:  # a shape that fails is a row of the table
                    row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                    print(f"{name} {direction}: {row['error']}", flush=True)
                torch.cuda.empty_cache()
                document["rows"] = [
                    r for r in document["rows"] if (r["shape"], r["direction"]) != (name, direction)
                ] + [row]
                write_atomically(options.out, json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
