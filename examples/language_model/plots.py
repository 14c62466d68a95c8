"""Plots of what runs recorded. Also by itself, where matplotlib was missing when they ran:

python examples/language_model/plots.py runs/linear/log.json runs/mlp/log.json OUT.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLOURS = ("#1f4e9c", "#c2571a", "#3c7d3c", "#7a3b8f")


def available() -> bool:
    """Whether matplotlib is there (the extra "plot")."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _axes(count: int) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(6.5 * count, 4.2), layout="constrained")
    for ax in axes if count > 1 else [axes]:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def loss_curve(path: Path, losses: list[float], title: str) -> None:
    """The training loss of one run, step by step."""
    figure, ax = _axes(1)
    ax.plot(range(1, len(losses) + 1), losses, color=COLOURS[0], linewidth=1)
    ax.set(xlabel="step", ylabel="training loss, nats a byte", title=title)
    figure.savefig(path, dpi=150)


def comparison(path: Path, curves: dict[str, list[float]], title: str) -> None:
    """Two training losses on top of each other, and their difference."""
    figure, (left, right) = _axes(2)
    (one, first), (two, second) = curves.items()
    steps = range(1, len(first) + 1)
    left.plot(steps, first, color=COLOURS[0], linewidth=3, alpha=0.45, label=one)
    left.plot(steps, second, color=COLOURS[1], linewidth=1, label=two)
    left.set(xlabel="step", ylabel="training loss, nats a byte", title=title)
    left.legend(frameon=False)
    gaps = [abs(x - y) for x, y in zip(first, second, strict=True)]
    right.semilogy(steps, [max(x, 1e-9) for x in gaps], color=COLOURS[0], linewidth=1)
    right.set(xlabel="step", ylabel="difference of the losses, nats", title=f"{one} and {two}")
    figure.savefig(path, dpi=150)


def perplexity(path: Path, runs: dict[str, list[dict[str, float]]], title: str) -> None:
    """Held-out perplexity against position, both logarithmic."""
    figure, ax = _axes(1)
    for colour, (name, rows) in zip(COLOURS, runs.items(), strict=False):
        middle = [max(1.0, (r["from"] + r["to"]) / 2) for r in rows]
        ax.loglog(
            middle,
            [r["perplexity"] for r in rows],
            marker="o",
            markersize=4,
            color=colour,
            label=name,
        )
    ax.set(xlabel="position in the window", ylabel="held-out perplexity a byte", title=title)
    ax.yaxis.set_major_formatter("{x:.3g}")
    ax.yaxis.set_minor_formatter("{x:.3g}")
    ax.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Perplexity by position of recorded runs, in one plot."""
    *logs, out = map(Path, sys.argv[1:])
    runs = {}
    for path in logs:
        record = json.loads(path.read_text())
        runs[record["name"]] = record["held_out"]["by_position"]
    perplexity(out, runs, "Python's standard library, held-out files")


if __name__ == "__main__":
    main()
