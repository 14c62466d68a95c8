"""Index expressions, sizes and memory layouts as the text of a kernel and of its launcher."""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
from torch import fx
from tttc.codegen.rowwise_ops import NotEmittableError

from tttc.ir.index_maps import (
    Index,
    IndexVariable,
    Quotient,
    Remainder,
    Shape,
    as_expr,
    linear,
    shape_of,
)
from tttc.ir.node_values import is_size, value_of
from tttc.ir.nominal import nominal
from tttc.ir.row_steps import RowSpace

ROW = IndexVariable("row", sympy.Integer(2**31))


def write(
    expr: sympy.Expr,
    name: Callable[[sympy.Symbol], str],
    whole: Callable[[sympy.Expr], str] | None = None,
) -> str:
    """Python text of an index expression or a size.

    In a kernel, ``whole`` names sizes that are better computed by the launcher: products, which may not fit
    32 bits, and anything more than sums.
    """

    def rank(term: sympy.Expr) -> tuple[bool, str]:
        # Index variables first: they are 64 bits wide, and so is then every product with a size.
        return not term.has(IndexVariable), str(term)

    def atom(e: sympy.Expr) -> str:
        return text(e) if e.is_Symbol or (e.is_Integer and e >= 0) else f"({text(e)})"

    def product(e: sympy.Expr) -> str:
        varying = [f for f in e.args if f.has(IndexVariable)]
        size = sympy.Mul(*(f for f in e.args if not f.has(IndexVariable)))
        if whole is not None and len(size.free_symbols) > 1:
            return " * ".join([*(atom(f) for f in sorted(varying, key=rank)), whole(size)])
        return " * ".join(atom(f) for f in sorted(e.args, key=rank))

    def total(e: sympy.Expr) -> str:
        out = ""
        for term in sorted(e.args, key=rank):
            minus = term.could_extract_minus_sign()
            part = text(-term) if minus else text(term)
            sign = " - " if minus else " + "
            out += (sign if out else "-" if minus else "") + part
        return out

    def text(e: sympy.Expr) -> str:
        if e.is_Integer:
            return str(int(e))
        if e.is_Symbol:
            return name(e)
        if isinstance(e, Quotient):
            return f"({atom(e.args[0])} // {atom(e.args[1])})"
        if isinstance(e, Remainder):
            return f"({atom(e.args[0])} % {atom(e.args[1])})"
        if e.is_Add:
            return total(e)
        if e.is_Mul:
            return product(e)
        if whole is not None:
            return whole(e)
        if e.is_Pow and e.exp.is_Integer and e.exp > 0:
            return " * ".join([atom(e.base)] * int(e.exp))
        function = type(e).__name__  # those of torch, which has its own
        if function in ("FloorDiv", "CleanDiv"):
            return f"({atom(e.args[0])} // {atom(e.args[1])})"
        if function in ("Max", "Min"):
            return f"{function.lower()}({', '.join(map(text, e.args))})"
        raise NotEmittableError(f"a size given by {e}")

    return text(sympy.expand(expr))


def by_row_number(place: sympy.Expr, rows: tuple[IndexVariable, ...]) -> sympy.Expr:
    """The expression in the number of the row instead of the rows' indices, where that takes none of them."""
    last = [v for v in rows if v.size != 1][-1:]
    if not last or not place.has(*rows):
        return place
    others = [v if v.size != 1 and v != last[0] else sympy.Integer(0) for v in rows]
    rest = linear(others, [v.size for v in rows])
    numbered = sympy.expand(place.xreplace({last[0]: ROW - rest}))
    return place if numbered.has(*rows) else numbered


def _is_max(e: sympy.Expr) -> bool:
    return type(e).__name__ == "Max" and len(e.args) == 2 and sympy.Integer(1) in e.args


def _without_one(e: sympy.Expr) -> sympy.Expr:
    return next(a for a in e.args if a != 1)


def memory_order(value: torch.Tensor) -> tuple[int, ...] | None:
    """The dimensions from outermost to innermost if they fill memory without gaps, else None."""
    shape = shape_of(value)
    # An empty tensor has strides as if its empty dimensions were one: not what decides the layout of others.
    strides = [as_expr(s).replace(_is_max, _without_one) for s in value.stride()]
    identity = tuple(range(len(shape)))
    by_stride = sorted(identity, key=lambda d: -nominal(strides[d]))
    for order in (identity, tuple(by_stride)):
        expected = sympy.Integer(1)
        for d in reversed(order):
            if shape[d] != 1 and sympy.expand(strides[d] - expected) != 0:
                break
            expected = expected * shape[d]
        else:
            return order
    return None


def ordered_place(index: Index, shape: Shape, order: tuple[int, ...]) -> sympy.Expr:
    """The offset of a position in a gapless layout."""
    return linear([index[d] for d in order], [shape[d] for d in order])


def axes(index: Index, column: IndexVariable) -> tuple[bool, bool]:
    """Whether positions differ by row, by column."""
    variables = set().union(*(i.atoms(IndexVariable) for i in index))
    return bool(variables - {column}), column in variables


class Names:
    """What arguments, sizes and indices are called, and which of them a kernel uses."""

    def __init__(self, inputs: list[fx.Node], space: RowSpace) -> None:
        self.space = space
        self.arguments = {n: f"n{i}" if is_size(n) else f"x{i}" for i, n in enumerate(inputs)}
        self.row_indices: set[IndexVariable] = set()
        self.sizes: dict[str, str] = {}  # those the kernel uses: how the launcher finds them
        self.for_launch: dict[str, str] = {}  # those the launcher uses
        self._products: dict[sympy.Expr, str] = {}
        self._found: dict[sympy.Symbol, tuple[str, str]] = {}
        for node, argument in self.arguments.items():
            value = value_of(node)
            if value is None:
                self._find(as_expr(node), argument)
                continue
            for d, n in enumerate(shape_of(value)):
                self._find(n, f"{argument}.shape[{d}]")

    def _find(self, size: sympy.Expr, where: str) -> None:
        if size.is_Symbol and size not in self._found:
            self._found[size] = f"s{len(self._found)}", where

    def of(self, symbol: sympy.Symbol) -> str:
        """The name of a size or an index variable, noted as used."""
        if symbol == ROW:
            return "row"
        if symbol == self.space.column:
            return "col"
        if isinstance(symbol, IndexVariable):
            self.row_indices.add(symbol)
            return symbol.name
        name, where = self._lookup(symbol)
        self.sizes[name] = where
        return name

    def _lookup(self, symbol: sympy.Symbol) -> tuple[str, str]:
        if symbol not in self._found:
            raise NotEmittableError(f"the size {symbol} can not be told from the arguments")
        return self._found[symbol]

    def _for_launch(self, symbol: sympy.Symbol) -> str:
        name, where = self._lookup(symbol)
        self.for_launch[name] = where
        return name

    def _product(self, size: sympy.Expr) -> str:
        if size not in self._products:
            self._products[size] = f"p{len(self._products)}"
            self.sizes[self._products[size]] = self.size(size)
        return self._products[size]

    def size(self, expr: sympy.Expr) -> str:
        """A size in the launcher."""
        return write(expr, self._for_launch)

    def text(self, expr: sympy.Expr) -> str:
        """An index expression or a size in the kernel."""
        return write(by_row_number(expr, self.space.rows), self.of, self._product)
