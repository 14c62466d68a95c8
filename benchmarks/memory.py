"""Peak memory of a scan's forward and backward on a GPU against the length of the sequence: a straight line.

    python benchmarks/memory.py benchmarks/results/OUT.json [--lengths 2048 4096 ...]

One sequence, 32 heads of 64, bf16; gradients of all tokens, of the initial state and of the parameters. Beside
OUT.json a plot is written where matplotlib is installed (the extra "plot"). The ratio is the peak over the
bytes of q, k, v, the output and the gradients of these four.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from scans import Case, make_case
from torch.utils import _pytree as pytree

import tttc

CASES = ("ttt_linear_b16", "ttt_mlp_b16")
LENGTHS = [2**n for n in range(11, 18)]  # 2k to 128k
HEADS, D = 32, 64
PACKAGES = ("tttc", "torch", "triton")


def compiled_scan(case: Case) -> Any:
    """The outputs of a case's scan, compiled, as a function of (init, tokens, shared)."""
    step, b = case.step, case.mini_batch_size

    def run(init: Any, tokens: Any, shared: Any) -> torch.Tensor:
        return tttc.scan(step, init, tokens, b, shared=shared)[1]

    return tttc.compile(run, strict=True)


def train(run: Any, case: Case) -> None:
    """Forward and backward, as a training step has them: everything that is left behind is freed."""
    leaves, spec = pytree.tree_flatten((case.init, case.tokens, case.shared))
    leaves = [x.detach().requires_grad_() for x in leaves]
    z = run(*pytree.tree_unflatten(leaves, spec))
    torch.autograd.grad(z, leaves, torch.ones_like(z))


def counted_bytes(case: Case) -> int:
    """Of q, k, v, the output and the gradients of these four."""
    return 2 * 4 * case.tokens[0].numel() * case.tokens[0].element_size()


def peak(run: Any, name: str, length: int) -> dict[str, Any]:
    """What a training step of one sequence of this length takes at most, its arguments included."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    case = make_case(name, 1, length, HEADS, D)
    case.raw.clear()
    torch.cuda.reset_peak_memory_stats()
    train(run, case)
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() - before
    counted = counted_bytes(case)
    return {"length": length, "peak_bytes": most, "counted_bytes": counted, "ratio": most / counted}


def line(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The line of least squares of relative errors through the peaks, and the largest deviation from it."""
    x = torch.tensor([r["length"] for r in rows], dtype=torch.float64)
    y = torch.tensor([r["peak_bytes"] for r in rows], dtype=torch.float64)
    columns = torch.stack([x / y, 1 / y], 1)
    slope, base = torch.linalg.lstsq(columns, torch.ones(len(rows), 1).double()).solution.flatten()
    off = ((slope * x + base) / y - 1).abs().max()
    return {
        "bytes_per_token": float(slope),
        "bytes_at_no_tokens": float(base),
        "largest_relative_deviation": float(off),
    }


def rows_of(name: str, lengths: list[int]) -> list[dict[str, Any]]:
    """The peaks of a case, up to the length that no longer fits the GPU."""
    warm = make_case(name, 1, 256, HEADS, D)
    run = compiled_scan(warm)
    train(run, warm)  # compiles
    del warm
    rows: list[dict[str, Any]] = []
    for length in lengths:
        try:
            rows.append(peak(run, name, length))
        except torch.OutOfMemoryError as error:
            print(f"  {name} T{length}: {error}")
            break
        last = rows[-1]
        print(f"  {name} T{length}: {last['peak_bytes'] / 2**20:,.0f} MiB, {last['ratio']:.2f} times q, k, v, output and gradients")  # fmt: skip
    return rows


def plot(path: Path, cases: dict[str, Any], device: str) -> None:
    """Peaks and their lines, and the ratios."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for colour, (name, case) in zip(("#1f4e9c", "#c2571a"), cases.items(), strict=False):
        x = [r["length"] for r in case["rows"]]
        fit = case["line"]
        left.plot(x, [r["peak_bytes"] / 2**30 for r in case["rows"]], "o", color=colour, label=name)
        fitted = [(fit["bytes_per_token"] * t + fit["bytes_at_no_tokens"]) / 2**30 for t in x]
        left.plot(x, fitted, color=colour, linewidth=1)
        right.semilogx(
            x, [r["ratio"] for r in case["rows"]], "o-", color=colour, label=name, base=2
        )
    left.set(xlabel="tokens", ylabel="GiB", title=f"Peak memory of forward and backward, {device}")
    right.set(xlabel="tokens", ylabel="times q, k, v, output and their gradients", ylim=(0, None))
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, record."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("out", type=Path)
    p.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    p.add_argument("--cases", nargs="+", default=CASES)
    given = p.parse_args()
    record: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": {n: metadata.version(n) for n in PACKAGES},
        "shape": f"B1 H{HEADS} d{D} bf16",
        "cases": {},
    }
    for name in given.cases:
        rows = rows_of(name, given.lengths)
        if not rows:
            continue
        record["cases"][name] = {"rows": rows, "line": line(rows)}
        fit = record["cases"][name]["line"]
        print(f"{name}: {fit['bytes_per_token']:,.0f} bytes a token, within {fit['largest_relative_deviation']:.1%} of a straight line")  # fmt: skip
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    try:
        plot(given.out.with_suffix(".png"), record["cases"], record["device"])
    except ImportError:
        print("No plot: matplotlib is not installed (the extra 'plots').")


if __name__ == "__main__":
    main()
