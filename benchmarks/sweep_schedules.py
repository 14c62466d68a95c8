"""Time every schedule of a list for some scans on the GPU at hand: values first, then times.

python benchmarks/sweep_schedules.py OUT.json [case ...] [shape, as in B16T2048 ...]
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import torch
import triton
from scans import SHAPES, make_case
from tttc.codegen.schedule import Schedule
from tttc.codegen.torch_scan import run_program

from tttc._scan_op import scan_info
from tttc.runtime import triton_scan

GRIDS = {
    "ttt_linear_b16": {
        "num_warps": [2, 4], "order": ["graph", "products_first"], "late_loads": [False, True],
        "repeat_vectors": [False, True], "nan": ["product", "branch"],
    },
    "ttt_linear_b16 split": {
        "num_warps": [2, 4], "order": ["graph", "products_first"], "split": [True],
    },
    "ttt_mlp_b16": {
        "num_warps": [8], "num_stages": [2, 3], "order": ["least_live"], "late_loads": [True],
        "repeat_vectors": [False, True], "nan": ["product", "branch"],
    },
    "ttt_mlp_chunk64": {
        "feature_major": [True], "num_warps": [8], "num_stages": [1],
        "order": ["least_live", "products_first"], "late_loads": [True],
    },
}  # fmt: skip


def schedules(case: str) -> list[Schedule]:
    """The schedules tried for a case."""
    grids = [g for name, g in GRIDS.items() if name.split()[0] == case]
    return [
        Schedule(**dict(zip(g, values, strict=True)))
        for g in grids
        for values in itertools.product(*g.values())
    ]


def described(schedule: Schedule) -> str:
    """What differs from the default."""
    plain = Schedule()
    return " ".join(f"{k}={v}" for k, v in schedule.__dict__.items() if v != getattr(plain, k))


def runner(name: str, batch: int, length: int, schedule: Schedule):
    """A function that runs a case under a schedule."""
    case = make_case(name, batch, length)
    call, program = case.flat(), case.program()
    info = scan_info(call.anchor, call.tokens, call.shared)
    program.schedules["tokens" if program.sequential else "full"] = schedule

    def run():
        program.schedules["tokens" if program.sequential else "full"] = schedule
        return triton_scan.run_kernels(
            program, call.anchor, call.carry, call.tokens, call.shared, 0, info.output, states=False
        )[2]

    return run, case, call, program


def compile_one(job: tuple[str, Schedule]) -> tuple[str, Schedule, float, str]:
    """Compile a variant into Triton's cache, from a process of its own."""
    name, schedule = job
    start = time.time()
    try:
        run, *_ = runner(name, 1, 256, schedule)
        run()
        torch.cuda.synchronize()
        return name, schedule, time.time() - start, ""
    except Exception as error:  # a variant that fails is a row of the table
        return name, schedule, time.time() - start, f"{type(error).__name__}: {str(error)[:200]}"


def main() -> None:
    out, *names = sys.argv[1:]
    shapes = [x for x in SHAPES if x.replace(" ", "") in names] or list(SHAPES)
    names = [x for x in names if x.startswith("ttt")] or list(
        dict.fromkeys(x.split()[0] for x in GRIDS)
    )
    jobs = [(n, s) for n in names for s in schedules(n)]
    with ProcessPoolExecutor(14, mp_context=multiprocessing.get_context("spawn")) as pool:
        compiled = list(pool.map(compile_one, jobs))
    failed = {(n, s): e for n, s, _, e in compiled if e}
    slowest = max(compiled, key=lambda c: c[2])
    print(
        f"{len(jobs)} variants, {len(failed)} failed, slowest to compile {slowest[2]:.0f} s: {slowest[:2]}"
    )
    for key, error in list(failed.items())[:6]:
        print("FAILED", key, error)
    rows = []
    for name in names:
        run, _, call, program = runner(name, 1, 2048, Schedule())
        double = [
            [x.double() for x in group]
            for group in (call.anchor, call.carry, call.tokens, call.shared)
        ]
        exact = run_program(program, *double, 0)[2][0]
        for shape, (batch, length) in SHAPES.items():
            if shape not in shapes:
                continue
            for schedule in schedules(name):
                if (name, schedule) in failed:
                    continue
                row = {"case": name, "shape": shape, "schedule": described(schedule)}
                if shape == "B16 T2048":
                    z = runner(name, 1, 2048, schedule)[0]()[0].double()
                    row["error"] = float((z - exact).norm() / exact.norm())
                run, *_ = runner(name, batch, length, schedule)
                run()
                row["us"] = 1e3 * triton.testing.do_bench(
                    run, warmup=10, rep=40, return_mode="median"
                )
                rows.append(row)
            best = sorted(
                (r for r in rows if r["case"] == name and r["shape"] == shape),
                key=lambda r: r["us"],
            )
            print(name, shape)
            for r in best[:6] + best[-1:]:
                print(f"   {r['us']:9.1f} us  {r['schedule']}  error={r.get('error', -1):.1e}")
        with open(out, "w") as f:
            json.dump(rows, f, indent=1)


if __name__ == "__main__":
    main()
