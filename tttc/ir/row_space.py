"""One iteration space for a set of memory-bound ATen nodes: rows, and one dimension inside a row.

    mean = x.mean(-1, True); y = (x - mean).view(B, T, H, d).permute(0, 2, 1, 3).clone()

    rows (r0: B, r1: T), columns c: D
      v0 = load x at (r0, r1, c);  v1 = mean of v0 over c;  v2 = sub(v0, v1);  ...

Every node is evaluated at the positions its users read it at, starting from the outputs. Operations that only
move data disappear into those positions; a concatenation becomes a choice between two of them, or, where it cuts rows
into equal parts, no choice at all: columns are then those of one part, and each output is stored part by part.

    y = cat([a*cos - b*sin, b*cos + a*sin], -1)        # a, b: the halves of x: [T, d]

    rows t: T, columns c: d / 2
      a = load x at (t, c);  b = load x at (t, c + d/2);  store y at (t, c), and at (t, c + d/2)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from tttc.ir.index_maps import Shape, numel, shape_of
from tttc.ir.node_values import operand_of
from tttc.ir.nominal import nominal
from tttc.ir.row_operators import REDUCTIONS, TOTALS
from tttc.ir.row_parts import parts_of_rows
from tttc.ir.row_planner import Planner
from tttc.ir.row_steps import NoRowSpaceError, RowSpace


def row_space(members: Iterable[fx.Node], outputs: Sequence[fx.Node]) -> RowSpace | None:
    """The row space that evaluates ``outputs`` from whatever ``members`` read, or None where none was found."""
    inside = set(members)
    shapes: list[Shape] = []
    reductions = [n for n in inside if n.target in REDUCTIONS]
    sums = [n for n in outputs if n.target in TOTALS]
    results = [n for n in outputs if n.target not in TOTALS]
    for node in sorted(reductions) or sorted(results, key=_nominal_numel, reverse=True) or sums:
        if node.target in REDUCTIONS | TOTALS:
            shape = shape_of(operand_of(node).meta["val"])
        else:
            shape = shape_of(node.meta["val"])
        if shape not in shapes:
            shapes.append(shape)
    # The same rows, cut up as an output has them, may be what permutations need.
    for output in results:
        shape = shape_of(output.meta["val"])
        if reductions and shape not in shapes and shape and shape[-1] == shapes[0][-1]:
            shapes.append(shape)
    for shape in shapes[:6]:
        parts = 1 if reductions or sums or not shape else parts_of_rows(inside, shape[-1])
        for n in dict.fromkeys((parts, 1)):
            try:
                space = Planner(inside, shape, bool(reductions), n).plan(outputs)
            except NoRowSpaceError:
                continue
            if n == 1 or not any(s.kind == "choose" for s in space.steps):
                return space
    return None


def _nominal_numel(node: fx.Node) -> int:
    return nominal(numel(shape_of(node.meta["val"])))
