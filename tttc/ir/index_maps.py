"""Index maps: where an operation that only moves data reads its operand.

A position in a tensor is a tuple of sympy expressions, one per dimension, in index variables and sizes:

    y = x.view(B, T, H, d).permute(0, 2, 1, 3)      # x: [B, T, H*d]
    y at (b, h, t, c)   reads   x at (b, t, h*d + c)

Splits and merges of dimensions bring quotients and remainders, which are kept only where the bounds of
the index variables do not remove them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

import sympy
import torch
from torch import fx

aten = torch.ops.aten

Index = tuple[sympy.Expr, ...]
Shape = tuple[sympy.Expr, ...]


class Quotient(sympy.Function):
    """``a // n`` for a >= 0, n > 0."""

    is_integer = True
    is_nonnegative = True


class Remainder(sympy.Function):
    """``a % n`` for a >= 0, n > 0."""

    is_integer = True
    is_nonnegative = True


class IndexVariable(sympy.Symbol):
    """An integer in ``[0, size)``. The name decides identity, so one name must keep one size."""

    __slots__ = ("size",)

    def __new__(cls, name: str, size: sympy.Expr) -> IndexVariable:
        self: IndexVariable = sympy.Symbol.__xnew__(cls, name, integer=True, nonnegative=True)
        self.size = size
        return self

    def _hashable_content(self) -> tuple[Any, ...]:
        return (*super()._hashable_content(), self.size)


def as_expr(size: Any) -> sympy.Expr:
    """The expression of an int, a SymInt, or a graph node that holds one."""
    if isinstance(size, fx.Node):
        size = size.meta["val"]
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def shape_of(value: torch.Tensor) -> Shape:
    """The shape of a (fake) tensor as expressions."""
    return tuple(as_expr(n) for n in value.shape)


@cache
def numel(shape: Shape) -> sympy.Expr:
    """The number of elements, in a form that compares equal where it is equal."""
    return sympy.expand(prod(shape, start=sympy.Integer(1)))


@cache
def largest(index: sympy.Expr) -> sympy.Expr:
    """An upper bound of an index expression; exact for mixed-radix sums."""
    if isinstance(index, IndexVariable):
        return index.size - 1
    if isinstance(index, Remainder):
        return index.args[1] - 1
    if isinstance(index, Quotient):
        whole = largest(index.args[0])
        quotient, rest = divide(whole + 1, index.args[1])
        if quotient.has(Quotient):
            return whole
        return quotient - 1 if rest == 0 else quotient
    if isinstance(index, sympy.Add):
        return sympy.expand(sum(largest(term) for term in index.args))
    if isinstance(index, sympy.Mul):
        # A term with a negative coefficient is largest where its variables are smallest, at zero.
        if index.could_extract_minus_sign():
            variable = any(_is_variable(a) for a in index.args)
            return sympy.Integer(0) if variable else index
        return sympy.expand(prod(largest(factor) for factor in index.args))
    return index


@cache
def smallest(index: sympy.Expr) -> sympy.Expr:
    """A lower bound of an index expression."""
    return sympy.expand(-largest(sympy.expand(-index))) if _varies(index) else index


def _is_variable(atom: sympy.Expr) -> bool:
    return isinstance(atom, (IndexVariable, Quotient, Remainder))


def _varies(index: sympy.Expr) -> bool:
    return index.has(IndexVariable)


def is_below(index: sympy.Expr, bound: sympy.Expr) -> bool:
    """Whether ``index < bound`` can be proved."""
    return bool(sympy.expand(bound - largest(index)).is_positive)


def is_at_least(index: sympy.Expr, bound: sympy.Expr) -> bool:
    """Whether ``index >= bound`` can be proved."""
    return bool(sympy.expand(smallest(index) - bound).is_nonnegative)


@cache
def tidy(index: sympy.Expr) -> sympy.Expr:
    """Expanded, with ``n*(a // n) + a % n`` put together again as ``a``."""
    index = sympy.expand(index)
    for remainder in index.atoms(Remainder):
        whole, n = remainder.args
        factor = index.coeff(remainder)
        parts = sympy.expand(factor * (n * Quotient(whole, n) + remainder))
        without = sympy.expand(index - parts)
        if factor != 0 and not without.has(remainder, Quotient(whole, n)):
            index = sympy.expand(without + factor * whole)
    return index


@cache
def divide(index: sympy.Expr, n: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """Quotient and remainder of an index expression by a size."""
    quotient = rest = sympy.Integer(0)
    for term in sympy.Add.make_args(sympy.expand(index)):
        ratio = term / n
        if sympy.fraction(ratio)[1] == 1:
            quotient += ratio
        else:
            rest += term
    if rest == 0 or (is_below(rest, n) and is_at_least(rest, sympy.Integer(0))):
        return quotient, rest
    # Nothing was proved about the parts: divide the whole, which is known not to be negative.
    return Quotient(index, n), Remainder(index, n)


def linear(index: Sequence[sympy.Expr], shape: Sequence[sympy.Expr]) -> sympy.Expr:
    """The place of a position in the contiguous order of a shape."""
    place = sympy.Integer(0)
    for i, n in zip(index, shape, strict=True):
        place = place * n + i
    return tidy(place)


@cache
def reshape(index: Index, source: Shape, target: Shape) -> Index:
    """The position in ``target`` of the element at ``index`` in ``source``, both contiguous views of one."""
    # Groups of dimensions with equal products are independent, which keeps the expressions short.
    out: dict[int, sympy.Expr] = {}
    left = [i for i, n in enumerate(source) if n != 1]
    right = [j for j, n in enumerate(target) if n != 1]
    while left and right:
        a, b = _first_equal_products([source[i] for i in left], [target[j] for j in right])
        group, left = left[:a], left[a:]
        into, right = right[:b], right[b:]
        place = linear([index[i] for i in group], [source[i] for i in group])
        for j in reversed(into[1:]):
            place, out[j] = divide(place, target[j])
        out[into[0]] = place
    return tuple(out.get(j, sympy.Integer(0)) for j in range(len(target)))


def _first_equal_products(left: list[sympy.Expr], right: list[sympy.Expr]) -> tuple[int, int]:
    for total in range(2, len(left) + len(right) + 1):
        for a in range(max(1, total - len(right)), min(len(left), total - 1) + 1):
            if numel(tuple(left[:a])) == numel(tuple(right[: total - a])):
                return a, total - a
    return len(left), len(right)


def broadcast(index: Index, shape: Shape) -> Index:
    """The position read in an operand of this shape, broadcast to a result read at ``index``."""
    if not shape:
        return ()
    return tuple(
        sympy.Integer(0) if n == 1 else i for i, n in zip(index[-len(shape) :], shape, strict=True)
    )


def _axis(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def _at_least_zero(place: sympy.Expr, n: sympy.Expr) -> sympy.Expr:
    """A place counted from the end where it is negative."""
    return place + n if place.is_negative else place


def _arguments(node: fx.Node, *defaults: Any) -> tuple[Any, ...]:
    """What follows the operand, filled up with defaults."""
    given = node.args[1:]
    return (*given, *defaults[len(given) :])


def _permute(node: fx.Node, index: Index, shape: Shape) -> Index:
    order: Any = node.args[1]
    at = {_axis(d, len(shape)): index[j] for j, d in enumerate(order)}
    return tuple(at[d] for d in range(len(shape)))


def _transpose(node: fx.Node, index: Index, shape: Shape) -> Index:
    a, b = (_axis(d, len(shape)) for d in _arguments(node, 0, 1))
    out = list(index)
    if shape and len(shape) > 1:
        out[a], out[b] = index[b], index[a]
    return tuple(out)


def _unsqueeze(node: fx.Node, index: Index, shape: Shape) -> Index:
    axis = _axis(_arguments(node)[0], len(index))
    return index[:axis] + index[axis + 1 :]


def _squeeze(node: fx.Node, index: Index, shape: Shape) -> Index:
    axes: Any = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
    gone = {d for d in (_axis(a, len(shape)) for a in axes) if shape[d] == 1}
    rest = iter(index)
    return tuple(sympy.Integer(0) if d in gone else next(rest) for d in range(len(shape)))


def _slice(node: fx.Node, index: Index, shape: Shape) -> Index:
    dim, start, _, step = _arguments(node, 0, None, None, 1)
    axis = _axis(dim, len(shape))
    first = _at_least_zero(as_expr(0 if start is None else start), shape[axis])
    return (*index[:axis], tidy(index[axis] * as_expr(step) + first), *index[axis + 1 :])


def _select(node: fx.Node, index: Index, shape: Shape) -> Index:
    axis = _axis(_arguments(node)[0], len(shape))
    return (*index[:axis], _at_least_zero(as_expr(node.args[2]), shape[axis]), *index[axis:])


def _flip(node: fx.Node, index: Index, shape: Shape) -> Index:
    axes = {_axis(d, len(shape)) for d in _arguments(node)[0]}
    return tuple(tidy(shape[d] - 1 - i) if d in axes else i for d, i in enumerate(index))


def _roll(node: fx.Node, index: Index, shape: Shape) -> Index:
    out = list(index)
    for shift, dim in zip(*_arguments(node), strict=True):
        axis = _axis(dim, len(shape))
        back = (-as_expr(shift)) % shape[axis] if shape[axis].is_Integer else -as_expr(shift)
        if back.is_negative:
            back = back + shape[axis]
        out[axis] = divide(out[axis] + back, shape[axis])[1]
    return tuple(out)


def _reshape(node: fx.Node, index: Index, shape: Shape) -> Index:
    return reshape(index, shape_of(node.meta["val"]), shape)


def _same(node: fx.Node, index: Index, shape: Shape) -> Index:
    return index


def _broadcast(node: fx.Node, index: Index, shape: Shape) -> Index:
    return broadcast(index, shape)


# Each takes the node, the position read in its result, and the shape of its operand.
VIEWS: dict[Any, Callable[[fx.Node, Index, Shape], Index]] = {
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _broadcast,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.alias.default: _same,
    aten.detach.default: _same,
}
# Index maps that cost a copy when they stand alone.
COPIES: dict[Any, Callable[[fx.Node, Index, Shape], Index]] = {
    aten.clone.default: _same,
    aten.flip.default: _flip,
    aten.roll.default: _roll,
}
BIJECTIVE = frozenset(
    [
        *COPIES,
        *(op for op, rule in VIEWS.items() if rule in (_reshape, _permute, _transpose, _same)),
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    ]
)


def operand_index(node: fx.Node, index: Index) -> Index:
    """Where the operand of a view is read when the view is read at ``index``."""
    rule = VIEWS.get(node.target) or COPIES[node.target]
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return rule(node, index, shape_of(operand.meta["val"]))
