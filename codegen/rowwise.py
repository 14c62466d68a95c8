"""A Triton kernel for a fused region: one pass over rows.

::

    @triton.jit
    def fused_mul_mean_add(x0, y0, rows, ROWS: tl.constexpr, COLS: tl.constexpr):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        col = tl.arange(0, COLS)[None, :]
        ...
        mul_0 = load_0 * load_0
        mean_0 = tl.sum(tl.where(col_ok, mul_0, 0), 1, keep_dims=True) / 768
        ...

    def launch(x0):
        ...

Values are held in float32 (float64 where torch would), and rounded where they are stored or cast.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from tttc.codegen.rowwise_index import Names, axes, memory_order, ordered_place
from tttc.codegen.rowwise_ops import NAMES, NotEmittableError, cast, computed_as, literal, pointwise
from tttc.codegen.rowwise_source import Body, Grid, kernel_file

from tttc.ir.index_maps import Index, is_at_least, is_below, shape_of
from tttc.ir.node_values import is_size
from tttc.ir.row_space import row_space
from tttc.ir.row_steps import Bound, Ref, RowSpace, Step, Store

aten = torch.ops.aten


@dataclass(frozen=True)
class Emitted:
    """A kernel's name, its file and its launch options."""

    name: str
    source: str
    config: dict[str, int]


def emit(region: fx.GraphModule) -> Emitted:
    """The kernel of a region; raises :class:`NotEmittableError` where there is none."""
    inputs, nodes, outputs = parts(region.graph)
    if all(is_size(n) for n in inputs):
        raise NotEmittableError("nothing is read that says which device to run on")
    space = row_space(nodes, outputs)
    if space is None:
        raise NotEmittableError("no row space")
    names, grid = Names(inputs, space), Grid(space)
    statements = _Statements(names, grid, space)
    body = statements.body(outputs)
    labels = [k for k in statements.counts if k not in ("load", "constant", "index")]
    name = "_".join(["fused", *labels[:5]])
    return Emitted(name, kernel_file(name, names, grid, body, outputs), grid.config)


def parts(graph: fx.Graph) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]]:
    """Inputs, operations and outputs of a region's graph."""
    (result,) = graph.output_node().args
    outputs: Any = [result] if isinstance(result, fx.Node) else result
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    return inputs, [n for n in graph.nodes if n.op == "call_function"], list(outputs)


class _Statements:
    """The lines of a kernel, one for each step."""

    def __init__(self, names: Names, grid: Grid, space: RowSpace) -> None:
        self.names = names
        self.grid = grid
        self.space = space
        self.counts: Counter[str] = Counter()
        self.values: list[str] = []  # the variable of each step
        self.blocks: list[bool] = []  # whether it is a block (of one, maybe) rather than a scalar
        self.strides: dict[str, str] = {}
        self.packed: set[str] = set()
        self.read: dict[str, None] = {}

    def body(self, outputs: list[fx.Node]) -> Body:
        lines = []
        for step in self.space.steps:
            label = step.kind
            if label in ("pointwise", "reduce"):
                label = step.node.target._schema.name.split("::")[1].strip("_")  # type: ignore[union-attr]
            text = getattr(self, step.kind)(step)
            self.values.append(f"{label}_{self.counts[label]}")
            self.counts[label] += 1
            refs = [a for a in step.args if isinstance(a, Ref)]
            self.blocks.append(step.by_row or step.by_column or any(self.blocks[r] for r in refs))
            lines.append(f"{self.values[-1]} = {text}")
        totals = {}
        for store in self.space.stores:
            pointer = f"y{outputs.index(store.node)}"
            if store.total:
                value = self.values[store.value]
                totals[pointer] = (value, NAMES[self.held(store.value)])
            else:
                lines.append(self.store(pointer, store))
        order = list(self.names.arguments.values())
        read = sorted(self.read, key=order.index)
        return Body(lines, read, self.packed, self.strides, totals)

    def operand(self, step: Step, i: int, dtype: torch.dtype) -> str:
        arg = step.args[i]
        if isinstance(arg, Ref):
            return cast(self.values[arg], self.held(arg), dtype)
        if isinstance(arg, sympy.Expr):
            return f"({self.names.text(arg)})"
        return literal(arg, dtype)

    def held(self, ref: int) -> torch.dtype:
        return computed_as(self.space.steps[ref].dtype)

    def address(
        self, node: fx.Node, pointer: str, index: Index, order: tuple[int, ...] | None
    ) -> str:
        """Pointer plus offset; by strides where no gapless layout is known."""
        shape = shape_of(node.meta["val"])
        if order is not None:
            place = self.names.text(ordered_place(index, shape, order))
            return pointer if place == "0" else f"{pointer} + {place}"
        terms = [pointer]
        for d, i in enumerate(index):
            if i != 0:
                stride = f"{pointer}_stride{d}"
                self.strides[stride] = f"{pointer}.stride({d})"
                place = self.names.text(i)
                terms.append(f"({place}) * {stride}" if " " in place else f"{place} * {stride}")
        return " + ".join(terms)

    def mask(self, by_row: bool, by_column: bool, guards: frozenset[Bound] = frozenset()) -> str:
        terms = []
        if by_row and self.grid.rows > 1:
            terms.append("row_ok")
        if by_column and self.grid.masked:
            terms.append("col_ok")
        for bound in sorted(guards, key=str):
            row, column = axes((bound.index,), self.space.column)
            # A position that does not move along an axis is in range wherever the guard puts it on that axis.
            if row <= by_row and column <= by_column:
                terms.append(self.condition(bound))
        return " & ".join(dict.fromkeys(t for t in terms if t))

    def condition(self, bound: Bound) -> str:
        """The sides of a bound that are not known to hold."""
        index = self.names.text(bound.index)
        sides = []
        if not is_at_least(bound.index, bound.low):
            sides.append(f"({index} >= {self.names.text(bound.low)})")
        if not is_below(bound.index, bound.high):
            sides.append(f"({index} < {self.names.text(bound.high)})")
        return " & ".join(sides)

    def load(self, step: Step) -> str:
        pointer = self.names.arguments[step.node]
        self.read[pointer] = None
        order = memory_order(step.node.meta["val"])
        if order == tuple(range(len(step.index))):
            self.packed.add(pointer)
        else:
            order = None
        address = self.address(step.node, pointer, step.index, order)
        by_row, by_column = axes(step.index, self.space.column)
        mask = self.mask(by_row, by_column, step.guard)
        loaded = f"tl.load({address}, mask={mask}, other=0)" if mask else f"tl.load({address})"
        return cast(loaded, step.dtype, computed_as(step.dtype))

    def pointwise(self, step: Step) -> str:
        held = [self.held(a) for a in step.args if isinstance(a, Ref)]
        return pointwise(step, lambda i, dtype: self.operand(step, i, dtype), held)

    def constant(self, step: Step) -> str:
        dtype = computed_as(step.dtype)
        text = self.operand(step, 0, dtype)
        return text if text.startswith("tl.full") else f"tl.full((), {text}, {NAMES[dtype]})"

    def index(self, step: Step) -> str:
        if not step.by_row and not step.by_column:
            return self.constant(step)
        return f"{self.operand(step, 0, torch.int64)}.to({NAMES[computed_as(step.dtype)]})"

    def choose(self, step: Step) -> str:
        dtype = computed_as(step.dtype)
        condition = self.condition(step.args[0])
        return (
            f"tl.where({condition}, {self.operand(step, 1, dtype)}, {self.operand(step, 2, dtype)})"
        )

    def reduce(self, step: Step) -> str:
        dtype = computed_as(step.dtype)
        value = self.operand(step, 0, dtype)
        target = step.node.target
        columns = int(self.space.column.size)
        if not self.space.steps[step.args[0]].by_column:  # the same in all columns
            return f"{value} * {columns}" if target is aten.sum.dim_IntList else value
        if target in (aten.sum.dim_IntList, aten.mean.dim):
            padded = f"tl.where(col_ok, {value}, 0)" if self.grid.masked else value
            total = f"tl.sum({padded}, 1, keep_dims=True)"
            return total if target is aten.sum.dim_IntList else f"{total} / {columns}"
        if not dtype.is_floating_point:
            raise NotEmittableError("an extremum of integers")
        helper, empty = ("nan_max", -1) if target is aten.amax.default else ("nan_min", 1)
        if self.grid.masked:
            value = f"tl.where(col_ok, {value}, {literal(empty * float('inf'), dtype)})"
        return f"tl.reduce({value}, 1, {helper}, keep_dims=True)"

    def store(self, pointer: str, store: Store) -> str:
        tensor = store.node.meta["val"]
        by_row, by_column = axes(store.index, self.space.column)
        mask = self.mask(by_row, by_column)
        if self.grid.blocked and not by_column:  # by one block of columns, not by all
            mask = " & ".join(filter(None, [mask, "(block == 0)"]))
        value = cast(self.values[store.value], self.held(store.value), computed_as(tensor.dtype))
        if not by_row and not by_column and self.blocks[store.value]:
            value = f"tl.sum(tl.sum({value}, 1), 0)"  # a scalar address takes a scalar, not a block of one
        order = memory_order(tensor) or tuple(range(tensor.dim()))
        address = self.address(store.node, pointer, store.index, order)
        return f"tl.store({address}, {value}{f', mask={mask}' if mask else ''})"
