"""Equal parts that rows are cut into, so that a concatenation in a row needs no choice.

::

    y = cat([a, b], -1)         # [T, d], a and b: [T, d/2];   two parts: columns c of d/2
                                # store a at (t, c), and b at (t, c + d/2)
"""

from __future__ import annotations

from math import gcd
from typing import Any

import sympy
import torch
from torch import fx

from tttc.ir.index_maps import as_expr, shape_of
from tttc.ir.node_values import axis_of

aten = torch.ops.aten

MAX_PARTS = 4  # of a row
MIN_PART = 16  # columns: what memory gives at a time, at two bytes each


def parts_of_rows(inside: set[fx.Node], columns: sympy.Expr) -> int:
    """Into how many equal parts concatenations and scatters cut rows."""
    if not columns.is_Integer or columns < 2 * MIN_PART:
        return 1
    width = int(columns)
    for node in inside:
        for cut in _cuts(node, columns):
            width = gcd(width, int(cut)) if cut.is_Integer else 1
    parts = int(columns) // width
    return parts if width >= MIN_PART and parts <= MAX_PARTS else 1


def _cuts(node: fx.Node, columns: sympy.Expr) -> list[sympy.Expr]:
    """Where, or how far apart, a concatenation or scatter cuts rows of so many columns."""
    if node.target not in (aten.cat.default, aten.slice_scatter.default):
        return []
    shape = shape_of(node.meta["val"])
    last = len(shape) - 1
    if not shape or shape[-1] != columns:
        return []
    if node.target is aten.cat.default:
        pieces: Any = node.args[0]
        sizes = [shape_of(p.meta["val"]) for p in pieces]
        return [s[-1] for s in sizes] if axis_of(node, 1, len(shape)) == last else []
    source: Any = node.args[1]
    start = as_expr((*node.args, None, None)[3] or 0)
    size = shape_of(source.meta["val"])[-1]
    return [start, size] if axis_of(node, 2, len(shape)) == last else []
