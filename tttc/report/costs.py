"""What the stages of a scan cost, per mini-batch and head, as expressions and in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from torch import fx

from tttc.ir import ops
from tttc.ir.body import Body
from tttc.ir.build import dims_of
from tttc.ir.cost import MINI_BATCH, cost, size_table, volume

VIEWS = (ops.rename, ops.last, ops.broadcast)  # these move nothing


@dataclass(frozen=True)
class StageCost:
    """Of one mini-batch and one head.

    ``flops``: floating-point operations. ``op_by_op``: elements read and written if every operator were a
    kernel of its own, as in eager execution. ``fused``: elements read and written if only tokens and outputs
    passed through memory. ``largest``: elements of the largest value that is made. ``sizes``: the numbers to
    put for the symbols; ``b`` is the mini-batch size.
    """

    flops: sympy.Expr
    op_by_op: sympy.Expr
    fused: sympy.Expr
    largest: sympy.Expr
    sizes: dict[sympy.Expr, int]

    def number(self, what: str) -> float:
        """The value of a field: ``cost.number("flops")``."""
        return float(getattr(self, what).subs(self.sizes))


def stage_cost(body: Body, mini_batch_size: int) -> StageCost:
    """The cost of one stage; a body for one token is counted once for each token of the mini-batch."""
    per_body = cost(body)
    times = sympy.Integer(1) if body.batched else MINI_BATCH
    sizes = {**size_table(body, mini_batch_size), MINI_BATCH: mini_batch_size}
    return StageCost(
        sympy.expand(times * per_body.flops),
        sympy.expand(times * _op_by_op(body)),
        sympy.expand(times * per_body.traffic),
        _largest(body, sizes),
        sizes,
    )


def _largest(body: Body, sizes: dict[sympy.Expr, int]) -> sympy.Expr:
    volumes = [volume(dims_of(n)) for n in (*body.placeholders, *body.nodes)]
    return max(volumes, key=lambda v: float(v.subs(sizes)), default=sympy.Integer(0))


def _op_by_op(body: Body) -> sympy.Expr:
    total: sympy.Expr = sympy.Integer(0)
    for node in body.nodes:
        if node.target in VIEWS:
            continue
        read = [x for x in node.args if isinstance(x, fx.Node)]
        total += sum((volume(dims_of(x)) for x in (*read, node)), sympy.Integer(0))
    return total


def expression(cost: sympy.Expr, times: int = 1) -> str:
    """A cost as people write it: ``2·b^2·i + 4·b``."""
    return str(sympy.expand(times * cost)).replace("**", "^").replace("*", "·")
