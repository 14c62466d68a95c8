"""Records of whole models: tokens a second and peak memory, beside peers, by size of model and shape of input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from page_tables.markdown import table
from page_tables.names import MODELS
from page_tables.records import Record

PEERS = ("transformer", "mamba", "hand_dual_graphs", "hand_dual")
Shape = tuple[int, int]  # sequences, and tokens of each


def by_model(record: Record, time: str = "us") -> dict[str, dict[tuple[str, str], dict[Shape, dict[str, Any]]]]:  # fmt: skip
    """Rows by size, model and direction (in the order of MODELS), and shape; those that have that time."""
    found: dict[str, dict[tuple[str, str], dict[Shape, dict[str, Any]]]] = {}
    order = list(MODELS)
    directions = list(dict.fromkeys(r["direction"] for r in record.data["rows"]))
    for r in sorted(record.data["rows"], key=lambda r: (directions.index(r["direction"]), order.index(r["model"]))):  # fmt: skip
        if r.get(time):
            rows = found.setdefault(r["size"], {}).setdefault((r["direction"], r["model"]), {})
            rows[r["batch"], r["context"]] = r
    return found


def shapes_in(rows: dict[Any, dict[Shape, Any]]) -> list[Shape]:
    """Those of the fewest tokens first, contexts in order."""
    return sorted({s for each in rows.values() for s in each}, key=lambda s: (s[0] * s[1], s[1]))


def of_shapes(shapes: Sequence[Shape]) -> list[str]:
    """The head of their columns."""
    return [f"{batch} × {context}" for batch, context in shapes]


def tokens_a_second(record: Record, time: str = "us") -> str:
    """A table a size: a row a model and direction, a column a shape; the fastest of each is bold."""
    parts = []
    for size, rows in by_model(record, time).items():
        shapes, cells = shapes_in(rows), []
        rates = {k: {s: 1e3 * s[0] * s[1] / r[time] for s, r in each.items()} for k, each in rows.items()}  # fmt: skip
        for (direction, model), each in rates.items():
            best = {s: max(x.get(s, 0.0) for (d, _), x in rates.items() if d == direction) for s in shapes}  # fmt: skip
            shown = {s: f"{x:.{1 if x < 100 else 0}f}" for s, x in each.items()}
            of = [f"**{shown[s]}**" if each.get(s) == best[s] else shown.get(s, "") for s in shapes]
            cells.append([direction, MODELS[model], *of])
        parts.append(table([size, "thousand tokens a second", *of_shapes(shapes)], cells))
    return "\n".join(parts)


def verdict(record: Record) -> str:
    """A table a size: how many times as fast TTT-Linear is as each peer."""
    parts = []
    for size, rows in by_model(record).items():
        shapes, cells = shapes_in(rows), []
        for (direction, model), each in rows.items():
            ours = rows.get((direction, "ttt_linear"), {})
            ratios = [f"{each[s]['us'] / ours[s]['us']:.2f}" if s in each and s in ours else "" for s in shapes]  # fmt: skip
            if model in PEERS and any(ratios):
                cells.append([direction, MODELS[model], *ratios])
        parts.append(table([size, "TTT-Linear is times as fast as", *of_shapes(shapes)], cells))
    return "\n".join(parts)


def memory(record: Record) -> str:
    """A table a size: peak memory of training steps."""
    parts = []
    for size, all_rows in by_model(record, "peak_bytes").items():
        rows = {model: each for (direction, model), each in all_rows.items() if direction == "training"}  # fmt: skip
        shapes = shapes_in(rows)
        cells = [
            [MODELS[m], *(f"{each[s]['peak_bytes'] / 2**30:.1f}" if s in each else "" for s in shapes)]
            for m, each in rows.items()
        ]  # fmt: skip
        parts.append(table([f"{size}: peak of a training step, GiB", *of_shapes(shapes)], cells))
    return "\n".join(parts)


def missing(record: Record) -> str:
    """What there is no row of, and why."""
    said = [
        f"{f['size']} {MODELS[f['model']]}, {f['what'].replace(' x ', ' × ')}: {first_line(f['why'])}"
        for f in record.data.get("failed", ())
        if not f["what"].startswith(("graph", "profile"))
    ]
    return f"Not measured: {'; '.join(said)}." if said else ""


def first_line(text: str) -> str:
    """Of what a process said when it failed."""
    return text.strip().partition("\n")[0][:120].rstrip(".")
