"""Rendering a :class:`~tttc.codegen.loop.Loop` as a Triton kernel a person can read."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx
from tttc.codegen.kernel import Kernel
from tttc.codegen.loop import Loop, Sink, Source, used
from tttc.codegen.ordering import least_live, products_first
from tttc.codegen.schedule import Schedule
from tttc.codegen.triton_functions import FUNCTIONS, RECIPROCAL, number
from tttc.codegen.triton_solve import INVERSE, triangular_solve

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, operands_of, spec_of
from tttc.ir.build import dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.functions import FUNCTIONS as IR_FUNCTIONS
from tttc.ir.spec import Dims, parse, parse_relation

RELATED = (ops.masked_contraction, ops.masked, ops.running_product, ops.triangular_solve)
log = logging.getLogger("tttc.schedule")
LARGEST_BROADCAST = 1 << 17  # elements of a broadcast product that registers can hold for a moment


def padded(size: int, least: int = 1) -> int:
    """The next power of two, at least ``least``: what a tile's side must be."""
    return max(least, 1 << (size - 1).bit_length())


@dataclass
class Tile:
    """A variable of the kernel: its name, what its axes are, and along which it is zero beyond the size."""

    name: str
    dims: Dims
    zero: frozenset[str] = frozenset()


def base(dim: str) -> str:
    """The dimension a numbered copy stands for: ``s1`` for ``s``."""
    return dim.rstrip("0123456789") if dim.rstrip("0123456789") in (TOKEN, EARLIER) else dim


class Renderer:
    """Renders one loop under one schedule."""

    def __init__(self, loop: Loop, schedule: Schedule) -> None:
        self.loop = loop
        self.schedule = schedule
        self.lines: list[str] = []
        self.indent = 1
        self.tiles: dict[fx.Node, Tile] = {}
        self.counter = 0
        self.arguments: list[str] = []
        self.strides: dict[str, list[str]] = {}
        self.inverses: dict[
            Any, tuple[Tile, Tile]
        ] = {}  # of triangular systems, by system and relation
        self.values: dict[str, tuple[int, ...]] = {}  # shapes of what passes between kernels
        self.used = used(loop)
        self.results: dict[fx.Node, list[Sink]] = {}  # where nodes go, but for new states
        for node, sink in loop.sinks:
            if sink.kind != "state":
                self.results.setdefault(node, []).append(sink)
        self.dims = self._dims()
        self.dotted = self._dotted()
        self.repeated, self.repeats = self._repeated()

    # -- what is needed ------------------------------------------------------------------------------

    def _dims(self) -> list[str]:
        found: dict[str, None] = {}
        for node in self.loop.graph.nodes:
            if node in self.used:
                labels = parse(spec_of(node)).labels if node.op == "call_function" else ()
                for d in (*dims_of(node), *labels):
                    found.setdefault(d)
                if node.target in RELATED:
                    r = parse_relation(node.args[0])
                    found.setdefault(r.later)
                    found.setdefault(r.earlier)
        kept = {
            d
            for node, source in self.loop.sources.items()
            if source.kind not in ("token", "value")
            for d in dims_of(node)
        }
        # A token that is a tile brings its own dimension; no state or parameter has it.
        tokens = [d for d in found if base(d) in (TOKEN, EARLIER) or d not in kept]
        features = [d for d in found if d not in tokens]
        if self.schedule.feature_major:
            # The widest first: it becomes the rows of matrix products.
            return sorted(features, key=lambda d: -self.size(d)) + tokens
        return tokens + features

    def _dotted(self) -> set[str]:
        """Dimensions that take part in a matrix product: their tiles have sides of at least 16."""
        found: set[str] = set()
        for node in self.loop.graph.nodes:
            solved = node.target is ops.triangular_solve
            if node in self.used and (solved or self._dot_labels(node) is not None):
                found |= set(parse(spec_of(node)).labels)
        # What passes between kernels has the same rows in all of them.
        passed = [n for n, s in self.loop.sources.items() if s.kind == "value"]
        passed += [n for n, s in self.loop.sinks if s.kind == "value"]
        found |= {d for n in passed for d in dims_of(n) if base(d) in (TOKEN, EARLIER)}
        renamed = [
            pair
            for node in self.loop.graph.nodes
            if node in self.used and node.target is ops.rename
            for pair in zip(dims_of(node.args[1]), dims_of(node), strict=True)
        ]
        # A tile keeps its sides under other names.
        while more := {d for pair in renamed if found & set(pair) for d in pair} - found:
            found |= more
        return found

    def _repeated(self) -> tuple[dict[str, Dims], dict[fx.Node, fx.Node]]:
        """Vector states that are kept repeated for every token, and the sums that renew them.

        Such a tile has the axes of what it is added to, so that products accumulate onto it, and its own
        sum over tokens becomes a product too: no reduction, no change of layout.
        """
        names: dict[str, Dims] = {}
        sums: dict[fx.Node, fx.Node] = {}
        if not self.schedule.repeat_vectors or not self.loop.tokens or self.loop.parallel:
            return names, sums
        if TOKEN not in self.dims or EARLIER not in self.dims:
            return names, sums
        new = {sink.name: node for node, sink in self.loop.sinks if sink.kind == "state"}
        for node, source in self.loop.sources.items():
            if source.kind != "state" or len(dims_of(node)) != 1 or source.name not in new:
                continue
            (d,) = dims_of(node)
            update = new[source.name]
            others = [u for u in node.users if u in self.used and u is not update]
            added = [
                u.target is ops.elementwise and u.args[0] in ("add", "sub") and set(dims_of(u)) == {TOKEN, d}
                for u in others
            ]  # fmt: skip
            total = self._token_sum(update, node)
            if all(added) and total is not None and self.side(d) >= 16:
                names[source.name] = self.order((TOKEN, d))
                sums[update] = total
        return names, sums

    def _token_sum(self, update: fx.Node, state: fx.Node) -> fx.Node | None:
        """The sum over tokens in ``state + sum`` or ``state - sum``, where nobody else reads it."""
        if update.target is not ops.elementwise or update.args[0] not in ("add", "sub"):
            return None
        x, y = operands_of(update)
        if x is not state or not isinstance(y, fx.Node) or y.target is not ops.contraction:
            return None
        if [u for u in y.users if u in self.used] != [update]:
            return None
        spec = parse(spec_of(y))
        if spec.summed != (EARLIER,) or not 1 <= len(spec.operands) <= 2:
            return None
        (d,) = spec.result
        shapes = sorted(spec.operands, key=len)
        right = {EARLIER, d} == set(shapes[-1]) and (len(shapes) == 1 or shapes[0] == (EARLIER,))
        return y if right else None

    def _renewed(self, update: fx.Node) -> Tile:
        """A repeated vector state with its sum over tokens: a product of per-token numbers and rows."""
        total = self.repeats[update]
        state = self.tile(operands_of(update)[0])
        parts = sorted(operands_of(total), key=lambda x: len(dims_of(x)))
        rows = self.tile(parts[-1])
        pair = self.order((TOKEN, EARLIER))
        shape = ", ".join(str(self.side(d)) for d in pair)
        value = self.line_up(self.tile(parts[0]), pair) if len(parts) == 2 else "1.0"
        inside = self.mask((EARLIER,), pair)
        sign = "-" if update.args[0] == "sub" else ""
        zeros = f"tl.zeros(({shape},), tl.float32)"
        weights = self.let("m", f"tl.where({inside}, {sign}{value} + {zeros}, 0.0)", pair)
        (d,) = [x for x in rows.dims if x != EARLIER]
        if state.dims[0] == TOKEN:
            text = self._product(weights, rows, (TOKEN, d, EARLIER), state)
        else:
            text = self._product(rows, weights, (d, TOKEN, EARLIER), state)
        return self.let("c", text, state.dims, note=str(spec_of(total)))

    def size(self, dim: str) -> int:
        """The size of a dimension."""
        if base(dim) in (TOKEN, EARLIER):
            return self.loop.mini_batch_size
        return self.loop.sizes[dim]

    def side(self, dim: str) -> int:
        """The side of tiles along a dimension."""
        return padded(self.size(dim), 16 if dim in self.dotted else 1)

    def ragged(self, dim: str) -> bool:
        """Whether tiles reach beyond the size of a feature dimension."""
        return base(dim) not in (TOKEN, EARLIER) and self.side(dim) != self.size(dim)

    def order(self, dims: Dims) -> Dims:
        """Dimensions in the order of axes of tiles."""
        return tuple(sorted(dims, key=self.dims.index))

    # -- writing --------------------------------------------------------------------------------------

    def write(self, line: str = "") -> None:
        """One line at the current depth."""
        self.lines.append("    " * self.indent + line if line else "")

    def fresh(self, prefix: str) -> str:
        """A new variable."""
        self.counter += 1
        return f"{prefix}{self.counter}"

    def let(
        self,
        prefix: str,
        value: str,
        dims: Dims,
        zero: frozenset[str] = frozenset(),
        note: str = "",
    ) -> Tile:
        """Assign a value to a new variable."""
        name = self.fresh(prefix)
        self.write(f"{name} = {value}" + (f"  # {note}" if note else ""))
        return Tile(name, dims, zero)

    def index(self, dims: Dims, target: Dims) -> str:
        """The subscript that lines axes ``dims`` up with ``target``."""
        if dims == target or not dims:
            return ""
        return "[" + ", ".join(":" if d in dims else "None" for d in target) + "]"

    def line_up(self, tile: Tile, target: Dims) -> str:
        """A tile with axes of size 1 where it lacks those of ``target``."""
        return tile.name + self.index(tile.dims, target)

    def mask(self, dims: Dims, target: Dims) -> str:
        """The condition that indices along ``dims`` are within their sizes, lined up with ``target``."""
        names = {d: "in_" + (base(d) if base(d) in (TOKEN, EARLIER) else d) for d in dims}
        parts = [names[d] + self.index((d,), target) for d in target if d in dims]
        return " & ".join(parts)

    def cleared(self, tile: Tile, dims: Dims) -> Tile:
        """The tile with zeros beyond the sizes of ``dims``."""
        missing = tuple(d for d in tile.dims if d in dims and d not in tile.zero)
        if not missing:
            return tile
        value = f"tl.where({self.mask(missing, tile.dims)}, {tile.name}, 0.0)"
        return self.let("m", value, tile.dims, tile.zero | set(missing))

    def sorted_tile(self, name: str, dims: Dims, zero: frozenset[str]) -> Tile:
        """A tile whose axes are in the kernel's order, transposed where they weren't."""
        target = self.order(dims)
        if target == dims:
            return Tile(name, dims, zero)
        if len(dims) == 2:
            return Tile(f"tl.trans({name})", target, zero)
        axes = ", ".join(str(dims.index(d)) for d in target)
        return Tile(f"tl.permute({name}, ({axes}))", target, zero)

    # -- arguments ---------------------------------------------------------------------------------------

    def declare(self, tensor: str, lead: tuple[str, ...], dims: Dims) -> None:
        """A tensor argument with its strides."""
        if tensor in self.strides:
            return
        self.strides[tensor] = [*lead, *dims]
        self.arguments.append(tensor)

    def stride(self, tensor: str, axis: str) -> str:
        """The stride of an argument along an axis: an argument too, but for what kernels pass to each other."""
        if tensor in self.values:
            sizes = ["B", "H", "N", *map(str, self.values[tensor])]
            after = sizes[self.strides[tensor].index(axis) + 1 :]
            numbers = math.prod(int(n) for n in after if n.isdigit())
            return " * ".join([*(n for n in after if not n.isdigit()), str(numbers)])
        return f"{tensor}_s{self.strides[tensor].index(axis)}"

    def offset(self, tensor: str, dims: Dims, rows: str | None) -> str:
        """The offsets of a tile within a tensor, axes in the order the tensor's memory is read best."""
        parts = []
        for d in dims:
            position = rows if rows is not None and base(d) in (TOKEN, EARLIER) else d
            axis = d if d in self.strides[tensor] else "T"
            parts.append(f"{position}{self.index((d,), dims)} * {self.stride(tensor, axis)}")
        return " + ".join(parts)

    @staticmethod
    def memory(dims: Dims) -> Dims:
        """The order of axes in memory: tokens first."""
        return tuple(d for d in dims if base(d) in (TOKEN, EARLIER)) + tuple(
            d for d in dims if base(d) not in (TOKEN, EARLIER)
        )

    def load(self, tensor: str, pointer: str, dims: Dims, rows: str | None) -> Tile:
        """Load a tile as it lies in memory (tokens first), then turn it where the kernel wants it turned."""
        memory = self.memory(dims)
        ragged = tuple(d for d in memory if self.ragged(d))
        name = self.fresh("x")
        self.write(f"{name} = {self.fetch(tensor, pointer, dims, rows)}.to(tl.float32)")
        return self.sorted_tile(name, memory, frozenset(ragged))

    def fetch(self, tensor: str, pointer: str, dims: Dims, rows: str | None) -> str:
        """The expression that loads a tile as it lies in memory."""
        memory = self.memory(dims)
        ragged = tuple(d for d in memory if self.ragged(d))
        offset = self.offset(tensor, memory, rows)
        address = f"{pointer} + {offset}" if offset else pointer
        condition = f", mask={self.mask(ragged, memory)}, other=0.0" if ragged else ""
        return f"tl.load({address}{condition})"

    def store(self, tensor: str, pointer: str, tile: Tile, rows: str | None) -> None:
        """Store a tile; rows of tokens beyond the sequence are left out."""
        memory = self.memory(tile.dims)
        value = tile.name
        if memory != tile.dims:
            value = (
                f"tl.trans({value})"
                if len(memory) == 2
                else (
                    f"tl.permute({value}, ({', '.join(str(tile.dims.index(d)) for d in memory)}))"
                )
            )
        bounded = tuple(
            d
            for d in memory
            if self.ragged(d) or (base(d) in (TOKEN, EARLIER) and rows is not None)
        )
        offset = self.offset(tensor, memory, rows)
        address = f"{pointer} + {offset}" if offset else pointer
        condition = f", mask={self.mask(bounded, memory)}" if bounded else ""
        self.write(f"tl.store({address}, {value}.to({tensor}.dtype.element_ty){condition})")

    # -- operators -----------------------------------------------------------------------------------------

    def tile(self, x: Any) -> Tile:
        """The tile of a node or number."""
        if isinstance(x, fx.Node):
            return self.tiles[x]
        return Tile(number(x), ())

    def emit(self, node: fx.Node) -> None:
        """One operator."""
        if node.target is ops.rename:
            source = self.tile(operands_of(node)[0])
            names = dict(zip(dims_of(node.args[1]), dims_of(node), strict=True))
            dims = tuple(names[d] for d in source.dims)
            zero = frozenset(names[d] for d in source.zero)
            self.tiles[node] = self.sorted_tile(source.name, dims, zero)
            return
        render: dict[Any, Callable[[fx.Node], Tile]] = {
            ops.elementwise: self._elementwise,
            ops.contraction: self._contraction,
            ops.masked_contraction: self._masked_contraction,
            ops.masked: self._masked,
            ops.running_product: self._running_product,
            ops.triangular_solve: lambda n: triangular_solve(self, n),
            ops.reduction: self._reduction,
            ops.broadcast: self._broadcast,
            ops.last: self._last,
            ops.at_last: self._at_last,
        }
        self.tiles[node] = render[node.target](node)

    def _elementwise(self, node: fx.Node) -> Tile:
        if node in self.repeats:
            return self._renewed(node)
        function = str(node.args[0])
        operands = operands_of(node)
        target = self.order(dims_of(node))
        fused = self._accumulated(node, function, operands, target)
        if fused is not None:
            return fused
        tiles = [self.tile(x) for x in operands]
        values = [self.line_up(t, target) for t in tiles]
        zero: frozenset[str] = frozenset()
        kind = IR_FUNCTIONS[function].linear
        if kind == "product":
            zero = frozenset().union(*(t.zero for t in tiles))
        elif kind == "first":
            zero = tiles[0].zero
        elif kind == "sum":
            zero = frozenset.intersection(*(t.zero & frozenset(t.dims) for t in tiles))
        return self.let("e", FUNCTIONS[function].format(*values), target, zero)

    def _accumulated(
        self, node: fx.Node, function: str, operands: tuple[Any, ...], target: Dims
    ) -> Tile | None:
        """A sum with a matrix product in it, made by the matrix unit."""
        if not self.schedule.accumulate or function not in ("add", "sub"):
            return None
        x, y = operands
        if self._pending(y) and self._is_tile(x, target):
            pending, other, negative = y, x, function == "sub"
        elif function == "add" and self._pending(x) and self._is_tile(y, target):
            pending, other, negative = x, y, False
        else:
            return None
        return self._dot(pending, self.tile(other), negative)

    def _is_tile(self, x: Any, target: Dims) -> bool:
        return isinstance(x, fx.Node) and x in self.tiles and self.tiles[x].dims == target

    def _pending(self, x: Any) -> bool:
        """Whether a node is a matrix product that its one user makes itself."""
        return isinstance(x, fx.Node) and x in self.used and x not in self.tiles

    def _deferred(self, node: fx.Node) -> bool:
        """A product whose only user is a sum of the same shape, which accumulates into the other operand."""
        if node in self.repeats.values():
            return True
        if not self.schedule.accumulate or self._dot_labels(node) is None:
            return False
        users = [u for u in node.users if u in self.used]
        if len(users) != 1 or any(n is node for n, _ in self.loop.sinks):
            return False
        (user,) = users
        if user.target is not ops.elementwise or user.args[0] not in ("add", "sub"):
            return False
        operands = operands_of(user)
        other = operands[0] if operands[1] is node else operands[1]
        if user.args[0] == "sub" and operands[1] is not node:
            return False
        if not isinstance(other, fx.Node) or other is node or self._deferred_candidate(other, user):
            return False
        return dims_of(other) != () and self._tile_dims(other) == self.order(dims_of(node))

    def _tile_dims(self, node: fx.Node) -> Dims:
        """The axes of the tile a node will have."""
        source = self.loop.sources.get(node)
        if source is not None and source.kind == "state" and source.name in self.repeated:
            return self.repeated[source.name]
        return self.order(dims_of(node))

    def _deferred_candidate(self, other: fx.Node, user: fx.Node) -> bool:
        """Of two products in a sum the second accumulates into the first."""
        operands = operands_of(user)
        return (
            self._dot_labels(other) is not None
            and operands[1] is other
            and operands[0] is not other
            and ([u for u in other.users if u in self.used] == [user] and user.args[0] == "add")
        )

    def _dot_labels(self, node: fx.Node) -> tuple[str, str, str] | None:
        """Rows, columns and inner dimension of a product the matrix unit can make, else None."""
        if node.op != "call_function" or node.target not in (
            ops.contraction,
            ops.masked_contraction,
        ):
            return None
        spec = parse(spec_of(node))
        if len(spec.operands) != 2 or len(spec.result) != 2 or len(spec.labels) != 3:
            return None
        (inner,) = spec.summed
        left, right = (set(o) for o in spec.operands)
        if len(left) != 2 or len(right) != 2 or inner not in left or inner not in right:
            return None
        if not self.loop.tokens and min(self.size(d) for d in spec.labels) < 8:
            return None
        if min(self.size(d) for d in spec.labels) < 2:
            return None
        rows, columns = self.order(spec.result)
        return rows, columns, inner

    def _dot(self, node: fx.Node, accumulator: Tile | None = None, negative: bool = False) -> Tile:
        """A matrix product, causal where the node is."""
        labels = self._dot_labels(node)
        assert labels is not None
        rows, columns, inner = labels
        spec = parse(spec_of(node))
        by_dims = {frozenset(o): x for x, o in zip(operands_of(node), spec.operands, strict=True)}
        left = self.tile(by_dims[frozenset((rows, inner))])
        right = self.tile(by_dims[frozenset((inner, columns))])
        causal = node.target is ops.masked_contraction
        if causal:
            r = parse_relation(str(node.args[0]))
            pairs_left = set(left.dims) == {r.earlier, r.later}
            if pairs_left:
                left = self._causal(left, str(node.args[0]))
            else:
                right = self._causal(right, node.args[0])
        if base(inner) in (TOKEN, EARLIER) and not (causal and inner == r.earlier):
            # Of causal sums only those over later tokens reach beyond the sequence.
            small = left if self._elements(left) <= self._elements(right) else right
            cleared = self.cleared(small, (inner,))
            left, right = (cleared, right) if small is left else (left, cleared)
        if self.ragged(inner):
            left, right = self.cleared(left, (inner,)), self.cleared(right, (inner,))
        if negative:
            small_left = self._elements(left) <= self._elements(right)
            negated = self.let(
                "n",
                f"-{(left if small_left else right).name}",
                (left if small_left else right).dims,
            )
            left, right = (negated, right) if small_left else (left, negated)
        zero = frozenset(d for d in (rows,) if d in left.zero) | frozenset(
            d for d in (columns,) if d in right.zero
        )
        if accumulator is not None:
            zero &= accumulator.zero
        made = Tile(self.fresh("c"), (rows, columns), zero)
        labels = (rows, columns, inner)
        if not causal or self.schedule.nan == "ignored":
            self.write(f"{made.name} = {self._product(left, right, labels, accumulator)}  # {spec}")
            return made
        values, pairs = (right, left) if pairs_left else (left, right)
        if self.schedule.nan == "product":
            clean, reached = self._finite(values, pairs, str(node.args[0]), labels)
            left, right = (left, clean) if pairs_left else (clean, right)
            self.write(f"{made.name} = {self._product(left, right, labels, accumulator)}  # {spec}")
            self.write(f'{made.name} = tl.where({reached} > 0, float("nan"), {made.name})')
            return made
        self.write(f"{made.name} = {self._product(left, right, labels, accumulator)}  # {spec}")
        self.write(f"if tl.sum(tl.sum({values.name} * 0.0, 1), 0) != 0.0:")
        self.indent += 1
        clean, reached = self._finite(values, pairs, str(node.args[0]), labels)
        left, right = (left, clean) if pairs_left else (clean, right)
        exact = self._product(left, right, labels, accumulator)
        self.write(f'{made.name} = tl.where({reached} > 0, float("nan"), {exact})')
        self.indent -= 1
        return made

    def _product(
        self, left: Tile, right: Tile, labels: tuple[str, str, str], accumulator: Tile | None
    ) -> str:
        rows, columns, inner = labels
        a = self._operand(left, (rows, inner))
        b = self._operand(right, (inner, columns))
        extra = f", acc={accumulator.name}" if accumulator is not None else ""
        return f"tl.dot({a}, {b}{extra}, input_precision=PRECISION)"

    def _finite(
        self, values: Tile, pairs: Tile, relation: str, labels: tuple[str, str, str]
    ) -> tuple[Tile, str]:
        """What a causal product sums, with zeros for what is not finite, and a tile that counts who must see that.

        Zero times infinity is not a number: without this, tokens before one that is not finite would see it.
        """
        rows, columns, inner = labels
        clean = self.let(
            "f",
            f"tl.where({values.name} * 0.0 == 0.0, {values.name}, 0.0)",
            values.dims,
            values.zero,
        )
        bad = self.let("f", f"tl.where({values.name} * 0.0 == 0.0, 0.0, 1.0)", values.dims)
        bad = self.cleared(bad, tuple(d for d in values.dims if d != inner and self.ragged(d)))
        shape = ", ".join(str(self.side(d)) for d in pairs.dims)
        ones = self._causal(Tile(f"tl.full(({shape},), 1.0, tl.float32)", pairs.dims), relation)
        left, right = (ones, bad) if rows in pairs.dims else (bad, ones)
        a, b = self._operand(left, (rows, inner)), self._operand(right, (inner, columns))
        return clean, self.let("c", f"tl.dot({a}, {b})", (rows, columns)).name

    def _elements(self, tile: Tile) -> int:
        count = 1
        for d in tile.dims:
            count *= self.side(d)
        return count

    def _operand(self, tile: Tile, dims: Dims) -> str:
        name = f"{tile.name}.to(DOT)"
        return name if tile.dims == dims else f"tl.trans({name})"

    def _causal(self, tile: Tile, relation: Any) -> Tile:
        """A tile over pairs of tokens, zero where the relation does not hold."""
        r = parse_relation(str(relation))
        comparison = "<" if r.strict else "<="
        later = r.later + self.index((r.later,), tile.dims)
        earlier = r.earlier + self.index((r.earlier,), tile.dims)
        return self.let(
            "m", f"tl.where({earlier} {comparison} {later}, {tile.name}, 0.0)", tile.dims, tile.zero
        )

    def _contraction(self, node: fx.Node) -> Tile:
        if self._dot_labels(node) is not None:
            return self._dot(node)
        return self._broadcast_product(node, [self.tile(x) for x in operands_of(node)])

    def _masked_contraction(self, node: fx.Node) -> Tile:
        if self._dot_labels(node) is not None:
            return self._dot(node)
        r = parse_relation(str(node.args[0]))
        tiles = [self.tile(x) for x in operands_of(node)]
        pair = self.order((r.later, r.earlier))
        both = [i for i, t in enumerate(tiles) if set(pair) <= set(t.dims)]
        if both:
            tiles[both[0]] = self._causal(tiles[both[0]], node.args[0])
        elif len(tiles) == 1:
            return self._causal_sum(node, tiles[0])
        else:
            shape = ", ".join(str(self.side(d)) for d in pair)
            ones = Tile(f"tl.full(({shape}), 1.0, tl.float32)", pair)
            tiles.append(self._causal(ones, node.args[0]))
        return self._broadcast_product(node, tiles, masked=True)

    def _causal_sum(self, node: fx.Node, x: Tile) -> Tile:
        """One operand under a causal sum: a matrix product with the mask, or a sum of what the mask leaves."""
        spec, relation = parse(spec_of(node)), str(node.args[0])
        r = parse_relation(relation)
        rows_columns = self.order(spec.result)
        summed = [d for d in x.dims if d not in spec.result]
        sides = [self.side(d) for d in (*spec.result, *summed)]
        if len(x.dims) != 2 or len(rows_columns) != 2 or len(summed) != 1 or min(sides) < 16:
            target = self.order(tuple(dict.fromkeys((*x.dims, r.later, r.earlier))))
            shape = ", ".join(str(self.side(d)) for d in target)
            value = f"{self.line_up(x, target)} + tl.zeros(({shape},), tl.float32)"
            tile = self._causal(Tile(f"({value})", target, x.zero), relation)
            return self._broadcast_product(node, [tile], masked=True)
        rows, columns = rows_columns
        (inner,) = summed
        if inner != r.earlier:
            x = self.cleared(x, (inner,))
        pair = self.order((r.later, r.earlier))
        shape = ", ".join(str(self.side(d)) for d in pair)
        ones = self._causal(Tile(f"tl.full(({shape}), 1.0, tl.float32)", pair), relation)
        labels = (rows, columns, inner)
        if self.schedule.nan == "ignored":
            left, right = (ones, x) if rows in ones.dims else (x, ones)
            return self.let("c", self._product(left, right, labels, None), (rows, columns))
        clean, reached = self._finite(x, ones, relation, labels)
        left, right = (ones, clean) if rows in ones.dims else (clean, ones)
        made = self.let(
            "c", self._product(left, right, labels, None), (rows, columns), note=str(spec)
        )
        value = f'tl.where({reached} > 0, float("nan"), {made.name})'
        return self.let("c", value, (rows, columns))

    def _broadcast_product(self, node: fx.Node, tiles: list[Tile], masked: bool = False) -> Tile:
        """A product without the matrix unit: multiply, then add up."""
        spec = parse(spec_of(node))
        result = self.order(spec.result)
        every = self.order(tuple(dict.fromkeys(d for t in tiles for d in t.dims)))
        summed = tuple(d for d in every if d not in result)
        volume = 1
        for d in every:
            volume *= self.side(d)
        if volume > LARGEST_BROADCAST:
            raise NotLowerable(f"a product over {' '.join(every)} is too large for registers")
        # Causal sums over earlier tokens stay within the sequence.
        within = ""
        if masked:
            r = parse_relation(str(node.args[0]))
            within = r.earlier if r.later in result else ""
        for d in summed:
            if base(d) not in (TOKEN, EARLIER) or d == within:
                continue
            i = min(
                (i for i, t in enumerate(tiles) if d in t.dims),
                key=lambda i: self._elements(tiles[i]),
            )
            tiles[i] = self.cleared(tiles[i], (d,))
        ragged = tuple(d for d in summed if self.ragged(d))
        tiles = [self.cleared(t, ragged) for t in tiles]
        zero = frozenset().union(*(t.zero for t in tiles)) & frozenset(result)
        value = " * ".join(self.line_up(t, every) for t in tiles)
        for d in reversed(summed):
            value = f"tl.sum({value}, {every.index(d)})"
        return self.let(
            "c" if summed else "e", value, result, zero, note=str(spec) if summed else ""
        )

    def _masked(self, node: fx.Node) -> Tile:
        return self._causal(self.tile(operands_of(node)[0]), node.args[0])

    def _running_product(self, node: fx.Node) -> Tile:
        """Products over the tokens before each: a column for every token they start after, or one for all."""
        r = parse_relation(str(node.args[0]))
        tile = self.tile(operands_of(node)[0])
        if r.strict:
            tile = self._token_before(tile, r.later, r.earlier)
        target = self.order(dims_of(node))
        axis = target.index(r.later)
        if r.earlier not in target:
            return self.let("e", f"tl.cumprod({tile.name}, {axis})", target)
        later, earlier = (d + self.index((d,), target) for d in (r.later, r.earlier))
        after = f"{earlier} + 1 < {later}" if r.strict else f"{earlier} < {later}"
        factors = self.let("e", f"tl.where({after}, {self.line_up(tile, target)}, 1.0)", target)
        return self._causal(
            self.let("e", f"tl.cumprod({factors.name}, {axis})", target), str(node.args[0])
        )

    def _token_before(self, tile: Tile, later: str, other: str) -> Tile:
        """Each token's value taken from the token before it, one for the first."""
        names = {later: other}
        dims = tuple(names.get(d, d) for d in tile.dims)
        moved = self.sorted_tile(tile.name, dims, frozenset())
        target = self.order((later, *dims))
        t, s = (d + self.index((d,), target) for d in (later, other))
        value = f"tl.where({s} + 1 == {t}, {self.line_up(moved, target)}, 0.0)"
        shifted = self.let("e", f"tl.sum({value}, {target.index(other)})", tile.dims)
        first = f"{later}{self.index((later,), tile.dims)} == 0"
        return self.let("e", f"tl.where({first}, 1.0, {shifted.name})", tile.dims)

    def _reduction(self, node: fx.Node) -> Tile:
        function = str(node.args[0])
        if function not in ("amax", "amin"):
            raise NotLowerable(f"the reduction {function} has no Triton form")
        tile = self.tile(operands_of(node)[0])
        result = self.order(dims_of(node))
        gone = [d for d in tile.dims if d not in result]
        worst = "-inf" if function == "amax" else "inf"
        ragged = tuple(d for d in gone if self.ragged(d))
        value, name = tile.name, {"amax": "tl.max", "amin": "tl.min"}[function]
        if ragged:
            value = f'tl.where({self.mask(ragged, tile.dims)}, {value}, float("{worst}"))'
        poison = f"tl.where({tile.name} != {tile.name}, {tile.name}, 0.0)"
        for d in reversed(gone):
            axis = tile.dims.index(d)
            value, poison = f"{name}({value}, {axis})", f"tl.sum({poison}, {axis})"
        return self.let("r", f"{value} + {poison}", result)

    def _broadcast(self, node: fx.Node) -> Tile:
        tile = self.tile(operands_of(node)[0])
        target = self.order(dims_of(node))
        if not target:
            return self.let("e", f"tl.full((), {tile.name}, tl.float32)", ())
        shape = ", ".join(str(self.side(d)) for d in target)
        return self.let(
            "e", f"{self.line_up(tile, target)} + tl.zeros(({shape},), tl.float32)", target
        )

    def _last(self, node: fx.Node) -> Tile:
        (source,) = operands_of(node)
        (gone,) = [d for d in dims_of(source) if d not in dims_of(node)]
        tile = self.tile(source)
        result = self.order(dims_of(node))
        at = f"(first + {gone}){self.index((gone,), tile.dims)} == last"
        return self.let(
            "c", f"tl.sum(tl.where({at}, {tile.name}, 0.0), {tile.dims.index(gone)})", result
        )

    def _at_last(self, node: fx.Node) -> Tile:
        source, _ = operands_of(node)
        tile, target = self.tile(source), self.order(dims_of(node))
        (token,) = [d for d in target if d not in tile.dims]
        at = f"(first + {token} == last){self.index((token,), target)}"
        zero = tile.zero | {token}
        return self.let("m", f"tl.where({at}, {self.line_up(tile, target)}, 0.0)", target, zero)

    # -- the kernel --------------------------------------------------------------------------------------

    def render(self) -> str:
        """The source of the kernel."""
        loop = self.loop
        self._declare_arguments()
        body_start = len(self.lines)
        self._prologue()
        self._invariants()
        if loop.parallel:
            group = self.schedule.group
            self.write(f"start = tl.program_id(1) * {group}")
        if self.schedule.prefetch:
            start = "start" if loop.parallel else ("N - 1" if loop.reverse else "0")
            self.write(f"following = {start}")
            self._prefetch()
        if loop.parallel:
            self.write(f"for n in tl.range(start, tl.minimum(start + {group}, N)):")
        elif loop.reverse:
            self.write("for step in tl.range(0, N):")
            self.write("    n = N - 1 - step")
        else:
            self.write("for n in tl.range(0, N):")
        self.indent += 1
        self._mini_batch()
        self.indent -= 1
        self._epilogue()
        self.body = self.lines[body_start:]
        self.lines = []
        self.indent = 0
        self._header()
        return "\n".join([*self.lines, *self.body]) + "\n"

    def _header(self) -> None:
        loop = self.loop
        what = (
            "in parallel"
            if loop.parallel
            else ("backwards" if loop.reverse else "one after another")
        )
        unit = f"mini-batches of {loop.mini_batch_size} tokens" if loop.tokens else "tokens"
        self.write(f'"""{loop.name}: one program a batch and head; {unit} {what}."""')
        self.write()
        self.write("import triton")
        self.write("import triton.language as tl")
        self.write()
        self.write()
        if any("reciprocal(" in line for line in self.body):
            self.lines += RECIPROCAL.splitlines()
        if any("unit_triangular_inverse(" in line for line in self.body):
            self.lines += INVERSE.splitlines()
        self.write("@triton.jit")
        self.write(f"def {loop.name}(")
        for name in self.arguments:
            axes = range(0 if name in self.values else len(self.strides[name]))
            strides = ", ".join(f"{name}_s{i}" for i in axes)
            self.write(f"    {name}, {strides}," if strides else f"    {name},")
        extra = ["T", "H"] + (["place"] if loop.refresh else [])
        self.write(f"    {', '.join(extra)},")
        self.write("    DOT: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,")
        self.write("):")

    def _declare_arguments(self) -> None:
        lead = {"state": ("B", "H"), "saved": ("B", "H", "N"), "token": ("B", "H", "T"),
                "held": ("B", "H"), "shared": ("H",), "constant": ()}  # fmt: skip
        for node, source in self.loop.sources.items():
            if source.kind == "value":
                self._declare_value(node, source.name)
            elif self._wanted_source(node, source):
                features = tuple(d for d in dims_of(node) if base(d) not in (TOKEN, EARLIER))
                name = f"saved_{source.name}" if source.kind == "saved" else source.name
                self.declare(name, lead[source.kind], features)
        for node, sink in self.loop.sinks:
            features = tuple(d for d in dims_of(node) if base(d) not in (TOKEN, EARLIER))
            if sink.kind == "token":
                self.declare(sink.name, ("B", "H", "T"), features)
            elif sink.kind == "sum":
                # A program of a parallel kernel adds up its own mini-batches.
                lead_of_sum = ("B", "H", "N") if self.loop.parallel else ("B", "H")
                self.declare(sink.name, lead_of_sum, features)
            elif sink.kind == "value":
                self._declare_value(node, sink.name)
        if not self.loop.parallel:
            for name, dims in self._state_dims().items():
                if name in self.loop.save:
                    self.declare(f"saved_{name}", ("B", "H", "N"), dims)
            for name, dims in self.stored_states().items():
                self.declare(f"new_{name}", ("B", "H"), dims)

    def _declare_value(self, node: fx.Node, name: str) -> None:
        """A value of every mini-batch that passes from one kernel to another."""
        dims = self.memory(dims_of(node))
        self.declare(name, ("B", "H", "N"), dims)
        tokens = [d for d in dims if base(d) in (TOKEN, EARLIER)]
        self.values[name] = tuple(self.side(d) if d in tokens else self.size(d) for d in dims)

    def _wanted_source(self, node: fx.Node, source: Source) -> bool:
        if source.kind == "state" and not self.loop.parallel:
            return source.name in self._state_dims()
        return node in self.used

    def _state_dims(self) -> dict[str, Dims]:
        """The states carried: those read, and those made."""
        made = {s.name for _, s in self.loop.sinks if s.kind == "state"}
        found: dict[str, Dims] = {}
        for node, source in self.loop.sources.items():
            if source.kind != "state":
                continue
            partner = source.name.replace("anchor", "carry")
            if node in self.used or source.name in made or (self.loop.refresh and partner in made):
                found.setdefault(source.name, dims_of(node))
        return found

    def stored_states(self) -> dict[str, Dims]:
        """The states stored after the last mini-batch: those that change."""
        if not self.loop.store_state or self.loop.parallel:
            return {}
        made = {s.name for _, s in self.loop.sinks if s.kind == "state"}
        return {
            name: dims
            for name, dims in self._state_dims().items()
            if name in made or self.loop.refresh
        }

    def _state_tile(self, name: str, dims: Dims) -> Tile:
        """A carried state as it is stored."""
        if name not in self.repeated:
            return Tile(name + "_v", self.order(dims))
        target = self.repeated[name]
        first = f"{TOKEN}{self.index((TOKEN,), target)} == 0"
        value = f"tl.sum(tl.where({first}, {name}_v, 0.0), {target.index(TOKEN)})"
        return self.let("x", value, dims)

    def _pointer(self, tensor: str, *axes: tuple[str, str]) -> None:
        terms = " + ".join(f"{value} * {self.stride(tensor, axis)}" for value, axis in axes)
        self.write(f"{tensor}_ptr = {tensor} + {terms}")

    def _prologue(self) -> None:
        loop = self.loop
        self.write("head = (tl.program_id(0) % H).to(tl.int64)")
        self.write("sequence = (tl.program_id(0) // H).to(tl.int64)")
        self.write(f"N = tl.cdiv(T, {loop.mini_batch_size})" if loop.tokens else "N = T")
        for d in self.dims:
            self.write(f"{d} = tl.arange(0, {self.side(d)})")
            if self.ragged(d):
                self.write(f"in_{d} = {d} < {self.size(d)}")
        for tensor, axes in self.strides.items():
            at = [("sequence", "B"), ("head", "H")]
            if tensor.startswith("new_") or "B" in axes:
                self._pointer(tensor, *at)
            elif "H" in axes:
                self._pointer(tensor, ("head", "H"))
            else:
                self.write(f"{tensor}_ptr = {tensor}")

    def _invariants(self) -> None:
        """What does not change from mini-batch to mini-batch: parameters, states to start from."""
        states = self._state_dims() if not self.loop.parallel else {}
        for node, source in self.loop.sources.items():
            if source.kind in ("held", "shared", "constant") and node in self.used:
                tile = self.load(source.name, f"{source.name}_ptr", dims_of(node), None)
                self.tiles[node] = self._named(tile, source.name + "_v")
        for name, dims in states.items():
            tile = self.load(name, f"{name}_ptr", dims, None)
            if name in self.repeated:
                target = self.repeated[name]
                shape = ", ".join(str(self.side(d)) for d in target)
                value = f"{self.line_up(tile, target)} + tl.zeros(({shape},), tl.float32)"
                tile = self.let("x", value, target)
            self._named(tile, name + "_v")
        for node, source in self.loop.sources.items():
            if source.kind == "state" and source.name in states:
                self.tiles[node] = Tile(source.name + "_v", self._tile_dims(node))
        for node, sink in self.loop.sinks:
            if sink.kind == "sum":
                shape = ", ".join(str(self.side(d)) for d in self.order(dims_of(node)))
                zeros = f"tl.zeros(({shape},), tl.float32)" if shape else "0.0"
                self.write(f"{sink.name}_v = {zeros}")
        self.invariant = set(self.tiles)
        for node in self.loop.graph.nodes:
            if node.op != "call_function" or node not in self.used or self._deferred(node):
                continue
            inputs = node.all_input_nodes
            fixed = [x for x in inputs if x in self.invariant and not self._changes(x)]
            if inputs and len(fixed) == len(inputs):
                self.emit(node)
                self.invariant.add(node)

    def _changes(self, node: fx.Node) -> bool:
        source = self.loop.sources.get(node)
        return source is not None and source.kind in ("state", "token", "saved", "value")

    def _named(self, tile: Tile, name: str) -> Tile:
        self.write(f"{name} = {tile.name}")
        return Tile(name, tile.dims, tile.zero)

    def _indices(self, n: str, suffix: str = "") -> None:
        """Where the tokens of mini-batch ``n`` lie; ``suffix`` tells its variables from those of another."""
        b = self.loop.mini_batch_size
        if not self.loop.tokens:
            self.write(f"last{suffix} = {n}")
            return
        self.write(f"first{suffix} = {n} * {b}")
        self.write(f"count{suffix} = tl.minimum(T - first{suffix}, {b})")
        self.write(f"last{suffix} = first{suffix} + count{suffix} - 1")
        token = TOKEN if TOKEN in self.dims else next(d for d in self.dims if base(d) == TOKEN)
        # Rows beyond the sequence repeat its last token: finite where that is, and never counted.
        row = f"tl.minimum(first{suffix} + {token}, last{suffix})"
        self.write(f"rows{suffix} = tl.cast({row}, tl.int64)")

    def _within(self) -> None:
        """Which rows of a tile lie within the sequence."""
        for start in (TOKEN, EARLIER) if self.loop.tokens else ():
            names = [d for d in self.dims if base(d) == start]
            if names:
                self.write(f"in_{start} = {names[0]} < count")

    def _fetched(self) -> list[fx.Node]:
        """What is loaded for every mini-batch: arguments, and the last tokens of some."""
        found = [
            node
            for node, source in self.loop.sources.items()
            if node in self.used
            and (
                source.kind in ("saved", "value") or (source.kind == "token" and self._whole(node))
            )
        ]
        return found + [
            n for n in self.loop.graph.nodes if n in self.used and self._of_last_token(n)
        ]

    def _of_last_token(self, node: fx.Node) -> bool:
        if node.target is not ops.last:
            return False
        source = self.loop.sources.get(operands_of(node)[0])  # type: ignore[arg-type]
        return source is not None and source.kind == "token"

    def _prefetch(self) -> None:
        """Load what the mini-batch ``following`` reads, as it is stored, for the next turn of the loop."""
        self._indices("following", "_f")
        for i, node in enumerate(self._fetched()):
            raw = self.fetch(*self._place(node, "following", "_f"))
            self.write(f"next_{i} = {raw}")

    def _arrived(self) -> None:
        """What the turn before has loaded for this one."""
        for i, node in enumerate(self._fetched()):
            _, _, dims, _ = self._place(node, "n", "")
            name = self.fresh("x")
            self.write(f"{name} = next_{i}.to(tl.float32)")
            memory = self.memory(dims)
            ragged = frozenset(d for d in memory if self.ragged(d))
            self.tiles[node] = self.sorted_tile(name, memory, ragged)
        # One mini-batch too far is the last one again.
        after = (
            "tl.maximum(n - 1, 0)"
            if self.loop.reverse and not self.loop.parallel
            else "tl.minimum(n + 1, N - 1)"
        )
        self.write(f"following = {after}")
        self._prefetch()

    def _place(self, node: fx.Node, n: str, suffix: str) -> tuple[str, str, Dims, str | None]:
        """Tensor, pointer, dimensions and rows of what a node loads for mini-batch ``n``."""
        source = self.loop.sources.get(node)
        if source is None:
            (token,) = operands_of(node)
            name = self.loop.sources[token].name
            pointer = f"{name}_ptr + tl.cast(last{suffix}, tl.int64) * {self.stride(name, 'T')}"
            return name, pointer, dims_of(node), None
        if source.kind in ("saved", "value"):
            name = f"saved_{source.name}" if source.kind == "saved" else source.name
            pointer = f"{name}_ptr + tl.cast({n}, tl.int64) * {self.stride(name, 'N')}"
            return name, pointer, dims_of(node), None
        if self.loop.tokens:
            return source.name, f"{source.name}_ptr", dims_of(node), f"rows{suffix}"
        pointer = f"{source.name}_ptr + tl.cast({n}, tl.int64) * {self.stride(source.name, 'T')}"
        return source.name, pointer, dims_of(node), None

    def _mini_batch(self) -> None:
        """One turn of the loop."""
        loop = self.loop
        self._indices("n")
        self._within()
        if loop.refresh and any(name.startswith("anchor") for name in self._state_dims()):
            pairs = [
                (n, n.replace("anchor", "carry"))
                for n in self._state_dims()
                if n.startswith("anchor")
            ]
            if loop.refresh == 1:
                for a, c in pairs:
                    self.write(f"{a}_v = {c}_v")
            else:
                self.write(f"if (place + n) % {loop.refresh} == 0:")
                for a, c in pairs:
                    self.write(f"    {a}_v = {c}_v")
        self._save_states()
        fetched = self._fetched()
        for node in fetched:
            self.tiles.pop(node, None)
        if self.schedule.prefetch:
            self._arrived()
        elif not self.schedule.late_loads:
            for node in fetched:
                self._load(node)
        for node in self._sequence():
            for x in (*node.all_input_nodes, node):
                if x in fetched and x not in self.tiles:
                    self._load(x)
            if node not in fetched and not self._deferred(node):
                self.emit(node)
            if node in self.tiles:
                self._keep(node)
        for node in self.results:
            if node in fetched and node not in self.tiles:
                self._load(node)
            if node in self.loop.sources or node in self.invariant:
                self._keep(node)
        self._renew()

    def _save_states(self) -> None:
        """Store the states that this mini-batch starts from, where it is one of those before which they are."""
        loop, at = self.loop, "n"
        if loop.save and loop.interval > 1:
            self.write(f"if n % {loop.interval} == 0:")
            self.indent += 1
            at = f"n // {loop.interval}"
        for name in loop.save:
            tensor = f"saved_{name}"
            pointer = f"{tensor}_ptr + tl.cast({at}, tl.int64) * {self.stride(tensor, 'N')}"
            self.store(tensor, pointer, self._state_tile(name, self._state_dims()[name]), None)
        if loop.save and loop.interval > 1:
            self.indent -= 1

    def _sequence(self) -> list[fx.Node]:
        """The operators of a mini-batch in the order they are computed."""
        nodes = [
            n
            for n in self.loop.graph.nodes
            if n.op == "call_function" and n in self.used and n not in self.invariant
        ]
        if self.schedule.order == "graph":
            return nodes
        if self.schedule.order == "products_first":
            return products_first(nodes)
        held = {n for n, _ in self.loop.sinks} | self.invariant
        return least_live(nodes, self._on_chip, held, self._updates_last(nodes))

    def _updates_last(self, nodes: list[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
        """New states wait for those who read the old ones, unless these need the new ones."""
        position = {n: i for i, n in enumerate(nodes)}
        needs: dict[fx.Node, set[fx.Node]] = {}
        for node in nodes:
            inputs = [x for x in node.all_input_nodes if x in position]
            needs[node] = set(inputs).union(*(needs[x] for x in inputs))
        waits: dict[fx.Node, set[fx.Node]] = {}
        for new, sink in self.loop.sinks:
            if sink.kind != "state" or new not in position:
                continue
            old = [
                n for n, s in self.loop.sources.items() if s.kind == "state" and s.name == sink.name
            ]
            readers = {u for n in old for u in n.users if u in position and u is not new}
            waits[new] = {u for u in readers if new not in needs[u]}
        # Waiting must not close a circle: of two states that wait for each other the later one waits.
        for new in sorted(waits, key=position.__getitem__):
            waits[new] = {u for u in waits[new] if position[u] < position[new] or not any(
                other in needs[u] for other in waits if other is not new
            )}  # fmt: skip
        return waits

    def _on_chip(self, node: fx.Node) -> int:
        count = 1
        for d in dims_of(node):
            count *= self.side(d)
        return 0 if node.target is ops.rename or node in self.invariant else count

    def _load(self, node: fx.Node) -> None:
        self.tiles[node] = self.load(*self._place(node, "n", ""))

    def _whole(self, node: fx.Node) -> bool:
        """Whether a token argument is needed for all tokens, not only for the last."""
        return any(u in self.used and u.target is not ops.last for u in node.users) or any(
            n is node for n, _ in self.loop.sinks
        )

    def _keep(self, node: fx.Node) -> None:
        """Store what a node goes to, but for new states, as soon as it is made: it need not stay on chip."""
        for sink in self.results.get(node, ()):
            tile = self.tiles[node]
            if sink.kind == "sum":
                self.write(f"{sink.name}_v += {tile.name}")
                continue
            pointer, rows = f"{sink.name}_ptr", None
            if sink.kind == "value":
                pointer += f" + tl.cast(n, tl.int64) * {self.stride(sink.name, 'N')}"
            elif self.loop.tokens:
                rows = "rows"
            else:
                pointer += f" + tl.cast(n, tl.int64) * {self.stride(sink.name, 'T')}"
            self.store(sink.name, pointer, tile, rows)

    def _renew(self) -> None:
        """The states take their new values, all at once."""
        for node, sink in self.loop.sinks:
            target, value = f"{sink.name}_v", self.tiles[node].name
            if sink.kind == "state" and target != value:
                self.write(f"{target} = {value}")

    def _epilogue(self) -> None:
        loop = self.loop
        for name, dims in self.stored_states().items():
            self.store(f"new_{name}", f"new_{name}_ptr", self._state_tile(name, dims), None)
        for node, sink in loop.sinks:
            if sink.kind == "sum":
                tile = Tile(f"{sink.name}_v", self.order(dims_of(node)))
                pointer = f"{sink.name}_ptr"
                if loop.parallel:
                    pointer += f" + tl.program_id(1).to(tl.int64) * {self.stride(sink.name, 'N')}"
                self.store(sink.name, pointer, tile, None)


def render(loop: Loop, schedule: Schedule) -> Kernel:
    """The kernel of a loop under a schedule.

    Raises:
        NotLowerable: where an operator has no Triton form.
    """
    log.info("%s: %s", loop.name, schedule)
    renderer = Renderer(loop, schedule)
    source = renderer.render()

    def sizes(dims: Dims) -> tuple[int, ...]:
        return tuple(loop.sizes[d] for d in dims)

    config = {
        "arguments": [
            (name, 0 if name in renderer.values else len(renderer.strides[name]))
            for name in renderer.arguments
        ],
        "schedule": schedule,
        "place": bool(loop.refresh),
        "parallel": loop.parallel,
        "values": renderer.values,
        "new": {f"new_{n}": sizes(d) for n, d in renderer.stored_states().items()},
        "sums": {s.name: sizes(dims_of(n)) for n, s in loop.sinks if s.kind == "sum"},
        "mini_batch_size": loop.mini_batch_size,
    }
    return Kernel(loop.name, source, config)
