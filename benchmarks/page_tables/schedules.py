"""Records of schedules: how near the picked ones are to the fastest."""

from __future__ import annotations

from typing import Any

from page_tables.markdown import number, table
from page_tables.names import NAMES
from page_tables.records import Record

PICKS = {"searched": "search", "rules": "rules", "model": "cost model's first"}
NEAR = 1.1  # times as long as the fastest


def studied(record: Record) -> list[dict[str, Any]]:
    """The rows that were timed to their end."""
    return [r for r in record.data["rows"] if not {"error", "partial"} & set(r)]


def picked(record: Record) -> str:
    """A row a shape: the fastest schedule, and how many times as long the picked ones take."""
    rows = []
    for r in studied(record):
        case, *sizes = r["shape"].rsplit("_", 3)
        ratios = [r[name]["of best"] for name in PICKS]
        cells = ["" if x is None else f"{x:.2f}" for x in ratios]
        name = NAMES.get(case, case.replace("_", " "))
        rows.append([name, " ".join(sizes), r["direction"], str(r["timed"]), number(r["best"]["us"]), *cells])  # fmt: skip
    return table(["rule", "shape", "", "timed", "fastest, µs", *PICKS.values()], rows)


def verdict(record: Record) -> str:
    """On how many shapes what is picked is near the fastest."""
    rows = studied(record)
    parts = []
    for direction in dict.fromkeys(r["direction"] for r in rows):
        its = [r for r in rows if r["direction"] == direction]
        said = []
        for name, words in PICKS.items():
            ratios = {r["shape"]: r[name]["of best"] or float("inf") for r in its}
            near = sum(x <= NEAR for x in ratios.values())
            worst = max(ratios, key=ratios.__getitem__)
            far = f"{ratios[worst]:.2f} times as long" if ratios[worst] < float("inf") else "not timed"  # fmt: skip
            said.append(f"{words} {near} (at worst {far}, {worst.replace('_', ' ')})")
        parts.append(
            f"Of {len(its)} shapes, {direction}, the schedule picked is within {NEAR - 1:.0%} of the fastest of all that "
            f"were timed on: {'; '.join(said)}."
        )
    failed = [f"{r['shape'].replace('_', ' ')} {r['direction']}" for r in record.data["rows"] if r not in rows]  # fmt: skip
    if failed:
        parts.append(f"Not timed to the end: {', '.join(failed)}.")
    return " ".join(parts)
