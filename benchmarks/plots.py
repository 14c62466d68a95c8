"""Plots beside the newest records: time per token against context of whole models, and the roofline of scans.

    python benchmarks/plots.py [RECORD.json ...]

Needs matplotlib (the extra "plot"). Operations are those of the dual form as the compiler counts them, bytes those of q, k,
v, the rates and the output once; the lines are what a copy and a matrix product reached on the card of the record (a record
without the latter has a line for the copy alone).
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from page_tables.names import MODELS, NAMES
from page_tables.records import Record, records
from page_tables.whole_models import by_model

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = {
    "ttt_linear": "#1f4e9c",
    "ttt_mlp": "#7a3e9d",
    "transformer": "#c2571a",
    "mamba": "#2b8a3e",
    "hand_dual_graphs": "#777777",
    "hand_dual": "#b0b0b0",
}
MARKERS = "osD^v"
HIGHEST = 1e15  # operations a second, of the axis
HEADS, D = 32, 64  # of the scans


def time_per_token(record: Record) -> Path:
    """A panel for each size and direction; solid as many tokens a step at every context, dashed more sequences."""
    found = by_model(record)
    panels = list(dict.fromkeys((size, d) for size, rows in found.items() for d, _ in rows))
    columns = min(2, len(panels))
    figure, axes = pyplot.subplots(
        -(-len(panels) // columns), columns, figsize=(5.5 * columns, 3.6 * -(-len(panels) // columns)),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for ax, (size, direction) in zip(axes.flat, panels, strict=False):
        for (of, model), rows in found[size].items():
            if of != direction:
                continue
            for which, style, label in ((min, "o-", MODELS.get(model, model)), (max, "o--", None)):
                line = {c: which(b for b, context in rows if context == c) for _, c in rows}
                x = sorted(line)
                y = [rows[line[c], c]["us"] / (line[c] * c) for c in x]
                ax.loglog(x, y, style, color=COLOURS.get(model), label=label, base=2, markersize=4)
        ticks = sorted({c for rows in found[size].values() for _, c in rows})
        ax.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else str(t) for t in ticks])
        ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(2, subs=(1.0, 1.5)))
        ax.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:.3g}"))
        least = {b for rows in found[size].values() for b, c in rows if c == ticks[-1]}
        more = f" (dashed: at least {max(least)} sequences)" if len(least) > 1 else ""
        ax.set(xlabel=f"context{more}", ylabel="µs a token", title=f"{size}, {direction}")
        ax.grid(alpha=0.3, which="both")
    lines = {
        x.get_label(): x for ax in axes.flat for x in ax.get_lines() if x.get_label()[0] != "_"
    }
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)  # fmt: skip
    figure.suptitle(f"{record.device}, bf16, {next(iter(record.data['tokens'].values()))} tokens a step")  # fmt: skip
    return saved(figure, record.path.with_suffix(".png"))


@functools.cache
def work(case: str) -> tuple[float, float]:
    """Operations and bytes of a token of one head of a scan's forward."""
    from scans import make_case

    from tttc.ir.cost import cost, size_table

    made = make_case(case, 1, 64, 1, D, device="cpu")
    program = made.program()
    body = program.full or program.token  # of a chunk, where that is what the scan takes as a token
    flops, elements, _ = cost(body).at(size_table(body, program.unit))
    rows = made.raw["q"].shape[1] // made.tokens[0].shape[2]  # tokens in what the scan takes as one
    each = program.unit * rows
    return flops / each, elements * made.raw["q"].element_size() / each


def copy_rate(row: dict[str, Any]) -> float:
    """Bytes a second of a copy on the card, from a row's floor: q, k, v and the output once."""
    batch, length = shape_of(row)
    return 4 * 2 * batch * length * HEADS * D / row["floor_us"] * 1e6


def shape_of(row: dict[str, Any]) -> tuple[int, int]:
    """Batch and length of a row of scans."""
    batch, length = (int(part[1:]) for part in row["shape"].split())
    return batch, length


def roofline(record: Record) -> Path:
    """Reached operations a second against operations a byte, a colour a case and a marker a shape."""
    data = record.data
    figure, ax = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    rows = data["forward"]
    copy, matrix = copy_rate(rows[0]), data.get("matrix_flops", math.inf)
    said = f", bf16 products {matrix / 1e12:.0f} TFLOP/s" if "matrix_flops" in data else ""
    knee = min(matrix, HIGHEST) / copy
    x = [30.0, knee, 1000.0] if matrix < HIGHEST else [30.0, knee]
    ax.loglog(x, [min(copy * i, matrix) / 1e12 for i in x], color="black", linewidth=1,
              label=f"copy {copy / 1e12:.1f} TB/s{said}")  # fmt: skip
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    colours = dict(zip(dict.fromkeys(r["case"] for r in rows), COLOURS.values(), strict=False))
    for row in rows:
        flops, size = work(row["case"])
        batch, length = shape_of(row)
        reached = flops * batch * length * HEADS / row["us"] * 1e6
        marker = MARKERS[shapes.index(row["shape"])]
        ax.plot(flops / size, reached / 1e12, marker, color=colours[row["case"]])
    for marker, shape in zip(MARKERS, shapes, strict=False):
        ax.plot([], [], marker, color="grey", label=shape)
    for case, colour in colours.items():
        ax.plot([], [], "-", color=colour, linewidth=4, label=NAMES[case])
    ax.set(xlabel="operations a byte", ylabel="TFLOP/s", title=f"Forward of scans, {record.device}")
    ax.grid(alpha=0.3, which="both")
    ax.legend(frameon=False, fontsize=8)
    return saved(figure, record.path.with_name(f"{record.path.stem}-roofline.png"))


def saved(figure: Any, path: Path) -> Path:
    """Written, and closed."""
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"wrote {path.name}")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Plots of the records given, or of the newest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path, nargs="*")
    given = parser.parse_args(arguments).records
    found = (
        [Record(p) for p in given]
        if given
        else [r for kind in ("models", "scans") for r in records(kind)[:1]]
    )
    for record in found:
        if record.data.get("rows"):
            time_per_token(record)
        elif record.data.get("forward"):
            roofline(record)


if __name__ == "__main__":
    main()
