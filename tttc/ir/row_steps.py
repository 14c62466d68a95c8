"""What a row space consists of: values step by step, where they are read, and where they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from tttc.ir.index_maps import Index, IndexVariable, as_expr
from tttc.ir.node_values import is_size, value_of


class NoRowSpaceError(Exception):
    """Rows of this kind can't evaluate what is asked for."""


class Ref(int):
    """The number of a step, where a step's operands may also be plain numbers."""


@dataclass(frozen=True)
class Bound:
    """``low <= index < high``."""

    index: sympy.Expr
    low: sympy.Expr
    high: sympy.Expr


Guard = frozenset[Bound]


@dataclass(frozen=True)
class Step:
    """One value in the row space: ``load``, ``pointwise``, ``reduce``, ``choose``, ``index`` or ``constant``.

    ``args`` are :class:`Ref` to earlier steps, numbers, or expressions in sizes and index variables.
    """

    kind: str
    node: fx.Node
    dtype: torch.dtype
    args: tuple[Any, ...] = ()
    index: Index = ()
    guard: Guard = frozenset()
    by_row: bool = False  # whether the value differs from row to row, from column to column
    by_column: bool = False


@dataclass(frozen=True)
class Store:
    """An output: the step that computes it and the position it belongs at; ``total`` where all rows add up to it."""

    node: fx.Node
    value: Ref
    index: Index
    total: bool = False


@dataclass(frozen=True)
class RowSpace:
    """Everything an emitter has to print."""

    rows: tuple[IndexVariable, ...]
    column: IndexVariable
    whole_rows: bool  # a program must see all columns of its rows, because there are reductions
    steps: tuple[Step, ...]
    stores: tuple[Store, ...]


class Steps(list[Step]):
    """The steps of a row space as they are made."""

    def __init__(self, column: IndexVariable) -> None:
        super().__init__()
        self.column = column

    def make(self, kind: str, node: fx.Node, **fields: Any) -> Ref:
        """A step at the end; whether it differs by row and by column follows from what it reads."""
        args: tuple[Any, ...] = fields.get("args", ())
        refs = [self[a] for a in args if isinstance(a, Ref)]
        exprs = [*fields.get("index", ()), *(a for a in args if isinstance(a, sympy.Expr))]
        exprs += [bound.index for bound in fields.get("guard", ())]
        exprs += [a.index for a in args if isinstance(a, Bound)]
        variables = set().union(*(e.atoms(IndexVariable) for e in exprs)) if exprs else set()
        by_column = self.column in variables or any(s.by_column for s in refs)
        by_row = bool(variables - {self.column}) or any(s.by_row for s in refs)
        if kind == "reduce":
            by_column = False
        tensor = value_of(node)
        assert tensor is not None
        self.append(Step(kind, node, tensor.dtype, by_row=by_row, by_column=by_column, **fields))
        return Ref(len(self) - 1)


def number_of(arg: Any) -> Any:
    """A plain number, or the expression of a size; None and dtypes pass."""
    if isinstance(arg, (fx.Node, torch.SymInt)):
        if isinstance(arg, fx.Node) and not is_size(arg):
            raise NoRowSpaceError
        return as_expr(arg)
    return arg
