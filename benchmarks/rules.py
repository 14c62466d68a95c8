"""The rules of examples/rules on a GPU: times beside what peers there are, and values against float64.

    python benchmarks/rules.py benchmarks/results/OUT.json [--budget 300] [--rules titans lact] [--parts times]

B8 H16 T4096 d64, bf16, inputs as projections leave them (``[B, T, H, d]``). Everything is compiled in processes beside
each other, which leave kernels in the caches on disk; what peers tune is shared out among several. As soon as all
contenders of a rule are compiled they are timed, everything else stopped meanwhile: DeltaNet and gated DeltaNet beside
flash-linear-attention 0.6; Titans beside the naive loop with its token's body under torch.compile and beside gradients
under vmap (peers/titans.py), both at a length they can take, the time scaled by the length; LaCT beside the chunk-wise
program of its authors under torch.compile (peers/lact.py). Errors of every rule (outputs and gradients, T4096) are
against the torch backend in float64, which the tests hold to the naive loop. The record is saved whenever something
comes in; what it has of rules or parts that are not asked for stays. ``--quick`` runs tiny sizes, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from jobs import Job, measuring, run_all
from rule_cases import SIZES
from rule_contenders import (
    DIRECTIONS,
    MAKERS,
    QUICK,
    Sizes,
    agreement,
    contenders,
    errors,
    kernels,
    scaled,
)
from timing import bandwidth, interleaved, record

SAMPLE = 2e-2  # seconds of calls in a row: steps of training follow each other as well
SHARES = {"fla": 4}  # processes that compile the schedules a peer tries


# -- in a job's process -------------------------------------------------------------------------------------


def warm(name: str, only: str, share: int, sizes: Sizes) -> dict[str, float]:
    """Seconds of the first call of one contender in each direction."""
    if only in SHARES:
        share_configurations(share, SHARES[only])
    found = contenders(name, sizes, only)
    seconds: dict[str, float] = {}
    for direction in DIRECTIONS[name] if found else ():
        start = time.perf_counter()
        getattr(found[only], direction)()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[direction] = round(time.perf_counter() - start, 1)
    return seconds


def share_configurations(share: int, shares: int) -> None:
    """Let Triton's autotuners, made from now on, try every ``shares``-th configuration only."""
    from triton.runtime.autotuner import Autotuner

    make = Autotuner.__init__

    def part(self: Any, fn: Any, names: Any, configs: list[Any], *rest: Any, **named: Any) -> None:
        make(self, fn, names, configs[share::shares] or configs[:1], *rest, **named)

    Autotuner.__init__ = part  # type: ignore[method-assign]


def timed(name: str, sizes: Sizes, result: Path) -> dict[str, Any]:
    """A rule's contenders timed in turn, by direction."""
    found = contenders(name, sizes)
    for x in found.values():
        for direction in DIRECTIONS[name] if not x.tunes else ():
            getattr(x, direction)()
    measuring(result)
    made: dict[str, Any] = {}
    for direction in DIRECTIONS[name]:
        differences = agreement(found, direction)
        runs = {n: getattr(x, direction) for n, x in found.items()}
        rows: dict[str, Any] = interleaved(runs, sizes.seconds, SAMPLE)
        for n, x in differences.items():
            rows[n]["differences_from_tttc"] = x
        scaled(rows, found, sizes)
        for n, run in runs.items():
            rows[n]["kernels"] = kernels(run)
        made[direction] = rows
    return made


def run_job(job: str, sizes: Sizes, result: Path) -> None:
    """What a process was started for."""
    kind, name, *rest = job.split(":")
    if kind == "warm":
        made: Any = warm(name, rest[0], int(rest[1]), sizes)
    else:
        made = timed(name, sizes, result) if kind == "times" else errors(name, sizes)
    result.write_text(json.dumps(made))


# -- the whole ------------------------------------------------------------------------------------------------


def all_jobs(rules: list[str], parts: list[str]) -> list[Job]:
    """In the order they should start."""
    warming, timing = [], []
    for name in (n for n in MAKERS if n in rules and "times" in parts):
        first = [
            Job(f"warm:{name}:{only}:{share}")
            for only in ("tttc", *MAKERS[name])
            for share in range(SHARES.get(only, 1))
        ]
        warming += first
        timing.append(Job(f"times:{name}", tuple(j.name for j in first)))
    checking = [Job(f"errors:{n}") for n in rules if "errors" in parts]
    return [*timing, *warming, *checking]


def shown(job: Job) -> str:
    """What came of a job, in a few words."""
    kind, name = job.name.split(":")[:2]
    if job.error:
        return f"{job.name} FAILED after {job.seconds} s: {job.error[-700:]}"
    if kind == "warm":
        return f"{job.name}: {job.seconds} s, of these first calls {job.made}"
    if kind == "errors":
        short = {k: f"{x:.1e}" if isinstance(x, float) else x for k, x in job.made.items()}
        return f"{name}: {short} ({job.seconds} s)"
    lines = []
    for direction, rows in job.made.items():
        times = ", ".join(
            f"{n} {r['us']:.0f} us ({r['us'] / rows['tttc']['us']:.2f})" for n, r in rows.items()
        )
        lines.append(f"{name} {direction}: {times}")
        for n, row in rows.items():
            if "differences_from_tttc" in row:
                lines.append(f"  {n} differs by {max(row['differences_from_tttc']):.1e}")
            lines += [f"    {us:8.1f} {kernel}" for kernel, us in list(row["kernels"].items())[:10]]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, record."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("out", type=Path)
    p.add_argument("--budget", type=float, default=420, help="seconds for all of it")
    p.add_argument("--rules", nargs="+", default=list(SIZES), choices=list(SIZES))
    p.add_argument("--parts", nargs="+", default=["times", "errors"], choices=["times", "errors"])
    p.add_argument("--quick", action="store_true")
    p.add_argument("--job", help=argparse.SUPPRESS)
    p.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    given = p.parse_args()
    start = time.monotonic()
    sizes = QUICK if given.quick else Sizes()
    if given.job:
        run_job(given.job, sizes, given.result)
        return
    made: dict[str, Any] = record()
    made |= {"shape": sizes.shape, "chunk of lact": sizes.chunk}
    made |= {"errors": {}, "times": {}, "compiled": {}}
    if given.out.exists():
        before = json.loads(given.out.read_text())
        made |= {part: before[part] for part in ("errors", "times", "compiled")}
    numbers = sizes.batch * sizes.length * sizes.heads * sizes.d
    made["floor_us"] = 4 * 2 * numbers / bandwidth() * 1e6

    def done(job: Job) -> None:
        kind, name = job.name.split(":")[:2]
        if kind == "warm":
            first = {"first_calls": job.made} if job.made else {"error": job.error}
            made["compiled"][job.name.removeprefix("warm:")] = {"seconds": job.seconds, **first}
        else:
            made[kind][name] = {"error": job.error} if job.error else job.made
        given.out.write_text(json.dumps(made, indent=1) + "\n")
        print(f"{time.monotonic() - start:4.0f} s  {shown(job)}", flush=True)

    rest = ["--quick"] if given.quick else []
    run_all(all_jobs(given.rules, given.parts), __file__, rest, start + given.budget, done)
    print(
        f"{sizes.shape}, floor {made['floor_us']:.0f} us; {time.monotonic() - start:.0f} s in all"
    )


if __name__ == "__main__":
    main()
