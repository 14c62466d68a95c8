"""Evaluating a graph in rows: from the outputs to what they read, each node at the positions its users read it at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch import fx

from tttc.ir.index_maps import (
    BIJECTIVE,
    COPIES,
    VIEWS,
    Index,
    IndexVariable,
    Shape,
    as_expr,
    broadcast,
    numel,
    operand_index,
    reshape,
    shape_of,
)
from tttc.ir.lookups import looked_up
from tttc.ir.node_values import is_size, operand_of
from tttc.ir.nominal import nominal
from tttc.ir.row_choices import Choices
from tttc.ir.row_operators import CHOICES, CONSTANTS, LOOKUPS, RANGES, REDUCTIONS, SLOW, TOTALS
from tttc.ir.row_steps import Guard, NoRowSpaceError, Ref, RowSpace, Steps, Store, number_of

MAX_COLUMNS = 16384
MAX_LOADS_OF_ONE_INPUT = 4
MAX_REPEATS = 4  # how often as many values of a slow function may be computed as there are


class Planner:
    """Evaluates nodes at the positions they are read at, in rows of one shape."""

    def __init__(self, inside: set[fx.Node], shape: Shape, whole_rows: bool, parts: int) -> None:
        self.inside = inside
        self.parts = parts
        *rows, columns = shape or (sympy.Integer(1),)
        self.rows = tuple(IndexVariable(f"r{i}", n) for i, n in enumerate(rows))
        self.column = IndexVariable("c", columns / parts)
        self.shape: Shape = (*rows, columns)
        self.whole_rows = whole_rows
        if whole_rows and not (columns.is_Integer and 0 < columns <= MAX_COLUMNS):
            raise NoRowSpaceError
        self.steps = Steps(self.column)
        zero = sympy.Integer(0)
        self.everywhere: Index = tuple(
            zero if v.size == 1 else v for v in (*self.rows, self.column)
        )
        self.positions = nominal(numel(self.shape))
        self.memo: dict[Any, Ref] = {}
        self.onto: dict[fx.Node, Index] = {}  # where a node is read once at each of its positions
        self.reduced: set[fx.Node] = set()
        self.loads: dict[fx.Node, int] = {}

    def plan(self, outputs: Sequence[fx.Node]) -> RowSpace:
        stores = []
        *rows, column = self.everywhere
        for part in range(self.parts):
            self.everywhere = (*rows, column + part * self.column.size)
            self.onto = {}
            for node in sorted(
                outputs, reverse=True
            ):  # users first, so that their reads place what they read
                if node.target in TOTALS:
                    stores.append(self.total(node))
                    continue
                index = self.onto.get(node) or self.place(shape_of(node.meta["val"]))
                if part == 0 or any(i.has(self.column) for i in index):
                    value = self.value(node, index, frozenset(), True)
                    stores.append(Store(node, value, index))
        order = {node: i for i, node in enumerate(outputs)}
        stores.sort(key=lambda s: order[s.node])
        return RowSpace(self.rows, self.column, self.whole_rows, tuple(self.steps), tuple(stores))

    def total(self, node: fx.Node) -> Store:
        operand = operand_of(node)
        shape = shape_of(operand.meta["val"])
        if numel(shape) != numel(self.shape):
            raise NoRowSpaceError
        index = self.onto.get(operand) or self.place(shape)
        *rows, column = index
        if column != self.everywhere[-1] or any(i.has(self.column) for i in rows):
            raise NoRowSpaceError
        value = self.value(operand, index, frozenset(), True)
        return Store(node, value, (column,), total=True)

    def place(self, shape: Shape) -> Index:
        """The position in an output of this shape that belongs to the place in the row space."""
        if numel(shape) == numel(self.shape):
            return reshape(self.everywhere, self.shape, shape)
        if numel(shape) == numel(self.shape[:-1]):
            return reshape(self.everywhere[:-1], self.shape[:-1], shape)
        raise NoRowSpaceError

    def value(self, node: fx.Node, index: Index, guard: Guard, onto: bool = False) -> Ref:
        """The step that holds ``node`` at a position; ``onto`` where all its positions are read, each once."""
        if onto:
            self.onto.setdefault(node, index)
        key = (node, index, guard)
        if key not in self.memo:
            self.memo[key] = self.evaluate(node, index, guard, onto)
        return self.memo[key]

    def evaluate(self, node: fx.Node, index: Index, guard: Guard, onto: bool) -> Ref:
        if node not in self.inside:
            self.loads[node] = self.loads.get(node, 0) + 1
            if self.loads[node] > MAX_LOADS_OF_ONE_INPUT:
                raise NoRowSpaceError
            return self.steps.make("load", node, index=index, guard=guard)
        if node.target in VIEWS or node.target in COPIES:
            operand = operand_of(node)
            at = operand_index(node, index)
            return self.value(operand, at, guard, onto and node.target in BIJECTIVE)
        if node.target in CONSTANTS:
            return self.steps.make(
                "constant", node, args=(number_of(CONSTANTS[node.target](node)),)
            )
        if node.target in RANGES:
            start, step = RANGES[node.target](node)
            if not all(isinstance(number_of(x), (int, sympy.Expr)) for x in (start, step)):
                raise NoRowSpaceError
            return self.steps.make("index", node, args=(as_expr(start) + as_expr(step) * index[0],))
        if node.target in LOOKUPS:
            place = looked_up(node, index)
            if place is None:
                raise NoRowSpaceError
            return self.value(operand_of(node), place, guard)
        if node.target in TOTALS:  # known when all rows are done
            raise NoRowSpaceError
        if node.target in REDUCTIONS:
            return self.reduce(node, index, guard)
        if node.target in CHOICES:
            return Choices(self.steps, self.value).choose(node, index, guard)
        return self.pointwise(node, index, guard, onto)

    def pointwise(self, node: fx.Node, index: Index, guard: Guard, onto: bool) -> Ref:
        shape = shape_of(node.meta["val"])

        def operand(arg: Any) -> Any:
            if isinstance(arg, fx.Node) and not is_size(arg):
                of = shape_of(arg.meta["val"])
                return self.value(arg, broadcast(index, of), guard, onto and of == shape)
            return number_of(arg)

        args = [operand(arg) for arg in node.args]
        if "alpha" in node.kwargs:
            args.append(number_of(node.kwargs["alpha"]))
        made = self.steps.make("pointwise", node, args=tuple(args))
        each = self.steps[made].by_row and self.steps[made].by_column
        if node.target in SLOW and each and self.positions > MAX_REPEATS * nominal(numel(shape)):
            raise NoRowSpaceError  # cheaper as two kernels
        return made

    def reduce(self, node: fx.Node, index: Index, guard: Guard) -> Ref:
        operand = operand_of(node)
        shape = shape_of(operand.meta["val"])
        axes: Any = node.args[1] if len(node.args) > 1 else None
        if not shape or not axes or [a % len(shape) for a in axes] != [len(shape) - 1]:
            raise NoRowSpaceError
        keep = len(node.args) > 2 and bool(node.args[2])
        outer = index[:-1] if keep else index
        if shape[-1] != self.column.size or any(i.has(self.column) for i in outer):
            raise NoRowSpaceError
        if node in self.reduced:  # the same row sums at two positions: cheaper as two kernels
            raise NoRowSpaceError
        self.reduced.add(node)
        of_rows = frozenset(b for b in guard if not b.index.has(self.column))
        # A reduction of part of the rows (a broadcast row, say) does not read every position once.
        onto = numel(shape) == numel(self.shape) and len(shape) == len(self.shape)
        source = self.value(operand, (*outer, self.everywhere[-1]), of_rows, onto and not of_rows)
        return self.steps.make("reduce", node, args=(source,))
