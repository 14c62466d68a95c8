"""Tiles: the variables of a kernel, their axes, and the lines that make them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx
from tttc.codegen.loop import Loop, Sink, used
from tttc.codegen.schedule import Schedule
from tttc.codegen.triton_functions import number

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, spec_of
from tttc.ir.build import dims_of
from tttc.ir.spec import Dims, parse, parse_relation

RELATED = (ops.masked_contraction, ops.masked, ops.running_product, ops.triangular_solve)


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


class Tiles:
    """What is known of the values of a loop before they are made, and how lines are written."""

    constants: tuple[str, ...] = ("DOT", "PRECISION", "FAST")  # arguments that are compiled in

    def __init__(self, loop: Loop, schedule: Schedule) -> None:
        self.loop = loop
        self.schedule = schedule
        self.lines: list[str] = []
        self.indent = 1
        self.tiles: dict[fx.Node, Tile] = {}
        self.loaded: set[str] = set()  # tiles as they lie in memory
        self.counter = 0
        self.arguments: list[str] = []
        self.by_words: dict[str, int] = {}  # arguments so copied, and how far a mini-batch is
        self.strides: dict[str, list[str]] = {}
        # Of triangular systems, by system and relation: as given, and the inverse.
        self.inverses: dict[Any, tuple[Tile, Tile]] = {}
        self.values: dict[str, tuple[int, ...]] = {}  # shapes of what passes between kernels
        self.used = used(loop)
        self.results: dict[fx.Node, list[Sink]] = {}  # where nodes go, but for new states
        for node, sink in loop.sinks:
            if sink.kind != "state":
                self.results.setdefault(node, []).append(sink)
        self.dims = self._dims()
        self.dotted = self._dotted()
        self.repeated: dict[str, Dims] = {}  # see tttc.codegen.triton_vectors
        self.repeats: dict[fx.Node, fx.Node] = {}

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

    def _tile_dims(self, node: fx.Node) -> Dims:
        """The axes of the tile a node will have."""
        source = self.loop.sources.get(node)
        if source is not None and source.kind == "state" and source.name in self.repeated:
            return self.repeated[source.name]
        return self.order(dims_of(node))

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

    def tile(self, x: Any) -> Tile:
        """The tile of a node or number."""
        if isinstance(x, fx.Node):
            return self.tiles[x]
        return Tile(number(x), ())

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

    def zeros(self, dims: Dims) -> str:
        """A tile of zeros."""
        shape = ", ".join(str(self.side(d)) for d in dims)
        return f"tl.zeros(({shape},), tl.float32)" if shape else "0.0"

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

    def _elements(self, tile: Tile) -> int:
        count = 1
        for d in tile.dims:
            count *= self.side(d)
        return count
