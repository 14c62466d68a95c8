"""Time schedules of the kernels of a scan, stage by stage, on the GPU at hand: values first, then times.

    python benchmarks/sweep_schedules.py OUT.json [case ...] [shape, as in B16T2048 ...] [forward] [backward]

Every launch of a call is timed under the best candidates by the cost model; what it passes on comes from the default.
Beside schedules it sweeps what computing again is worth where a loop is split; benchmarks/schedules.py compares what is
picked with what is best.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from scans import SHAPES, Case, make_case
from tttc.codegen import stages as stage_pass
from tttc.codegen.candidates import candidates, shortlist
from tttc.codegen.cost_model import CostModel
from tttc.codegen.crowding import crowding
from tttc.codegen.devices import device_of
from tttc.codegen.loop import Loop
from tttc.codegen.schedule import Schedule
from tttc.codegen.stages import stages
from tttc.codegen.torch_scan_backward import live_cotangents, saved_leaves

from tttc._scan_op import scan_info
from tttc.runtime import forward_kernels, fused_scan, launch, triton_scan, triton_scan_backward
from tttc.tuning.compiling import compiler_for
from tttc.tuning.search import time_on_device, variants

CASES = ("ttt_linear_b16", "ttt_mlp_chunk64", "ttt_mlp_b16")
WEIGHTS = {"A": (32, 0.25, 2), "B": (8, 0.1, 0.5)}  # of computing again, see tttc.codegen.stages
TRIED = 24  # schedules of each kernel
COUNTS = {"forward": (1, 2), "backward": (1, 2, 3)}


def grid(loop: Loop, sizes: tuple[int, int, int], direction: str, count: int) -> list[Schedule]:
    """The schedules tried for one kernel, the default first."""
    device = torch.device("cuda")
    mini_batches = -(-sizes[2] // loop.mini_batch_size) if loop.tokens else sizes[2]
    crowd = crowding(sizes[0] * sizes[1], mini_batches, device)
    found = [replace(s, stages=count) for s in candidates(loop, crowd, direction == "backward")]
    ranked = CostModel(loop, sizes, device_of(device), 2).rank(found)
    return list(dict.fromkeys([found[0], *shortlist((s for s, _ in ranked), TRIED)]))


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
            return forward_kernels.forward_loop(self.program, part, False)
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


def sweep(
    name: str, batch: int, length: int, direction: str, count: int, weights: str
) -> list[dict[str, Any]]:
    """Rows of one case."""
    stage_pass.FLOPS_PER_BYTE, stage_pass.SHUFFLES_PER_BYTE, stage_pass.ELEMENTS_PER_BYTE = WEIGHTS[
        weights
    ]
    bench = Bench(make_case(name, batch, length), direction)
    parts = {s.name: s for s in stages(bench.loop(), count)}
    sizes = bench.call.tokens[0].shape[:3]
    first = grid(next(iter(parts.values())), sizes, direction, count)[0]
    bench.choose(replace(first, stages=count))
    rows: list[dict[str, Any]] = []

    def launcher(call: launch.Launch) -> None:
        if call.kernel.name not in parts:
            launch.launch(call)
            return
        loop = parts[call.kernel.name]
        tried = variants(call, loop, grid(loop, sizes, direction, count))
        requests = [x.request(fast=True) for x in tried.values()]
        compiler_for(torch.device("cuda"))(requests, 600, lambda i: None)
        for schedule, variant in tried.items():
            row = {"case": name, "B": batch, "T": length, "direction": direction, "stages": count,
                   "weights": weights, "kernel": call.kernel.name, "schedule": described(schedule)}  # fmt: skip
            try:
                launch.launch(variant)
                torch.cuda.synchronize()
                row["us"] = 1e6 * time_on_device(variant)
            except Exception as error:  # a variant that fails is a row of the table
                row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            rows.append(row)
        launch.launch(call)

    bench.run(launcher)
    return rows


def described(schedule: Schedule) -> str:
    """What differs from the default."""
    plain = Schedule()
    return " ".join(f"{k}={v}" for k, v in schedule.choices().items() if v != getattr(plain, k))


def main() -> None:
    out, *words = sys.argv[1:]
    shapes = [x for x in SHAPES if x.replace(" ", "") in words] or list(SHAPES)
    names = [x for x in words if x in CASES] or list(CASES)
    directions = [x for x in COUNTS if x in words] or list(COUNTS)
    weights = [x for x in WEIGHTS if x in words] or ["A"]
    plans = [(n, d, c, w) for n in names for d in directions for c in COUNTS[d] for w in weights
             if n == "ttt_linear_b16" or (d, c) != ("backward", 1)]  # fmt: skip
    rows: list[dict[str, Any]] = []
    for name, direction, count, weight in plans:
        for shape in shapes:
            batch, length = SHAPES[shape]
            found = sweep(name, batch, length, direction, count, weight)
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
