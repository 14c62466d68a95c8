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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any, cast

import sympy
import torch
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
    divide,
    is_at_least,
    is_below,
    numel,
    operand_index,
    reshape,
    shape_of,
    tidy,
)

aten = torch.ops.aten
prims = torch.ops.prims

MAX_COLUMNS = 16384
MAX_LOADS_OF_ONE_INPUT = 4
MAX_PARTS = 4  # of a row
MIN_PART = 16  # columns: what memory gives at a time, at two bytes each
MAX_REPEATS = 4  # how often as many values of a slow function may be computed as there are

CASTS = frozenset([aten._to_copy.default, prims.convert_element_type.default])


def _overloads(overload: str, names: str) -> list[Any]:
    return [getattr(getattr(aten, name), overload) for name in names.split()]


POINTWISE = CASTS | frozenset(
    [
        *_overloads("Tensor", "add sub mul div remainder bitwise_and bitwise_or eq ne lt le gt ge"),
        *_overloads("Scalar", "add sub mul div remainder rsub eq ne lt le gt ge"),
        *_overloads(
            "default", "abs ceil cos erf exp exp2 floor log log1p log2 neg reciprocal relu"
        ),
        *_overloads("default", "rsqrt sigmoid sign sin sqrt square tanh isinf isnan"),
        *_overloads("default", "logical_and logical_not logical_or bitwise_not"),
        *_overloads("default", "maximum minimum clamp clamp_min clamp_max"),
        aten.true_divide.Tensor,
        aten.pow.Tensor_Scalar,
        aten.where.self,
    ]
)
# Many instructions, with a branch for large arguments: computed once rather than wherever they are broadcast to.
SLOW = frozenset([aten.cos.default, aten.sin.default])
REDUCTIONS = frozenset([aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default])
CHOICES = frozenset(
    [
        aten.cat.default,
        aten.slice_scatter.default,
        aten.select_scatter.default,
        aten.constant_pad_nd.default,
    ]
)
# Values that need no memory: made again wherever they are used.
CONSTANTS: dict[Any, Callable[[fx.Node], Any]] = {
    aten.full.default: lambda node: node.args[1],
    aten.full_like.default: lambda node: node.args[1],
    aten.scalar_tensor.default: lambda node: node.args[0],
    aten.zeros.default: lambda node: 0,
    aten.zeros_like.default: lambda node: 0,
    aten.ones.default: lambda node: 1,
    aten.ones_like.default: lambda node: 1,
}
RANGES: dict[Any, Callable[[fx.Node], tuple[Any, Any]]] = {
    aten.arange.default: lambda node: (0, 1),
    aten.arange.start: lambda node: (node.args[0], 1),
    aten.arange.start_step: lambda node: (node.args[0], (*node.args, 1)[2]),
    prims.iota.default: lambda node: (node.kwargs["start"], node.kwargs["step"]),
}
# Nothing to compute and nothing to keep: copied into every region that reads through them.
FREE = frozenset([*VIEWS, *CONSTANTS, *RANGES])


def total(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum ``[C]`` of all rows of ``x [..., C]``, rounded once; a kernel adds up some rows, a second one these sums."""
    return x.sum(tuple(range(x.dim() - 1))).to(dtype)


TOTALS = frozenset([total])
# Reads at places that a tensor of integers says; known where these follow from the position.
LOOKUPS = frozenset([aten.index.Tensor])
COMPUTE = frozenset([*POINTWISE, *REDUCTIONS, *TOTALS, *CHOICES, *COPIES, *LOOKUPS])
DTYPES = frozenset(
    [
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
    ]
)


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


class _NoRowSpaceError(Exception):
    pass


def value_of(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor of a node, or None where it stands for anything else."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def is_size(node: fx.Node) -> bool:
    """Whether a node holds a size (an int of the graph) and not a tensor."""
    return isinstance(node.meta.get("val"), (int, torch.SymInt)) and not isinstance(
        node.meta["val"], bool
    )


def is_known(node: fx.Node) -> bool:
    """Whether a node is an operation that can be evaluated in a row space, by its operator and operands alone."""
    if node.op != "call_function" or node.target not in COMPUTE | FREE:
        return False
    value = value_of(node)
    if value is None or value.dtype not in DTYPES or value.layout is not torch.strided:
        return False
    for operand in node.all_input_nodes:
        tensor = value_of(operand)
        if tensor is None and not is_size(operand):
            return False
        if tensor is not None and (tensor.dtype not in DTYPES or tensor.device != value.device):
            return False
    if node.target in LOOKUPS:
        index = tuple(IndexVariable(f"i{d}", n) for d, n in enumerate(shape_of(value)))
        return looked_up(node, index) is not None
    allowed: dict[Any, set[str]] = {
        # Layout and device are those of the operand (above); any order in memory can be written.
        aten._to_copy.default: {"dtype", "layout", "device", "memory_format"},
        aten.add.Tensor: {"alpha"},
        aten.sub.Tensor: {"alpha"},
        aten.clone.default: {"memory_format"},
        aten.sum.dim_IntList: {"dtype"},
        aten.mean.dim: {"dtype"},
    }
    if node.target in FREE and node.target not in VIEWS:
        return True
    return set(node.kwargs) <= allowed.get(node.target, set())


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
        return _whole(_operand(node), operand_index(node, index))
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


def row_space(members: Iterable[fx.Node], outputs: Sequence[fx.Node]) -> RowSpace | None:
    """The row space that evaluates ``outputs`` from whatever ``members`` read, or None where none was found."""
    inside = set(members)
    shapes: list[Shape] = []
    reductions = [n for n in inside if n.target in REDUCTIONS]
    sums = [n for n in outputs if n.target in TOTALS]
    results = [n for n in outputs if n.target not in TOTALS]
    for node in sorted(reductions) or sorted(results, key=_nominal_numel, reverse=True) or sums:
        if node.target in REDUCTIONS | TOTALS:
            operand = node.args[0]
            assert isinstance(operand, fx.Node)
            shape = shape_of(operand.meta["val"])
        else:
            shape = shape_of(node.meta["val"])
        if shape not in shapes:
            shapes.append(shape)
    for (
        output
    ) in results:  # the same rows, cut up as an output has them, may be what permutations need
        shape = shape_of(output.meta["val"])
        if reductions and shape not in shapes and shape and shape[-1] == shapes[0][-1]:
            shapes.append(shape)
    for shape in shapes[:6]:
        parts = 1 if reductions or sums or not shape else _parts(inside, shape[-1])
        for n in dict.fromkeys((parts, 1)):
            try:
                space = _Planner(inside, shape, bool(reductions), n).plan(outputs)
            except _NoRowSpaceError:
                continue
            if n == 1 or not any(s.kind == "choose" for s in space.steps):
                return space
    return None


def _parts(inside: set[fx.Node], columns: sympy.Expr) -> int:
    """Into how many equal parts concatenations and scatters cut rows."""
    if not columns.is_Integer or columns < 2 * MIN_PART:
        return 1
    width = int(columns)
    for node in inside:
        for cut in _cuts(node, columns):
            width = gcd(width, int(cut)) if cut.is_Integer else 1
    parts = int(columns) // width
    return parts if width >= MIN_PART and parts <= MAX_PARTS else 1


def _cuts(node: fx.Node, columns: sympy.Expr) -> list[sympy.Expr]:
    """Where, or how far apart, a concatenation or scatter cuts rows of so many columns."""
    if node.target not in (aten.cat.default, aten.slice_scatter.default):
        return []
    shape = shape_of(node.meta["val"])
    last = len(shape) - 1
    if not shape or shape[-1] != columns:
        return []
    if node.target is aten.cat.default:
        pieces: Any = node.args[0]
        sizes = [shape_of(p.meta["val"]) for p in pieces]
        return [s[-1] for s in sizes] if _axis(node, 1, 0, len(shape)) == last else []
    source: Any = node.args[1]
    start = as_expr((*node.args, None, None)[3] or 0)
    size = shape_of(source.meta["val"])[-1]
    return [start, size] if _axis(node, 2, 0, len(shape)) == last else []


def _nominal_numel(node: fx.Node) -> int:
    return nominal(numel(shape_of(node.meta["val"])))


@cache
def nominal(expr: sympy.Expr) -> int:
    """A size with 1024 for every symbol: decisions must not depend on the shapes of the first call."""
    return int(expr.xreplace({symbol: sympy.Integer(1024) for symbol in expr.free_symbols}))


class _Planner:
    def __init__(self, inside: set[fx.Node], shape: Shape, whole_rows: bool, parts: int) -> None:
        self.inside = inside
        self.parts = parts
        *rows, columns = shape or (sympy.Integer(1),)
        self.rows = tuple(IndexVariable(f"r{i}", n) for i, n in enumerate(rows))
        self.column = IndexVariable("c", columns / parts)
        self.shape: Shape = (*rows, columns)
        self.whole_rows = whole_rows
        if whole_rows and not (columns.is_Integer and 0 < columns <= MAX_COLUMNS):
            raise _NoRowSpaceError
        self.steps: list[Step] = []
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
        operand = _operand(node)
        shape = shape_of(operand.meta["val"])
        if numel(shape) != numel(self.shape):
            raise _NoRowSpaceError
        index = self.onto.get(operand) or self.place(shape)
        *rows, column = index
        if column != self.everywhere[-1] or any(i.has(self.column) for i in rows):
            raise _NoRowSpaceError
        value = self.value(operand, index, frozenset(), True)
        return Store(node, value, (column,), total=True)

    def place(self, shape: Shape) -> Index:
        """The position in an output of this shape that belongs to the place in the row space."""
        if numel(shape) == numel(self.shape):
            return reshape(self.everywhere, self.shape, shape)
        if numel(shape) == numel(self.shape[:-1]):
            return reshape(self.everywhere[:-1], self.shape[:-1], shape)
        raise _NoRowSpaceError

    def add(self, kind: str, node: fx.Node, **fields: Any) -> Ref:
        args: tuple[Any, ...] = fields.get("args", ())
        refs = [self.steps[a] for a in args if isinstance(a, Ref)]
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
        self.steps.append(
            Step(kind, node, tensor.dtype, by_row=by_row, by_column=by_column, **fields)
        )
        return Ref(len(self.steps) - 1)

    def value(self, node: fx.Node, index: Index, guard: Guard, onto: bool) -> Ref:
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
                raise _NoRowSpaceError
            return self.add("load", node, index=index, guard=guard)
        if node.target in VIEWS or node.target in COPIES:
            operand = _operand(node)
            at = operand_index(node, index)
            return self.value(operand, at, guard, onto and node.target in BIJECTIVE)
        if node.target in CONSTANTS:
            return self.add("constant", node, args=(_number(CONSTANTS[node.target](node)),))
        if node.target in RANGES:
            start, step = RANGES[node.target](node)
            if not all(isinstance(_number(x), (int, sympy.Expr)) for x in (start, step)):
                raise _NoRowSpaceError
            return self.add("index", node, args=(as_expr(start) + as_expr(step) * index[0],))
        if node.target in LOOKUPS:
            place = looked_up(node, index)
            if place is None:
                raise _NoRowSpaceError
            return self.value(_operand(node), place, guard, False)
        if node.target in TOTALS:  # known when all rows are done
            raise _NoRowSpaceError
        if node.target in REDUCTIONS:
            return self.reduce(node, index, guard)
        if node.target in CHOICES:
            return self.choose(node, index, guard)
        return self.pointwise(node, index, guard, onto)

    def pointwise(self, node: fx.Node, index: Index, guard: Guard, onto: bool) -> Ref:
        shape = shape_of(node.meta["val"])

        def operand(arg: Any) -> Any:
            if isinstance(arg, fx.Node) and not is_size(arg):
                of = shape_of(arg.meta["val"])
                return self.value(arg, broadcast(index, of), guard, onto and of == shape)
            return _number(arg)

        args = [operand(arg) for arg in node.args]
        if "alpha" in node.kwargs:
            args.append(_number(node.kwargs["alpha"]))
        made = self.add("pointwise", node, args=tuple(args))
        each = self.steps[made].by_row and self.steps[made].by_column
        if node.target in SLOW and each and self.positions > MAX_REPEATS * nominal(numel(shape)):
            raise _NoRowSpaceError  # cheaper as two kernels
        return made

    def reduce(self, node: fx.Node, index: Index, guard: Guard) -> Ref:
        operand = _operand(node)
        shape = shape_of(operand.meta["val"])
        axes: Any = node.args[1] if len(node.args) > 1 else None
        if not shape or not axes or [a % len(shape) for a in axes] != [len(shape) - 1]:
            raise _NoRowSpaceError
        keep = len(node.args) > 2 and bool(node.args[2])
        outer = index[:-1] if keep else index
        if shape[-1] != self.column.size or any(i.has(self.column) for i in outer):
            raise _NoRowSpaceError
        if node in self.reduced:  # the same row sums at two positions: cheaper as two kernels
            raise _NoRowSpaceError
        self.reduced.add(node)
        of_rows = frozenset(b for b in guard if not b.index.has(self.column))
        # A reduction of part of the rows (a broadcast row, say) does not read every position once.
        onto = numel(shape) == numel(self.shape) and len(shape) == len(self.shape)
        source = self.value(operand, (*outer, self.everywhere[-1]), of_rows, onto and not of_rows)
        return self.add("reduce", node, args=(source,))

    def choose(self, node: fx.Node, index: Index, guard: Guard) -> Ref:
        """The part of a concatenation, padding or scatter that a position falls into."""
        shape = shape_of(node.meta["val"])
        if node.target is aten.cat.default:
            parts: Any = node.args[0]
            axis = _axis(node, 1, 0, len(shape))
            parts = [p for p in parts if shape_of(p.meta["val"]) != (0,)]
            return self.choose_part(node, parts, axis, index, guard)
        if node.target is aten.constant_pad_nd.default:
            return self.padded(node, index, guard)
        axis = _axis(node, 2, 0, len(shape))
        source: Any = node.args[1]
        if node.target is aten.select_scatter.default:
            start = as_expr(node.args[3])
            size = sympy.Integer(1)
            inner = index[:axis] + index[axis + 1 :]
        else:
            _, _, _, first, _, step = (*node.args, *(None,) * 6)[:6]
            if step not in (None, 1):
                raise _NoRowSpaceError
            start = as_expr(0 if first is None else first)
            size = shape_of(source.meta["val"])[axis]
        if start.is_negative:
            start = start + shape[axis]
        if node.target is aten.slice_scatter.default:
            inner = (*index[:axis], tidy(index[axis] - start), *index[axis + 1 :])
        bound = Bound(index[axis], start, start + size)
        return self.choice(
            node,
            bound,
            lambda g: self.value(source, inner, g, False),
            lambda: self.value(_operand(node), index, guard, False),
            guard,
        )

    def choose_part(
        self, node: fx.Node, parts: Sequence[fx.Node], axis: int, index: Index, guard: Guard
    ) -> Ref:
        first, *rest = parts
        size = shape_of(first.meta["val"])[axis]
        if not rest:
            return self.value(first, index, guard, False)
        after = (*index[:axis], tidy(index[axis] - size), *index[axis + 1 :])
        zero = sympy.Integer(0)
        others = Bound(after[axis], zero, _rest(rest, axis))
        beyond = guard if _holds(others) else guard | {others}
        return self.choice(
            node,
            Bound(index[axis], zero, size),
            lambda g: self.value(first, index, g, False),
            lambda: self.choose_part(node, rest, axis, after, beyond),
            guard,
        )

    def padded(self, node: fx.Node, index: Index, guard: Guard) -> Ref:
        operand = _operand(node)
        shape = shape_of(operand.meta["val"])
        pads: Any = node.args[1]
        fill = _number((*node.args, 0)[2])
        at = list(index)
        bounds = []
        for k in range(len(pads) // 2):
            axis = len(shape) - 1 - k
            at[axis] = tidy(index[axis] - as_expr(pads[2 * k]))
            if pads[2 * k] != 0 or pads[2 * k + 1] != 0:
                bounds.append(Bound(at[axis], sympy.Integer(0), shape[axis]))
        value = self.value(operand, tuple(at), guard | frozenset(bounds), False)
        outside = self.add("constant", node, args=(fill,))
        for bound in bounds:
            value = self.add("choose", node, args=(bound, value, outside))
        return value

    def choice(
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
        return self.add("choose", node, args=(bound, inner(guard | {bound}), outer()))


def _holds(bound: Bound) -> bool:
    """Whether a bound is known to hold everywhere."""
    return is_at_least(bound.index, bound.low) and is_below(bound.index, bound.high)


def _rest(parts: Sequence[fx.Node], axis: int) -> sympy.Expr:
    return sympy.Add(*(shape_of(p.meta["val"])[axis] for p in parts))


def _operand(node: fx.Node) -> fx.Node:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand


def _axis(node: fx.Node, position: int, default: int, rank: int) -> int:
    axis = node.args[position] if len(node.args) > position else default
    assert isinstance(axis, int)
    return axis % rank


def _number(arg: Any) -> Any:
    """A plain number, or the expression of a size; None and dtypes pass."""
    if isinstance(arg, (fx.Node, torch.SymInt)):
        if isinstance(arg, fx.Node) and not is_size(arg):
            raise _NoRowSpaceError
        return as_expr(arg)
    return arg
