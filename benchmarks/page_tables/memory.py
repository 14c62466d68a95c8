"""Records of peak memory against length."""

from __future__ import annotations

import itertools

from page_tables.markdown import table
from page_tables.names import NAMES
from page_tables.records import Record


def by_length(record: Record) -> str:
    """Peak memory against length."""
    cases = record.data["cases"]
    lengths = [r["length"] for r in next(iter(cases.values()))["rows"]]
    rows = [
        [NAMES.get(case, case), *(f"{r['peak_bytes'] / 2**20:.0f}" for r in found["rows"])]
        for case, found in cases.items()
    ]
    return table(["peak, MiB", *(f"T{n}" for n in lengths)], rows)


def in_words(record: Record) -> str:
    """The same in a sentence."""
    rows = record.data["cases"]["ttt_linear_b16"]["rows"]
    slopes = [
        (b["peak_bytes"] - a["peak_bytes"]) / (b["length"] - a["length"])
        for a, b in itertools.pairwise(rows)
    ]
    straight = next(i for i in range(len(slopes)) if max(slopes[i:]) <= 1.02 * min(slopes[i:]))
    (at,) = [r["ratio"] for r in rows if r["length"] == 32768]
    return (
        f"Peak memory of forward and backward of TTT-Linear is {at:.2f} times the bytes of q, k, v, the output and their "
        f"gradients at 32768 tokens, {rows[-1]['ratio']:.2f} times at {rows[-1]['length']}; from "
        f"{rows[straight]['length']} tokens on every token adds {slopes[-1] / 1e3:.0f} kB, a straight line"
    )
