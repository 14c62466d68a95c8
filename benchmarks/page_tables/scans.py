"""Records of scans: times of each case and shape, beside rivals that compute the same, and errors."""

from __future__ import annotations

import re
from collections.abc import Iterator

from page_tables.markdown import number, table
from page_tables.names import NAMES
from page_tables.records import DIRECTIONS, Record

RIVALS = {"ttt_linear_b16": ("fla chunk_ttt_linear", "fla fused_chunk_ttt_linear")}


def shapes_of(times: dict[tuple[str, str, str], float]) -> list[str]:
    """The shapes of a record, in its order."""
    return list(dict.fromkeys(shape for _, shape, _ in times))


def by_shape(record: Record, direction: str) -> str:
    """A row a case, a column a shape; the fastest of those that compute the same is bold."""
    times = record.times
    cases = [c for c in NAMES if any((c, s, direction) in times for s in shapes_of(times))]
    # Rivals stand under what they rival.
    ordered = list(dict.fromkeys(c for x in cases for c in (x, *RIVALS.get(x, ())) if c in cases))
    rows = []
    for case in ordered:
        group = next(([c, *r] for c, r in RIVALS.items() if case in (c, *r)), [case])
        cells = [NAMES[case]]
        for shape in shapes_of(times):
            found = times.get((case, shape, direction))
            others = [times[c, shape, direction] for c in group if (c, shape, direction) in times]
            shown = "" if found is None else number(found)
            best = found is not None and len(others) > 1 and found == min(others)
            cells.append(f"**{shown}**" if best else shown)
        rows.append(cells)
    return table([f"{DIRECTIONS[direction]}, µs", *shapes_of(times)], rows)


def every_case(record: Record) -> str:
    """All of a record of scans."""
    times = record.times
    floors = {(r["case"], r["shape"]): r.get("floor_us") for r in record.data["forward"]}
    rows = []
    for case, shape in dict.fromkeys((c, s) for c, s, _ in times):
        floor = floors.get((case, shape))
        cells = [times.get((case, shape, d)) for d in DIRECTIONS]
        forward, training = ("" if x is None else number(x) for x in cells)
        rows.append([case, shape, forward, "" if floor is None else number(floor), training])
    return table(["case", "shape", "forward", "floor", "forward and backward"], rows)


def compared(record: Record) -> Iterator[tuple[str, str, str, float]]:
    """For each case with rivals: case, shape, direction, and how many times as long the best rival takes."""
    times = record.times
    for case, shape, direction in times:
        rivals = [times.get((r, shape, direction)) for r in RIVALS.get(case, ())]
        known = [x for x in rivals if x is not None]
        if known:
            yield case, shape, direction, min(known) / times[case, shape, direction]


def verdict(record: Record) -> str:
    """By how much the rivals are slower, and where they are faster."""
    parts = []
    for direction, said in DIRECTIONS.items():
        found = [(shape, x) for _, shape, d, x in compared(record) if d == direction]
        ahead = [x for _, x in found if x >= 1]
        behind = [
            f"at {shape} it is {1 / x:.1f} times as fast as ours" for shape, x in found if x < 1
        ]
        if ahead:
            low, high = (f"{x:.1f}" for x in (min(ahead), max(ahead)))
            span = low if low == high else f"{low} to {high}"
            behind.insert(0, f"takes {span} times as long{'' if behind else ' as ours'}")
        if behind:
            text = f"For the {said} of TTT-Linear flash-linear-attention's best kernel {'; '.join(behind)}."
            parts.append(text)
    return " ".join(parts)


def accuracy(record: Record) -> str:
    """The largest errors of a record of scans."""
    outputs: dict[str, list[float]] = {}
    for row in record.data["forward"]:
        for what, x in row.get("errors", {}).items():
            if (length := re.match(r"T\d+", what)) is not None:
                outputs.setdefault(length[0], []).append(x)
    gradients = [x for r in record.data.get("training", ()) for x in r.get("gradient_errors", ())]
    said = ", ".join(f"{max(x):.1e} at {length}" for length, x in outputs.items())
    text = f"Largest relative error against float64: outputs {said}"
    return text + (f"; gradients {max(gradients):.1e}." if gradients else ".")


def speed(record: Record) -> str:
    """The sentence under the rule of the README."""
    times = record.times
    shape = "B16 T2048"
    ours = times["ttt_linear_b16", shape, "us"]
    best = next(x for c, s, d, x in compared(record) if (s, d) == (shape, "us"))
    return (
        f"With 32 heads of 64 and mini-batches of 16, a forward of TTT-Linear, which is this with a layer norm, takes "
        f"{number(ours)} µs for 16 sequences of 2048 tokens on an {record.device}: {best:.1f} times as fast as "
        f"flash-linear-attention's fastest kernel, written by hand."
    )
