"""Tiles of Gluon kernels: which threads hold them, and their copies in shared memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx
from tttc.codegen.gluon_layouts import Layouts, is_accumulator
from tttc.codegen.loop import Loop, only_products_read
from tttc.codegen.schedule import Schedule
from tttc.codegen.triton_loop import Renderer
from tttc.codegen.triton_tiles import Tile

from tttc.ir import ops
from tttc.ir.body import spec_of
from tttc.ir.build import dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.spec import Dims, parse

OPERATORS = (ops.elementwise, ops.contraction)
WAITS = 8192  # elements of a value from which it waits in shared memory for a reader after another product
NEAR = 2  # products after which a large argument may be loaded again


@dataclass
class Held(Tile):
    """A tile and its layout, empty for a scalar; ``raw``: it is in shared memory, and read from there."""

    layout: str = ""
    raw: bool = False


class GluonTiles(Renderer):
    """Tiles of two dimensions in accumulators, vectors as a sum leaves them, operands in shared memory."""

    lines: list[str]
    body: list[str]
    sequence: list[fx.Node]

    def __init__(self, loop: Loop, schedule: Schedule, homes: dict[str, str] | None = None) -> None:
        self.layouts = Layouts(schedule.num_warps)
        self.axes: dict[frozenset[str], Dims] = {}
        super().__init__(loop, schedule)
        self.at = ""  # the layout of the offsets being written
        self.within = ""  # the layout of the vectors being made
        self.copies: dict[str, str] = {}  # tiles in shared memory
        self.turned: dict[tuple[str, str], str] = {}  # tiles in other layouts
        self.homes = homes or {}  # layouts of vectors that are carried or loaded
        self.seen: dict[
            str, str
        ] = {}  # those in which carried ones are made, and loaded ones are read first
        self.origins: dict[
            str, str
        ] = {}  # arguments that vectors come from, themselves or number by number
        self.sequence = []
        self.products = 0  # matrix products so far
        self.reading = False
        self.fenced = True  # whether products see all copies
        self.waiting: set[fx.Node] = set()  # what is read again after another product
        self.repeated_here: set[fx.Node] = set()  # what is computed again there
        self.made: dict[fx.Node, int] = {}  # products before a value was computed
        self.first = 0  # products before the mini-batch
        self.begins: dict[
            int, dict[fx.Node, None]
        ] = {}  # copies to begin, by products of the mini-batch before them
        self.pending: set[str] = set()  # copies that may not be complete
        self.loaded: dict[fx.Node, int] = {}  # products before a large argument was loaded
        self.operands: set[fx.Node] = set()  # large operands of products
        self.waits: dict[fx.Node, int] = {}  # products before it was put into shared memory
        self.renewing: dict[
            fx.Node, tuple[str, set[fx.Node]]
        ] = {}  # states with copies, and who reads these
        self._check()
        self._choose_axes()

    def _check(self) -> None:
        """Refuse what this renderer has no form for."""
        if self.loop.tokens or self.loop.refresh:
            raise NotLowerable("mini-batches of tokens have no Gluon form yet")
        for d in self.dims:
            if self.side(d) != self.size(d):
                raise NotLowerable(f"{d} has {self.size(d)} elements, which is no power of two")
        for node in self.loop.graph.nodes:
            if node not in self.used or node.op != "call_function":
                continue
            if node.target is ops.rename:
                continue
            if node.target not in OPERATORS:
                raise NotLowerable(f"{node.target.__name__} has no Gluon form yet")
            if len(dims_of(node)) > 2 or len(parse(spec_of(node)).labels) > 3:
                raise NotLowerable(f"more than two dimensions: {spec_of(node)}")
            labels = self._dot_labels(node)
            if labels is None and len(parse(spec_of(node)).labels) > 2:
                raise NotLowerable(f"no product of warpgroups: {spec_of(node)}")

    def _choose_axes(self) -> None:
        """Which dimension of each pair is the rows of its tiles.

        Sums run along columns where they can, within a warp; else the wider dimension is the rows, which all
        warps share.
        """
        votes: dict[frozenset[str], dict[str, int]] = {}
        for node in self.loop.graph.nodes:
            if node not in self.used:
                continue
            dims = frozenset(dims_of(node))
            if len(dims) == 2:
                votes.setdefault(dims, {})
            if node.op != "call_function" or self._dot_labels(node) is not None:
                continue
            spec = parse(spec_of(node))
            if len(spec.labels) == 2 and len(spec.summed) == 1:
                (kept,) = set(spec.labels) - set(spec.summed)
                seen = votes.setdefault(frozenset(spec.labels), {})
                seen[kept] = seen.get(kept, 0) + 1
        for pair, seen in votes.items():
            rows = max(sorted(pair), key=lambda d: (seen.get(d, 0), self.side(d)))
            (columns,) = pair - {rows}
            warps = self.schedule.num_warps
            if not is_accumulator(self.side(rows), self.side(columns), warps):
                rows, columns = columns, rows
            if not is_accumulator(self.side(rows), self.side(columns), warps):
                raise NotLowerable(f"tiles of {rows} and {columns} are too small for warpgroups")
            self.axes[pair] = (rows, columns)

    def order(self, dims: Dims) -> Dims:
        """Rows and columns of a pair of dimensions."""
        return self.axes.get(frozenset(dims)) or super().order(dims)

    def _layout(self, dims: Dims) -> str:
        """The layout of values with two dimensions."""
        rows, columns = dims
        return self.layouts.accumulator(self.side(rows), self.side(columns))

    def let(
        self,
        prefix: str,
        value: str,
        dims: Dims,
        zero: frozenset[str] = frozenset(),
        note: str = "",
    ) -> Tile:
        """Assign a value to a new variable."""
        tile = super().let(prefix, value, dims, zero, note)
        layout = self._layout(dims) if len(dims) == 2 else self.within if dims else ""
        return Held(tile.name, dims, zero, layout)

    def offset(self, tensor: str, dims: Dims, rows: str | None) -> str:
        """The offsets of a tile, in the layout ``self.at``."""
        parts = []
        for axis, d in enumerate(dims):
            layout = self.layouts.slice(self.at, 1 - axis) if len(dims) == 2 else self.at
            place = f"gl.arange(0, {self.side(d)}, layout={layout}){self.index((d,), dims)}"
            of = d if d in self.strides[tensor] else "T"
            parts.append(f"{place} * {self.stride(tensor, of)}")
        return " + ".join(parts)

    def load(self, tensor: str, pointer: str, dims: Dims, rows: str | None) -> Tile:
        """Load a tile as it lies in memory; it is turned where it is used."""
        memory = self._as_stored(tensor, dims)
        sides = [self.side(d) for d in memory]
        if len(memory) == 2:
            self.at = self.layouts.rows_read(*sides)
        elif memory:
            self.at = self.homes.get(tensor, self.layouts.vector(*sides))
        name = self.fresh("x")
        offset = self.offset(tensor, memory, rows)
        value = f"gl.load({pointer} + {offset})" if offset else f"gl.load({pointer})"
        if len(memory) == 2 and self._narrow(tensor):
            shape, layout = self._shared(memory)
            self.write(
                f"{name}_s = gl.allocate_shared_memory(DOT, {shape}, {layout}, {value}.to(DOT))"
            )
            self.copies[name], self.fenced = f"{name}_s", False
            return Held(name, memory, frozenset(), self._layout(self.order(memory)), True)
        self.write(f"{name} = {value}.to(gl.float32)")
        self.origins[name] = tensor
        return Held(name, memory, frozenset(), self.at if memory else "")

    def _as_stored(self, tensor: str, dims: Dims) -> Dims:
        """The dimensions of a tile as the axes of a tensor follow each other, the closest elements last.

        Of saved states the wide ones are rows, see :mod:`tttc.runtime.saved_states`.
        """
        axes = self.strides[tensor]
        if tensor.startswith("saved_"):
            dims = tuple(sorted(dims, key=axes.index))
            return tuple(sorted(dims, key=lambda d: -self.loop.whole_size(d)))
        return tuple(sorted(dims, key=lambda d: axes.index(d if d in axes else "T")))

    def _narrow(self, tensor: str) -> bool:
        """Whether a matrix is in the dtype of operands, or read by products alone, which round it to that."""
        for node, source in self.loop.sources.items():
            if tensor in (source.name, f"saved_{source.name}") and source.kind != "state":
                passed = source.kind == "value" and self.schedule.narrow
                return source.kind == "token" or passed or only_products_read(self.loop, node)
        return False

    def store(self, tensor: str, pointer: str, tile: Tile, rows: str | None) -> None:
        """Store a tile, in rows as memory takes them best.

        What lies in shared memory as it does in device memory comes from there where the dtype is that of operands:
        threads need not exchange it once more.
        """
        memory = self._as_stored(tensor, tile.dims)
        kind = f"{self.argument(tensor)}.dtype.element_ty"
        value = f"{tile.name}.to({kind})"
        copy = None
        if len(memory) == 2:
            self.at = self.layouts.rows_read(*(self.side(d) for d in memory))
            if memory != tile.dims:
                value = f"gl.permute({value}, (1, 0))"
            else:
                copy = self.copies.get(tile.name)
            value = f"gl.convert_layout({value}, {self.at})"
        elif memory:
            assert isinstance(tile, Held)
            self.at = tile.layout
        offset = self.offset(tensor, memory, rows)
        address = f"{pointer} + {offset}" if offset else pointer
        if copy is None:
            self.write(f"gl.store({address}, {value})")
            return
        self.write(f"if {kind} == DOT:")
        self.write(f"    gl.store({address}, {copy}.load({self.at}))")
        self.write("else:")
        self.write(f"    gl.store({address}, {value})")

    def in_layout(self, tile: Held, layout: str, turn: bool = False) -> str:
        """The name of a tile in a layout, its axes turned first where asked."""
        if not tile.dims or (tile.layout == layout and not turn):
            return tile.name
        key = (tile.name, layout)
        if len(tile.dims) == 1 and tile.name in self.origins:
            self.seen.setdefault(self.origins[tile.name], layout)
        if key not in self.turned:
            value = f"gl.permute({tile.name}, (1, 0))" if turn else tile.name
            self.turned[key] = self.fresh("l")
            self.write(f"{self.turned[key]} = gl.convert_layout({value}, {layout})")
        return self.turned[key]

    def line_up(self, tile: Tile, target: Dims) -> str:
        """A tile in the layout of tiles over ``target``."""
        assert isinstance(tile, Held)
        if not tile.dims:
            return tile.name
        if len(target) == 1:
            return self.in_layout(tile, self.within)
        layout = self._layout(target)
        if len(tile.dims) == 1:
            part = self.layouts.slice(layout, 1 - target.index(tile.dims[0]))
            return self.in_layout(tile, part) + self.index(tile.dims, target)
        return self.in_layout(tile, layout, turn=tile.dims != target)

    def tile(self, x: Any) -> Tile:
        """The tile of a node or number; what waits in shared memory is read from there."""
        if self.schedule.reload and x in self.loaded and self.loaded[x] + NEAR < self.products:
            self._load(x)
        tile = super().tile(x)
        if not isinstance(tile, Held):
            return Held(tile.name, (), frozenset())
        if x in self.repeated_here and self.made[x] < self.products and not self.reading:
            self._make(x)
            return self.tiles[x]
        waits = tile.raw or self.waits.get(x, self.products) < self.products
        return self._read(tile) if waits and not self.reading else tile

    def _read(self, tile: Held) -> Held:
        """A tile from its copy in shared memory, its axes in the kernel's order."""
        self._wait_for(tile)
        key, target = (tile.name, f"after {self.products} products"), self.order(tile.dims)
        if key not in self.turned:
            turned = "" if target == tile.dims else ".permute((1, 0))"
            name = self.turned[key] = self.fresh("r")
            source = f"{self.copies[tile.name]}{turned}"
            self.write(f"{name} = {source}.load({self._layout(target)}).to(gl.float32)")
        return Held(self.turned[key], target, tile.zero, self._layout(target))

    def copy(self, tile: Tile) -> str:
        """The copy of a tile in shared memory."""
        self._wait_for(tile)
        if tile.name not in self.copies:
            shape, layout = self._shared(tile.dims)
            name = self.copies[tile.name] = f"{tile.name}_s"
            value = f"{tile.name}.to(DOT)"
            self.write(f"{name} = gl.allocate_shared_memory(DOT, {shape}, {layout}, {value})")
            self.fenced = False
        return self.copies[tile.name]

    def _shared(self, dims: Dims) -> tuple[str, str]:
        rows, columns = (self.side(d) for d in dims)
        return f"[{rows}, {columns}]", self.layouts.shared(rows, columns)

    def _size(self, node: fx.Node) -> int:
        return math.prod(self.side(d) for d in dims_of(node))

    def _zeros(self, dims: Dims, layout: str = "") -> str:
        shape = ", ".join(str(self.side(d)) for d in dims)
        return f"gl.zeros([{shape}], gl.float32, {layout or self._layout(dims)})"
