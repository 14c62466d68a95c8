"""Concatenations, paddings and scatters: which operand a position falls into, as a choice between two at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from tttc.ir.index_maps import Index, as_expr, is_at_least, is_below, shape_of, tidy
from tttc.ir.node_values import axis_of, operand_of
from tttc.ir.row_steps import Bound, Guard, NoRowSpaceError, Ref, Steps, number_of

aten = torch.ops.aten


class Choices:
    """Makes the steps of choices; ``value`` makes those of an operand at a position, within bounds."""

    def __init__(self, steps: Steps, value: Callable[[fx.Node, Index, Guard], Ref]) -> None:
        self.steps = steps
        self.value = value

    def choose(self, node: fx.Node, index: Index, guard: Guard) -> Ref:
        """The part of a concatenation, padding or scatter that a position falls into."""
        shape = shape_of(node.meta["val"])
        if node.target is aten.cat.default:
            parts: Any = node.args[0]
            axis = axis_of(node, 1, len(shape))
            parts = [p for p in parts if shape_of(p.meta["val"]) != (0,)]
            return self._part(node, parts, axis, index, guard)
        if node.target is aten.constant_pad_nd.default:
            return self._padded(node, index, guard)
        axis = axis_of(node, 2, len(shape))
        source: Any = node.args[1]
        if node.target is aten.select_scatter.default:
            start = as_expr(node.args[3])
            size = sympy.Integer(1)
            inner = index[:axis] + index[axis + 1 :]
        else:
            _, _, _, first, _, step = (*node.args, *(None,) * 6)[:6]
            if step not in (None, 1):
                raise NoRowSpaceError
            start = as_expr(0 if first is None else first)
            size = shape_of(source.meta["val"])[axis]
        if start.is_negative:
            start = start + shape[axis]
        if node.target is aten.slice_scatter.default:
            inner = (*index[:axis], tidy(index[axis] - start), *index[axis + 1 :])
        bound = Bound(index[axis], start, start + size)
        return self._choice(
            node,
            bound,
            lambda g: self.value(source, inner, g),
            lambda: self.value(operand_of(node), index, guard),
            guard,
        )

    def _part(
        self, node: fx.Node, parts: Sequence[fx.Node], axis: int, index: Index, guard: Guard
    ) -> Ref:
        first, *rest = parts
        size = shape_of(first.meta["val"])[axis]
        if not rest:
            return self.value(first, index, guard)
        after = (*index[:axis], tidy(index[axis] - size), *index[axis + 1 :])
        zero = sympy.Integer(0)
        others = Bound(after[axis], zero, _rest(rest, axis))
        beyond = guard if _holds(others) else guard | {others}
        return self._choice(
            node,
            Bound(index[axis], zero, size),
            lambda g: self.value(first, index, g),
            lambda: self._part(node, rest, axis, after, beyond),
            guard,
        )

    def _padded(self, node: fx.Node, index: Index, guard: Guard) -> Ref:
        operand = operand_of(node)
        shape = shape_of(operand.meta["val"])
        pads: Any = node.args[1]
        fill = number_of((*node.args, 0)[2])
        at = list(index)
        bounds = []
        for k in range(len(pads) // 2):
            axis = len(shape) - 1 - k
            at[axis] = tidy(index[axis] - as_expr(pads[2 * k]))
            if pads[2 * k] != 0 or pads[2 * k + 1] != 0:
                bounds.append(Bound(at[axis], sympy.Integer(0), shape[axis]))
        value = self.value(operand, tuple(at), guard | frozenset(bounds))
        outside = self.steps.make("constant", node, args=(fill,))
        for bound in bounds:
            value = self.steps.make("choose", node, args=(bound, value, outside))
        return value

    def _choice(
        self,
        node: fx.Node,
        bound: Bound,
        inner: Callable[[Guard], Ref],
        outer: Callable[[], Ref],
        guard: Guard,
    ) -> Ref:
        if _holds(bound):
            return inner(guard)
        if is_below(bound.index, bound.low) or is_at_least(bound.index, bound.high):
            return outer()
        return self.steps.make("choose", node, args=(bound, inner(guard | {bound}), outer()))


def _holds(bound: Bound) -> bool:
    """Whether a bound is known to hold everywhere."""
    return is_at_least(bound.index, bound.low) and is_below(bound.index, bound.high)


def _rest(parts: Sequence[fx.Node], axis: int) -> sympy.Expr:
    return sympy.Add(*(shape_of(p.meta["val"])[axis] for p in parts))
