"""What a graph costs: sympy expressions in the sizes of its dimensions, per mini-batch of one head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy
from torch import fx

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, Body, spec_of
from tttc.ir.build import dims_of
from tttc.ir.spec import parse

MINI_BATCH = sympy.Symbol("b", positive=True, integer=True)


def symbol(dim: str) -> sympy.Expr:
    """The size of a dimension: ``b`` for the token dimensions, its own symbol for a feature dimension."""
    if dim.rstrip("0123456789") in (TOKEN, EARLIER):
        return MINI_BATCH
    return sympy.Symbol(dim, positive=True, integer=True)


def volume(dims: tuple[str, ...]) -> sympy.Expr:
    """The number of elements of a value with these dimensions."""
    return sympy.Mul(*(symbol(d) for d in dims))


def flops(node: fx.Node) -> sympy.Expr:
    """Floating-point operations of one operator."""
    if node.op != "call_function" or node.target in (ops.rename, ops.last, ops.broadcast):
        return sympy.Integer(0)
    spec = parse(spec_of(node))
    if node.target in (ops.contraction, ops.masked_contraction):
        operands = max(len(spec.operands), 1)
        return volume(spec.labels) * max(operands if spec.summed else operands - 1, 1)
    return volume(spec.labels)


def size_table(body: Body, mini_batch_size: int) -> dict[sympy.Expr, int]:
    """The numbers to put for the symbols of :func:`flops`."""
    table = {symbol(d): n for d, n in body.sizes.items()}
    table[MINI_BATCH] = mini_batch_size if body.batched else 1
    return table


@dataclass(frozen=True)
class Cost:
    """Per mini-batch and head: operations, elements through device memory, largest value materialised."""

    flops: sympy.Expr
    traffic: sympy.Expr
    footprint: sympy.Expr

    def at(self, table: dict[sympy.Expr, int]) -> tuple[float, float, float]:
        """The numbers for given sizes."""
        return tuple(float(x.subs(table)) for x in (self.flops, self.traffic, self.footprint))  # type: ignore[return-value]


def cost(body: Body) -> Cost:
    """The cost of one mini-batch: token arguments and outputs pass through memory, the rest stays on chip."""
    total = sum((flops(n) for n in body.nodes), sympy.Integer(0))
    tokens = [n for n in body.placeholders if str(n.target).startswith("token")]
    through = [dims_of(n) for n in tokens] + [dims_of(n) for n in body.results[body.states :]]
    traffic = sum((volume(d) for d in through), sympy.Integer(0))
    sizes = [volume(dims_of(n)) for n in (*body.nodes, *body.placeholders)]
    table = size_table(body, 16)
    footprint = max(sizes, key=lambda e: float(e.subs(table))) if sizes else sympy.Integer(0)
    return Cost(sympy.expand(total), sympy.expand(traffic), footprint)


def element_count(dims: tuple[str, ...], sizes: dict[str, int]) -> int:
    """The number of elements of a value, in numbers."""
    return math.prod(sizes[d] for d in dims)
