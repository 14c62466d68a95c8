"""Reads at places that a tensor of integers says, where that tensor has a closed form in the position."""

from __future__ import annotations

from typing import Any, cast

import sympy
import torch
from torch import fx

from tttc.ir.index_maps import (
    VIEWS,
    Index,
    as_expr,
    broadcast,
    divide,
    is_at_least,
    is_below,
    operand_index,
    shape_of,
    tidy,
)
from tttc.ir.node_values import is_size, operand_of, value_of
from tttc.ir.row_operators import CASTS, RANGES

aten = torch.ops.aten


def looked_up(node: fx.Node, index: Index) -> Index | None:
    """The position in its operand that a lookup reads for one in its result; None where that is in no closed form."""
    source, places = node.args
    assert isinstance(source, fx.Node)
    first = places[0] if isinstance(places, (list, tuple)) and len(places) == 1 else None
    tensor = value_of(first) if isinstance(first, fx.Node) else None
    if not isinstance(first, fx.Node) or tensor is None:
        return None
    at = _whole(first, index[: tensor.dim()])
    size = shape_of(source.meta["val"])[0]
    if at is None or not is_at_least(at, sympy.Integer(0)) or not is_below(at, size):
        return None
    return (at, *index[tensor.dim() :])


def _whole(node: fx.Node, index: Index) -> sympy.Expr | None:
    """An integer tensor at a position, as an expression in the position; None where there is none."""
    tensor = value_of(node)
    if tensor is None or tensor.dtype not in (torch.int64, torch.int32):
        return None

    def operand(arg: Any) -> sympy.Expr | None:
        value = value_of(arg) if isinstance(arg, fx.Node) else None
        if isinstance(arg, fx.Node) and value is not None:
            return _whole(arg, broadcast(index, shape_of(value)))
        if isinstance(arg, fx.Node) and not is_size(arg):
            return None
        if isinstance(arg, (int, torch.SymInt, fx.Node)) and not isinstance(arg, bool):
            return as_expr(arg)
        return None

    if node.target in RANGES:
        start, step = map(operand, RANGES[node.target](node))
        return None if start is None or step is None else tidy(start + step * index[0])
    if node.target in VIEWS:
        return _whole(operand_of(node), operand_index(node, index))
    if node.kwargs and node.target not in CASTS:
        return None
    found = [operand(arg) for arg in node.args]
    if not found or any(x is None for x in found):
        return None
    if node.target in CASTS:
        return found[0]
    if len(found) != 2:
        return None
    a, b = cast("list[sympy.Expr]", found)
    if node.target in (aten.add.Tensor, aten.add.Scalar):
        return tidy(a + b)
    if node.target in (aten.sub.Tensor, aten.sub.Scalar):
        return tidy(a - b)
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        return tidy(a * b)
    if node.target is aten.remainder.Scalar and b.is_positive:
        return divide(a, b)[1] if is_at_least(a, sympy.Integer(0)) else None
    return None
