"""Benchmarks over context length, batch and mini-batch size, as a table, JSON and a picture."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from tttc._checks import check_positive
from tttc.progress import doing

if TYPE_CHECKING:
    from tttc.report.results import BenchmarkResult, Row

MINI_BATCH = "mini_batch_size"
AXES = {"B": 0, "T": 1}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by all


@dataclass
class Point:
    """One benchmark of a sweep; ``tokens`` is how many the model reads there, over the whole batch."""

    sizes: dict[str, int]
    tokens: int
    result: BenchmarkResult

    def per_token(self, name: str) -> float | None:
        """Seconds a token takes a contender."""
        row = self.result[name]
        return None if row.median is None else row.median / self.tokens


@dataclass
class SweepResult:
    """What a sweep measured, one :class:`Point` for each combination of sizes; ``print`` shows a table."""

    points: list[Point]

    @property
    def sizes(self) -> dict[str, list[int]]:
        """The values of each size, ascending."""
        names = self.points[0].sizes
        return {n: sorted({p.sizes[n] for p in self.points}) for n in names}

    @property
    def contenders(self) -> list[str]:
        """The names of the columns."""
        return list(dict.fromkeys(r.name for p in self.points for r in p.result.rows))

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """All of it as JSON, also written to ``path`` if given."""
        text = json.dumps({"points": [asdict(p) for p in self.points]}, indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def to_png(self, path: str | os.PathLike[str]) -> None:
        """Draw time per token, peak memory (where it was measured) and error against the size swept.

        Any name that matplotlib can write will do: ``.svg`` and ``.pdf`` too.

        Raises:
            ImportError: matplotlib is not installed.
        """
        plot(self, path)

    def __str__(self) -> str:
        from tttc.report.text import plain

        return plain(*shown(self))

    def __rich__(self) -> Any:
        from rich.console import Group

        return Group(*shown(self))


def check_sweep(sweep: Mapping[str, Sequence[int]], axes: Mapping[str, int]) -> None:
    """Raise where a sweep names no axis, or has no values."""
    if not sweep:
        raise ValueError(f"sweep: expected some of {', '.join((*axes, MINI_BATCH))}, got none")
    for name, values in sweep.items():
        if name not in axes and name != MINI_BATCH:
            known = ", ".join((*axes, MINI_BATCH))
            raise ValueError(f"sweep: expected some of {known} (axes= names more), got {name!r}")
        if isinstance(values, (str, int)) or not values:
            raise ValueError(f"sweep: expected sizes for {name}, got {values!r}")
        for value in values:
            check_positive(value, f"sweep[{name!r}]")


def resized(tree: Any, axes: Mapping[str, int], sizes: Mapping[str, int]) -> Any:
    """The tensors of ``tree`` cut or repeated along the axes that have a size."""

    def resize(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        made = x.detach()
        for name, axis in axes.items():
            if name in sizes and axis < x.ndim:
                index = torch.arange(sizes[name], device=x.device) % x.shape[axis]
                made = made.index_select(axis, index)
        return made.requires_grad_(x.requires_grad)

    return pytree.tree_map(resize, tree)


def run_sweep(
    sweep: Mapping[str, Sequence[int]],
    measure: Callable[[dict[str, int]], tuple[int, BenchmarkResult]],
) -> SweepResult:
    """Measure every combination of sizes; ``measure`` returns how many tokens were read, and the benchmark."""
    points = []
    combinations = list(itertools.product(*sweep.values()))
    with doing("sweep") as step:
        for i, values in enumerate(combinations):
            sizes = dict(zip(sweep, values, strict=True))
            text = ", ".join(f"{k} {v}" for k, v in sizes.items())
            step(f"{i + 1} of {len(combinations)} ({text})")
            points.append(Point(sizes, *measure(sizes)))
    return SweepResult(points)


# -- text -------------------------------------------------------------------------------------------------


def shown(sweep: SweepResult) -> Iterator[Any]:
    """What ``print`` shows of a sweep."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from tttc.report.text import error, seconds

    first = sweep.points[0].result
    what = "forward and backward" if first.backward else "forward"
    yield Text(f"{what}, time per token, {first.device}, {first.threads} threads")
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in (*sweep.sizes, *sweep.contenders, "error"):
        table.add_column(name, justify="right")
    for point in sweep.points:
        cells = [str(n) for n in point.sizes.values()]
        for name in sweep.contenders:
            row, time = _row(point, name), point.per_token(name)
            if time is not None:
                cells.append(seconds(time))
            elif row is not None and row.at_least is not None:
                cells.append(f"> {seconds(row.at_least / point.tokens)}")
            else:
                cells.append("")
        ours = _row(point, "tttc")
        table.add_row(*cells, error(None if ours is None else ours.error))
    yield Padding(table, (0, 0, 0, 2))
    notes = {f"{r.name}: {r.note}": 0 for p in sweep.points for r in p.result.rows if r.note}
    for note in notes:
        yield Text(f"  {note}")
    yield Text("  error: that of tttc, relative to the largest value in float64", style="dim")


def _row(point: Point, name: str) -> Row | None:
    return next((r for r in point.result.rows if r.name == name), None)


# -- the picture ------------------------------------------------------------------------------------------


def plot(sweep: SweepResult, path: str | os.PathLike[str]) -> None:
    """As :meth:`SweepResult.to_png`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError(
            "plots need matplotlib, which is not installed: pip install matplotlib, or the extra tttc[plot]"
        ) from missing
    # The size along the axis: the first that has several values; the others tell lines apart.
    along = next((n for n, values in sweep.sizes.items() if len(values) > 1), None)
    along = along or next(iter(sweep.sizes))
    memory = any(r.peak_memory is not None for p in sweep.points for r in p.result.rows)
    panels: list[tuple[str, Callable[[Point, Row], float | None]]] = [
        ("time per token, µs", lambda p, r: None if r.median is None else 1e6 * r.median / p.tokens)
    ]
    if memory:
        panels.append(
            (
                "peak memory, MiB",
                lambda p, r: None if r.peak_memory is None else r.peak_memory / 2**20,
            )
        )
    panels.append(("error against float64", lambda p, r: r.error))
    # A figure of its own, not pyplot's: nothing global changes, and no window is asked for.
    figure = Figure(figsize=(4.6 * len(panels), 3.8), dpi=150, layout="constrained")
    for axis, (title, value) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        _panel(axis, sweep, along, value)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("context length T" if along == "T" else along)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    first = sweep.points[0].result
    what = "forward and backward" if first.backward else "forward"
    figure.suptitle(f"{what}, {first.device}, torch {first.versions['torch']}", fontsize=9)
    figure.savefig(Path(path))


def _panel(axis: Any, sweep: SweepResult, along: str, value: Callable[..., float | None]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    styles = ("-", "--", ":", "-.")
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for point in sweep.points:
        rest = ", ".join(
            f"{n} {v}" for n, v in point.sizes.items() if n != along and len(sweep.sizes[n]) > 1
        )
        for row in point.result.rows:
            y = value(point, row)
            lines.setdefault((row.name, rest), [])
            if y is not None:
                lines[row.name, rest].append((point.sizes[along], y))
    groups = list(dict.fromkeys(rest for _, rest in lines))
    for (name, rest), points in lines.items():
        points.sort()
        axis.plot(
            [x for x, _ in points],
            [y for _, y in points],
            marker="o",
            markersize=4,
            color=COLOURS[sweep.contenders.index(name) % len(COLOURS)],
            linestyle=styles[groups.index(rest) % len(styles)],
            label=f"{name}, {rest}" if rest else name,
        )
    axis.set_xscale("log", base=2)
    if any(y > 0 for points in lines.values() for _, y in points):
        axis.set_yscale("log")
    values = sweep.sizes[along]
    axis.set_xticks(values, [str(v) for v in values])
    axis.set_xticks([], minor=True)
    # Where values lie within one power of ten, no power has a tick: others get numbers.
    low, high = axis.get_ylim()
    if axis.get_yscale() == "log" and high < 20 * low:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}"))
        axis.set_yticks([], minor=True)
    axis.grid(alpha=0.3)
