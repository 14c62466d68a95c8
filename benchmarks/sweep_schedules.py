"""Time schedules of the kernels of a scan, stage by stage, on the GPU at hand: values first, then times.

    python benchmarks/sweep_schedules.py OUT.json [case ...] [shape, as in B16T2048 ...] [forward] [backward]

Every launch of a call is timed under every schedule of its grid; what it passes on comes from the first of them.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from scans import SHAPES, Case, make_case
from tttc.codegen import stages as stage_pass
from tttc.codegen.loop import Loop
from tttc.codegen.render import render
from tttc.codegen.schedule import Schedule
from tttc.codegen.stages import stages
from tttc.codegen.torch_scan_backward import live_cotangents, saved_leaves

from tttc._scan_op import scan_info
from tttc.runtime import fused_scan, launch, triton_scan, triton_scan_backward

CASES = ("ttt_linear_b16", "ttt_mlp_chunk64", "ttt_mlp_b16")
WEIGHTS = {"A": (32, 0.25, 2), "B": (8, 0.1, 0.5)}  # of computing again, see tttc.codegen.stages
COUNTS = {"forward": (1, 2), "backward": (1, 2, 3)}


def grid(loop: Loop, name: str, direction: str) -> list[Schedule]:
    """The schedules tried for one kernel."""
    small = name == "ttt_linear_b16"
    choices: dict[str, list[Any]] = {
        "num_warps": [2, 4] if small else [8],
        "order": ["products_first", "graph"] if small else ["least_live"],
        "feature_major": [name == "ttt_mlp_chunk64"],
        "nan": ["branch", "product"]
        if direction == "forward" and not loop.parallel
        else ["ignored"],
        "group": [8] if small and loop.parallel else [1],
        "repeat_vectors": [False],
        "narrow": [True],
    }
    if loop.parallel:
        choices |= {"num_warps": [1, 2, 4] if small else [8], "order": ["products_first"]}
        if direction == "forward":
            choices["nan"] = ["branch"]
    if name == "ttt_mlp_b16":
        choices |= {"order": ["products_first"], "nan": ["branch"]}
    # Pipelined loads, loads a turn before, loads at the start and where they are needed.
    loads = [{"num_stages": 3}, {"num_stages": 1, "prefetch": True}]
    if not small:
        loads = [{"num_stages": 1, "late_loads": True}, {"num_stages": 1, "prefetch": True}]
    elif loop.parallel:
        loads += [{"num_stages": 1}, {"num_stages": 2, "late_loads": True}]
    if name == "ttt_mlp_b16":
        loads += [{"num_stages": 2, "late_loads": True}]
    return [
        Schedule(**dict(zip(choices, values, strict=True)), **load)
        for values in itertools.product(*choices.values())
        for load in loads
    ]


@dataclass
class Bench:
    """One case at one shape: its arguments, and a way to run either direction."""

    case: Case
    direction: str

    def __post_init__(self) -> None:
        self.call, self.program = self.case.flat(), self.case.program()
        self.info = scan_info(self.call.anchor, self.call.tokens, self.call.shared)
        self.leaves = fused_scan.floating_leaves(self.call.tokens, self.call.shared)
        self.part = "token" if self.program.sequential else "full"

    def loop(self) -> Loop:
        """The whole loop of the direction."""
        if self.direction == "forward":
            part = "tokens" if self.program.sequential else "full"
            return triton_scan._loop(self.program, part, False)
        live = live_cotangents(self.program, self.leaves, set())
        return triton_scan_backward.backward_loop_of(self.program, self.part, self.leaves, live)

    def choose(self, schedule: Schedule) -> None:
        """Run under a schedule from now on."""
        self.program.kernels.clear()
        forward = "tokens" if self.program.sequential else "full"
        part = forward if self.direction == "forward" else f"{self.part}_backward"
        self.program.schedules[part] = schedule

    def run(self, launcher: Any) -> Any:
        """One call, every launch through ``launcher``."""
        call, info = self.call, self.info
        if self.direction == "forward":
            return triton_scan.run_kernels(
                self.program, call.anchor, call.carry, call.tokens, call.shared, 0, info.output,
                states=False, launcher=launcher,
            )[2]  # fmt: skip
        live = saved_leaves(self.program, self.leaves)
        torch.manual_seed(0)
        saved = fused_scan._empty_saved(
            self.program, call.anchor, call.tokens, call.shared, 0, 1, info, "auto"
        )
        z = triton_scan.run_kernels(
            self.program, call.anchor, call.carry, call.tokens, call.shared, 0, info.output,
            states=False, save=dict(zip(live, saved, strict=True)),
        )[2]  # fmt: skip
        given = [torch.randn_like(x) for x in z]
        nothing = [None] * len(call.anchor)
        out = {
            n: torch.empty_like(call.tokens[int(n[6:])]) for n in self.leaves if n[0] == "t"
        }  # fmt: skip
        triton_scan_backward.run_backward_kernels(
            self.program, self.leaves, [x.float() for x in call.anchor], [], call.tokens, call.shared, 0,
            (nothing, nothing, given), live, saved, 1, out, info.output, launcher=launcher,
        )  # fmt: skip
        return list(out.values())


def gradient_errors(name: str, schedule: Schedule) -> list[float]:
    """Relative errors of the cotangents of tokens against float64 (the torch backend), at B1 T2048."""
    bench = Bench(make_case(name, 1, 2048), "backward")
    bench.choose(schedule)
    got = bench.run(launch.launch)
    call = bench.call
    torch.manual_seed(0)
    groups = [
        [x.double().requires_grad_() for x in g]
        for g in (call.anchor, [], call.tokens, call.shared)
    ]
    z = torch.ops.tttc.fused_scan(*groups, call.key, bench.case.mini_batch_size, 0, "torch", False, 1)  # fmt: skip
    given = [
        torch.randn_like(x.to(bench.info.output)).double() for x in z[: len(z)] if x.requires_grad
    ]
    exact = torch.autograd.grad(z[: len(given)], groups[2], given)
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(got, exact, strict=True)]


def variants(
    call: launch.Launch, parts: dict[str, Loop], name: str, direction: str, count: int
) -> Iterator[tuple[Schedule, launch.Launch]]:
    """A launch under every schedule of its grid."""
    loop = parts[call.kernel.name]
    mini_batches = -(-call.length // loop.mini_batch_size) if loop.tokens else call.length
    for schedule in grid(loop, name, direction):
        schedule = replace(schedule, stages=count)
        programs = -(-mini_batches // schedule.group) if loop.parallel else 1
        yield (
            schedule,
            replace(call, kernel=render(loop, schedule), grid=(call.grid[0], programs)),
        )


def sweep(
    name: str,
    batch: int,
    length: int,
    direction: str,
    count: int,
    weights: str,
    measure: bool,
    share: int = 0,
) -> list[dict[str, Any]]:
    """Rows of one case; without ``measure`` only every 14th variant from ``share`` is compiled, nothing timed."""
    stage_pass.FLOPS_PER_BYTE, stage_pass.SHUFFLES_PER_BYTE, stage_pass.ELEMENTS_PER_BYTE = WEIGHTS[
        weights
    ]
    bench = Bench(make_case(name, batch, length), direction)
    parts = {s.name: s for s in stages(bench.loop(), count)}
    first = grid(next(iter(parts.values())), name, direction)[0]
    bench.choose(replace(first, stages=count))
    rows: list[dict[str, Any]] = []
    number = itertools.count()

    def launcher(call: launch.Launch) -> None:
        if call.kernel.name not in parts:
            launch.launch(call)
            return
        for schedule, variant in variants(call, parts, name, direction, count):
            if not measure and next(number) % 14 != share:
                continue
            row = {"case": name, "B": batch, "T": length, "direction": direction, "stages": count,
                   "weights": weights, "kernel": call.kernel.name, "schedule": described(schedule)}  # fmt: skip
            start = time.time()
            try:
                launch.launch(variant)
                torch.cuda.synchronize()
                if measure:
                    row["us"] = 1e3 * triton.testing.do_bench(
                        lambda v=variant: launch.launch(v), warmup=4, rep=16, return_mode="median"
                    )
            except Exception as error:  # a variant that fails is a row of the table
                row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            row["compile_s"] = time.time() - start
            rows.append(row)
        if measure:
            launch.launch(call)

    bench.run(launcher)
    return rows


def described(schedule: Schedule) -> str:
    """What differs from the default."""
    plain = Schedule()
    return " ".join(f"{k}={v}" for k, v in schedule.choices().items() if v != getattr(plain, k))


def _compile(job: tuple[str, str, int, str, int]) -> list[dict[str, Any]]:
    name, direction, count, weights, share = job
    return sweep(name, 1, 512, direction, count, weights, False, share)


def main() -> None:
    out, *words = sys.argv[1:]
    shapes = [x for x in SHAPES if x.replace(" ", "") in words] or list(SHAPES)
    names = [x for x in words if x in CASES] or list(CASES)
    directions = [x for x in COUNTS if x in words] or list(COUNTS)
    weights = [x for x in WEIGHTS if x in words] or ["A"]
    plans = [(n, d, c, w) for n in names for d in directions for c in COUNTS[d] for w in weights
             if n == "ttt_linear_b16" or (d, c) != ("backward", 1)]  # fmt: skip
    jobs = [(*plan, share) for plan in plans for share in range(14)]
    start = time.time()
    with ProcessPoolExecutor(14, mp_context=multiprocessing.get_context("spawn")) as pool:
        compiled = [row for rows in pool.map(_compile, jobs) for row in rows]
    slowest = max(compiled, key=lambda r: r["compile_s"])
    print(
        f"{torch.cuda.get_device_name()}: {len(compiled)} variants in {time.time() - start:.0f} s; slowest {slowest}"
    )
    rows: list[dict[str, Any]] = []
    for name, direction, count, weight in plans:
        for shape in shapes:
            batch, length = SHAPES[shape]
            found = sweep(name, batch, length, direction, count, weight, True)
            rows += found
            total = 0.0
            for kernel in dict.fromkeys(r["kernel"] for r in found):
                its = sorted(
                    (r for r in found if r["kernel"] == kernel and "us" in r), key=lambda r: r["us"]
                )
                if not its:
                    print("   FAILED", kernel, found[-1].get("error"))
                    continue
                total += its[0]["us"]
                print(
                    f"   {kernel}: "
                    + "; ".join(f"{r['us']:.0f} [{r['schedule']}]" for r in its[:2])
                    + f"; worst {its[-1]['us']:.0f}"
                )
            print(f"{name} {direction} {count} stages {weight} {shape}: {total:.0f} us")
        with open(out, "w") as f:
            json.dump(rows, f, indent=1)


if __name__ == "__main__":
    main()
