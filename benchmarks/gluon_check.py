"""Values and times of Gluon kernels beside those of plain Triton, on a Hopper GPU.

    python benchmarks/gluon_check.py CASE SHAPE [SHAPE ...] [-- SCHEDULE ...]
    python benchmarks/gluon_check.py backward CASE SHAPE [SHAPE ...] [-- SCHEDULE ...]

``CASE`` and ``SHAPE`` as in scans.py; a ``SCHEDULE`` is what to change in the schedule chosen, as in
``order="least_live",num_warps=8``. Errors are against torch operations in float64.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
from scans import SHAPES, Case, make_case
from sweep_schedules import Bench
from tttc.codegen import heuristics
from tttc.codegen.crowding import Crowd
from tttc.codegen.torch_scan import run_program

from tttc._scan_op import scan_info
from tttc.ir.program import Program
from tttc.runtime import forward_kernels, launch, triton_scan

SIZES = {k.replace(" ", ""): v for k, v in SHAPES.items()}


def run(case: Case, program: Program) -> torch.Tensor:
    """The outputs of a scan, by kernels."""
    call = case.flat()
    info = scan_info(call.anchor, call.tokens, call.shared)
    return triton_scan.run_kernels(
        program, call.anchor, call.carry, call.tokens, call.shared, 0, info.output, states=False
    )[2][0]


def exact(case: Case, program: Program) -> torch.Tensor:
    """The outputs in float64, by torch operations."""
    call = case.flat()
    groups = [[x.double() for x in g] for g in (call.anchor, call.tokens, call.shared)]
    anchor, tokens, shared = groups
    return run_program(program, anchor, anchor, tokens, shared, 0)[2][0]


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of norms."""
    return float((got.double() - wanted).norm() / wanted.norm())


def backward(name: str, shapes: list[str], changes: list[dict[str, Any]]) -> None:
    """Times of the kernels of forward and backward as they are chosen, with and without Gluon; errors of gradients."""
    reading, writing = heuristics.READING, heuristics.WRITING
    for shape in shapes:
        batch, length = SIZES[shape]
        for change in (None, *changes):
            gluon = change is not None
            triton_scan.hopper = lambda device, gluon=gluon: gluon
            heuristics.READING = tuple(way | (change or {}) for way in reading)
            heuristics.WRITING = tuple(way | (change or {}) for way in writing)
            label = "plain" if change is None else f"gluon {change or ''}"
            bench = Bench(make_case(name, batch, length), "backward")
            times: dict[str, float] = {}

            def timed(call: launch.Launch, times: dict[str, float] = times) -> None:
                launch.launch(call)
                ms = triton.testing.do_bench(
                    lambda: launch.launch(call), warmup=4, rep=16, return_mode="median"
                )
                kind = call.kernel.config["schedule"].renderer
                times[f"{call.kernel.name} ({kind})"] = 1e3 * ms

            try:
                got = bench.run(launch.launch)
                ms = triton.testing.do_bench(lambda: bench.run(launch.launch), return_mode="median")  # noqa: B023
                bench.run(timed)
            except Exception as problem:
                print(
                    f"{shape} gluon={gluon}: {type(problem).__name__}: {str(problem)[:300]}",
                    flush=True,
                )
                continue
            errors: list[float] = []
            if batch * length <= 4096:
                errors = gradient_errors(bench, got)
            print(f"{shape} {label}: forward and backward {ms * 1e3:.0f} us; "
                  + ", ".join(f"{k} {v:.0f}" for k, v in times.items())
                  + "; errors " + ", ".join(f"{x:.2e}" for x in errors), flush=True)  # fmt: skip


def gradient_errors(bench: Bench, got: list[torch.Tensor]) -> list[float]:
    """Of the cotangents of tokens against float64, by torch operations."""
    call = bench.call
    groups = [
        [x.double().requires_grad_() for x in g]
        for g in (call.anchor, [], call.tokens, call.shared)
    ]
    z = torch.ops.tttc.fused_scan(
        *groups, call.key, bench.case.mini_batch_size, 0, "torch", False, 1
    )
    torch.manual_seed(0)
    given = [torch.randn_like(x.to(bench.info.output)).double() for x in z if x.requires_grad]
    wanted = torch.autograd.grad([x for x in z if x.requires_grad], groups[2], given)
    return [error(x, y) for x, y in zip(got, wanted, strict=True)]


def main() -> None:
    """Check, then time."""
    print(torch.cuda.get_device_name(), triton.__version__)
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    changes: list[dict[str, Any]] = [eval(f"dict({x})") for x in sys.argv[cut + 1 :]] or [{}]
    if sys.argv[1] == "backward":
        backward(sys.argv[2], sys.argv[3:cut], changes)
        return
    name, *shapes = sys.argv[1:cut]
    for shape in shapes:
        batch, length = SIZES[shape]
        case = make_case(name, batch, length)
        program = case.program()
        part = "tokens" if program.sequential else "full"
        loop = forward_kernels.forward_loop(program, part, False)
        plain, gluon = (
            # Without what runs instead: a kernel that does not fit is to say so.
            replace(heuristics.default_schedule(loop, Crowd.TWO, gluon=x), instead=None)
            for x in (False, True)
        )
        wanted = exact(case, program) if batch * length <= 4096 else None
        for change in ({"plain": True}, *changes):
            label = ", ".join(f"{k}={v}" for k, v in change.items())
            schedule = plain if "plain" in change else replace(gluon, **change)
            program.schedules[part] = schedule
            program.kernels.clear()
            start = time.time()
            try:
                got = run(case, program)
                torch.cuda.synchronize()
            except Exception as problem:
                print(
                    f"{shape} {label}: {type(problem).__name__}: {str(problem)[:300]}", flush=True
                )
                continue
            took = time.time() - start
            off = error(got, wanted) if wanted is not None else float("nan")
            again = bool((run(case, program) == got).all())
            ms = triton.testing.do_bench(partial(run, case, program), return_mode="median")
            print(f"{shape} {label}: {ms * 1e3:.0f} us, error {off:.2e}, same again {again}, first {took:.1f} s",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
