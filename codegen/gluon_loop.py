"""Rendering a :class:`~tttc.codegen.loop.Loop` for Hopper, through Gluon.

What is computed, in which order and from where is the plain renderer's; this one says which threads hold a tile. A
tile of two dimensions is what a product of warpgroups leaves in registers (float32), so that the state stays in
accumulators; the operands of products are copies in shared memory in the dtype of the tokens, which are read either
way round. Large values that are read again after another product wait there too.

Source: asynchronous warpgroup matrix products and layouts as in Gluon's documentation (triton.experimental.gluon).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx
from tttc.codegen.gluon_layouts import Layouts, is_accumulator
from tttc.codegen.loop import Loop, only_products_read
from tttc.codegen.schedule import Schedule
from tttc.codegen.triton_functions import FUNCTIONS
from tttc.codegen.triton_loop import Renderer
from tttc.codegen.triton_tiles import Tile
from tttc.codegen.waiting import kept_and_repeated

from tttc.ir import ops
from tttc.ir.body import operands_of, spec_of
from tttc.ir.build import dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.spec import Dims, parse

OPERATORS = (ops.elementwise, ops.contraction)
SHARED_BYTES = 227 * 1024  # of a multiprocessor of sm_90, for one program
NEAR = 2  # products after which a large argument may be loaded again
WAITS = 8192  # elements of a value from which it waits in shared memory for a reader after another product


@dataclass
class Held(Tile):
    """A tile and its layout, empty for a scalar; ``raw``: it is in shared memory, and read from there."""

    layout: str = ""
    raw: bool = False


class GluonRenderer(Renderer):
    """Renders one loop for warpgroups."""

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

    # -- what can be held --------------------------------------------------------------------------------

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

    # -- writing -------------------------------------------------------------------------------------------

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
        """The dimensions of a tile as the axes of a tensor follow each other, the closest elements last."""
        axes = self.strides[tensor]
        return tuple(sorted(dims, key=lambda d: axes.index(d if d in axes else "T")))

    def _narrow(self, tensor: str) -> bool:
        """Whether a matrix is in the dtype of operands, or read by products alone, which round it to that."""
        for node, source in self.loop.sources.items():
            if tensor in (source.name, f"saved_{source.name}") and source.kind != "state":
                passed = source.kind == "value" and self.schedule.narrow
                return source.kind == "token" or passed or only_products_read(self.loop, node)
        return False

    def store(self, tensor: str, pointer: str, tile: Tile, rows: str | None) -> None:
        """Store a tile, in rows as memory takes them best."""
        memory = self._as_stored(tensor, tile.dims)
        value = f"{tile.name}.to({self.argument(tensor)}.dtype.element_ty)"
        if len(memory) == 2:
            self.at = self.layouts.rows_read(*(self.side(d) for d in memory))
            if memory != tile.dims:
                value = f"gl.permute({value}, (1, 0))"
            value = f"gl.convert_layout({value}, {self.at})"
        elif memory:
            assert isinstance(tile, Held)
            self.at = tile.layout
        offset = self.offset(tensor, memory, rows)
        address = f"{pointer} + {offset}" if offset else pointer
        self.write(f"gl.store({address}, {value})")

    # -- layouts -------------------------------------------------------------------------------------------

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

    # -- products -------------------------------------------------------------------------------------------

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

    def _operand(self, tile: Tile, dims: Dims) -> str:
        name = self.copy(tile)
        return name if tile.dims == dims else f"{name}.permute((1, 0))"

    def negated(self, tile: Tile) -> Tile:
        """The tile times minus one."""
        assert isinstance(tile, Held)
        key = (tile.name, "negative")
        if key not in self.turned:
            self.turned[key] = self.fresh("n")
            value = self._read(tile) if tile.raw else tile
            self.write(f"{self.turned[key]} = -{value.name}")
        dims = self.order(tile.dims) if tile.raw else tile.dims
        return Held(self.turned[key], dims, tile.zero, tile.layout)

    def _is_tile(self, x: Any, target: Dims) -> bool:
        return isinstance(x, fx.Node) and x in self.tiles and self.order(dims_of(x)) == target

    def _dot(self, node: fx.Node, accumulator: Tile | None = None, negative: bool = False) -> Tile:
        self.reading = True  # operands are read from shared memory as they are
        made = super()._dot(node, accumulator, negative)
        self.reading = False
        self.products += 1
        self._begin_copies()
        return Held(made.name, made.dims, made.zero, self._layout(made.dims))

    def _product(
        self, left: Tile, right: Tile, labels: tuple[str, str, str], accumulator: Tile | None
    ) -> str:
        rows, columns, inner = labels
        a, b = self._operand(left, (rows, inner)), self._operand(right, (inner, columns))
        if not self.fenced:
            self.write("fence_async_shared()")
            self.fenced = True
        if accumulator is not None:
            return f"warpgroup_mma({a}, {b}, {self.line_up(accumulator, (rows, columns))})"
        return f"warpgroup_mma({a}, {b}, {self._zeros((rows, columns))}, use_acc=False)"

    def _zeros(self, dims: Dims, layout: str = "") -> str:
        shape = ", ".join(str(self.side(d)) for d in dims)
        return f"gl.zeros([{shape}], gl.float32, {layout or self._layout(dims)})"

    # -- operators --------------------------------------------------------------------------------------------

    def emit(self, node: fx.Node) -> None:
        """One operator; what is read again after another product is put into shared memory."""
        self._make(node)
        tile = self.tiles[node]
        if node in self.waiting:
            self.waits[node] = self.products
        if node in self.waiting or node in self.operands:
            self.copy(tile)
        if node in self.renewing:
            name, readers = self.renewing[node]
            if not readers & set(self.sequence[self.sequence.index(node) + 1 :]):
                self._renew_copy(name, tile)

    def _make(self, node: fx.Node) -> None:
        if node.target is ops.rename:
            self.tiles[node] = self._renamed(node)
        else:
            super().emit(node)
        self.made[node] = self.products

    def _renamed(self, node: fx.Node) -> Held:
        """The same tile; where its axes are not in the order of the new names it is turned where it is read."""
        (source,) = operands_of(node)
        tile = self.tile(source)
        assert isinstance(tile, Held)
        names = dict(zip(dims_of(source), dims_of(node), strict=True))
        dims = tuple(names[d] for d in tile.dims)
        return Held(tile.name, dims, frozenset(), tile.layout, tile.raw)

    def _load(self, node: fx.Node) -> None:
        super()._load(node)
        if math.prod(self.side(d) for d in dims_of(node)) >= WAITS:
            self.loaded[node] = self.products

    def _renew_copy(self, name: str, tile: Tile) -> None:
        """The copy of a state in shared memory takes the new value."""
        self.write(f"{name}_s.store({tile.name}.to(DOT))")
        self.copies[tile.name] = f"{name}_s"
        self.fenced = False

    def _elementwise(self, node: fx.Node) -> Tile:
        if "propagate_nan" in FUNCTIONS[str(node.args[0])]:
            raise NotLowerable(f"{node.args[0]} has no Gluon form yet")
        if len(dims_of(node)) == 1:
            tiles = [self.tile(x) for x in operands_of(node) if isinstance(x, fx.Node)]
            found = [t.layout for t in tiles if isinstance(t, Held) and t.dims]
            self.within = next((x for x in found if not x.startswith("VECTOR")), found[0])
        made = super()._elementwise(node)
        if len(made.dims) == 1:
            tiles = [self.tile(x) for x in operands_of(node) if isinstance(x, fx.Node)]
            loaded = [self.origins[t.name] for t in tiles if t.name in self.origins]
            if loaded and all(t.name in self.origins or not t.dims for t in tiles):
                self.origins[made.name] = loaded[0]
        return made

    def _broadcast_product(self, node: fx.Node, tiles: list[Tile], masked: bool = False) -> Tile:
        spec = parse(spec_of(node))
        every = self.order(tuple(dict.fromkeys(d for t in tiles for d in t.dims)))
        if len(every) == 1:
            self.within = next(t.layout for t in tiles if isinstance(t, Held) and t.dims)
        result = self.order(spec.result)
        value = " * ".join(self.line_up(t, every) for t in tiles)
        summed = [d for d in reversed(every) if d not in result]
        for d in summed:
            value = f"gl.sum({value}, {every.index(d)})"
        if len(every) == 2 and len(result) == 1:
            self.within = self.layouts.slice(self._layout(every), every.index(summed[0]))
        return self.let("c" if summed else "e", value, result, note=str(spec) if summed else "")

    # -- the kernel -------------------------------------------------------------------------------------------

    def _sequence(self) -> list[fx.Node]:
        self.sequence = super()._sequence()
        made = [n for n in self.sequence if not self._deferred(n)]

        def is_product(n: fx.Node) -> bool:
            return n in products

        def is_wide(n: fx.Node) -> bool:
            return len(dims_of(n)) == 2 and math.prod(self.side(d) for d in dims_of(n)) >= WAITS

        def is_large(n: fx.Node) -> bool:
            return is_wide(n) and n not in states

        def is_there(n: fx.Node) -> bool:
            return n in self.operands or n in self.loop.sources

        products = {
            n
            for n in made
            if self._dot_labels(n) is not None or any(self._deferred(x) for x in n.all_input_nodes)
        }
        new = {node for node, sink in self.loop.sinks if sink.kind == "state"}
        states = self._states()
        self.operands = {
            n for n in made
            if is_wide(n) and n not in new and any(self._dot_labels(u) for u in n.users)
        }  # fmt: skip
        self.waiting, self.repeated_here = kept_and_repeated(made, is_product, is_large, is_there)
        self._plan_copies(made, products)
        for (
            node
        ) in self._fetched():  # vectors take a register each: they are on their way from the start
            if len(dims_of(node)) < 2:
                self._load(node)
        self._begin_copies()
        return self.sequence

    def _states(self) -> set[fx.Node]:
        """States, and what is made of them number by number: they are never rounded on their way to the next one."""
        found = {n for n, source in self.loop.sources.items() if source.kind == "state"}
        for node in self.loop.graph.nodes:
            if node.target is ops.elementwise and any(
                x in found and set(dims_of(x)) == set(dims_of(node)) for x in node.all_input_nodes
            ):
                found.add(node)
        return found

    def _invariants(self) -> None:
        """Parameters, and states to start from: in accumulators, with copies where products read them."""
        for node, source in self.loop.sources.items():
            if source.kind in ("shared", "constant") and node in self.used:
                tile = self.load(source.name, f"{source.name}_ptr", dims_of(node), None)
                self.tiles[node] = tile
                # In the layout that it is read in it would take registers all along.
                self.origins.pop(tile.name, None)
        states = {} if self.loop.parallel else self._state_dims()
        for name, dims in states.items():
            tile = self.load(name, f"{name}_ptr", dims, None)
            target = self.order(dims)
            held = self._state_tile(name, dims)
            self.within = held.layout
            self.write(f"{held.name} = {self.line_up(tile, target)}")
        new = {sink.name: node for node, sink in self.loop.sinks if sink.kind == "state"}
        for node, source in self.loop.sources.items():
            if source.kind != "state" or source.name not in states:
                continue
            name, dims = source.name, dims_of(node)
            tile = self.tiles[node] = self._state_tile(name, dims)
            readers = self._copy_readers(node)
            if readers:
                shape, layout = self._shared(tile.dims)
                value = f"{tile.name}.to(DOT)"
                self.write(f"{name}_s = gl.allocate_shared_memory(DOT, {shape}, {layout}, {value})")
                self.copies[tile.name] = f"{name}_s"
                self.fenced = False
                if name in new:
                    self.renewing[new[name]] = (name, readers)
        for node in self._ahead():
            memory = self._as_stored(self._tensor(node), dims_of(node))
            rows, columns = (self.side(d) for d in memory)
            layout = self.layouts.shared(rows, columns)
            shape = f"[2, {rows}, {columns}]"
            self.write(
                f"{self._slot(self._tensor(node))} = gl.allocate_shared_memory(DOT, {shape}, {layout})"
            )
        for node, sink in self.loop.sinks:
            if sink.kind == "sum":
                tile = self._sum_tile(node, sink.name)
                self.write(f"{tile.name} = {self._zeros(tile.dims, tile.layout)}" if tile.dims
                           else f"{tile.name} = 0.0")  # fmt: skip
        self.invariant = set(self.tiles)

    def _copy_readers(self, node: fx.Node) -> set[fx.Node]:
        """Whose lines read the copy of a value: products, or the sums that make them, also under other names."""
        found: set[fx.Node] = set()
        for user in node.users:
            if user not in self.used:
                continue
            if user.target is ops.rename:
                found |= self._copy_readers(user)
            elif self._dot_labels(user) is not None:
                found |= (
                    {u for u in user.users if u in self.used} if self._deferred(user) else {user}
                )
        return found

    def _home(self, name: str, dims: Dims) -> str:
        """The layout of what is carried from mini-batch to mini-batch."""
        if len(dims) == 2:
            return self._layout(self.order(dims))
        return self.homes.get(name, self.layouts.vector(self.side(dims[0]))) if dims else ""

    def _state_tile(self, name: str, dims: Dims) -> Held:
        return Held(name + "_v", self.order(dims), frozenset(), self._home(name, dims))

    def _sum_tile(self, node: fx.Node, name: str) -> Held:
        return self._state_tile(name, dims_of(node))

    # -- loads ahead of their use -----------------------------------------------------------------------------

    def _ahead(self) -> list[fx.Node]:
        """The small matrices that are copied into shared memory a turn of the loop before they are read."""
        small = [n for n in self._fetched() if self._copied(n) and self._size(n) < WAITS]
        return small if self.schedule.prefetch else []

    def _copied(self, node: fx.Node) -> bool:
        """Whether an argument goes straight to shared memory."""
        return (
            len(dims_of(node)) == 2
            and node in self.loop.sources
            and self._narrow(self._tensor(node))
        )

    def _size(self, node: fx.Node) -> int:
        return math.prod(self.side(d) for d in dims_of(node))

    def _tensor(self, node: fx.Node) -> str:
        return self._place(node, "n", "")[0]

    def _slot(self, tensor: str) -> str:
        return f"{tensor}_turns"

    def _start_copy(self, node: fx.Node, target: str, n: str, suffix: str) -> None:
        """Begin to copy what mini-batch ``n`` reads into shared memory."""
        tensor, pointer, dims, rows = self._place(node, n, suffix)
        memory = self._as_stored(tensor, dims)
        self.at = self.layouts.rows_read(*(self.side(d) for d in memory))
        self.write(f"start_copy({target}, {pointer} + {self.offset(tensor, memory, rows)})")

    def _prefetch(self, slot: str = "following & 1") -> None:
        for node in self._ahead():
            target = f"{self._slot(self._tensor(node))}.index({slot})"
            self._start_copy(node, target, "following", "_f")
        self.write("async_copy.commit_group()")

    def _arrived(self) -> None:
        self.write("async_copy.wait_group(0)")
        self.fenced = False
        for node in self._ahead():
            tensor, _, dims, _ = self._place(node, "n", "")
            memory = self._as_stored(tensor, dims)
            name = self.fresh("x")
            self.write(f"{name}_s = {self._slot(tensor)}.index(n & 1)")
            self._arrives(node, name, memory)
        forwards = not self.loop.reverse or self.loop.parallel
        after = "gl.minimum(n + 1, N - 1)" if forwards else "gl.maximum(n - 1, 0)"
        self.write(f"following = {after}")
        self._prefetch("(n + 1) & 1")

    def _arrives(self, node: fx.Node, name: str, memory: Dims) -> None:
        self.copies[name] = f"{name}_s"
        self.tiles[node] = Held(name, memory, frozenset(), self._layout(self.order(memory)), True)

    def _plan_copies(self, made: list[fx.Node], products: set[fx.Node]) -> None:
        """After which product the copies begin of what is read after the next one."""
        self.first = self.products
        fetched = {n for n in self._fetched() if self._copied(n) and n not in self._ahead()}
        segment: dict[fx.Node, int] = {}
        self.begins = {}
        last: dict[fx.Node, int] = {}
        now = 0

        def read(node: fx.Node) -> set[fx.Node]:
            if node in fetched:
                return {node}
            if node in self.repeated_here and segment[node] < now:
                return set().union(*(read(x) for x in node.all_input_nodes))
            return set()

        for node in made:
            inputs = [
                y
                for x in node.all_input_nodes
                for y in (x.all_input_nodes if self._deferred(x) else (x,))
            ]
            for x in sorted(set().union(*(read(y) for y in inputs)), key=made_order(self.loop)):
                far = (
                    self.schedule.reload
                    and self._size(x) >= WAITS
                    and last.get(x, now) + NEAR < now
                )
                if x not in last or far:
                    last[x] = now
                    self.begins.setdefault(max(now - 1, 0), {})[x] = None
            now += node in products
            segment[node] = now

    def _begin_copies(self) -> None:
        """Begin the copies that are due after as many products."""
        due = self.begins.pop(self.products - self.first, {}) if self.schedule.early else {}
        for node in due:
            tensor, _, dims, _ = self._place(node, "n", "")
            memory = self._as_stored(tensor, dims)
            shape, layout = self._shared(memory)
            name = self.fresh("x")
            self.write(f"{name}_s = gl.allocate_shared_memory(DOT, {shape}, {layout})")
            self._start_copy(node, f"{name}_s", "n", "")
            self._arrives(node, name, memory)
            self.loaded[node] = self.products + 1
            self.pending.add(name)
        if due:
            self.write("async_copy.commit_group()")

    def _wait_for(self, tile: Tile) -> None:
        """Wait until a tile is in shared memory."""
        if tile.name in self.pending:
            self.write("async_copy.wait_group(0)")
            self.pending.clear()
            self.fenced = False

    def _carried(self, name: str, node: fx.Node) -> str:
        """A value in the layout of what is carried under a name."""
        tile = self.tiles[node]
        assert isinstance(tile, Held)
        if len(tile.dims) == 1:
            self.seen.setdefault(name, tile.layout)
        self.within = self._home(name, dims_of(node))
        return self.line_up(tile, self.order(dims_of(node)))

    def _keep(self, node: fx.Node) -> None:
        """As in plain kernels; sums are added up in the layout they are kept in."""
        sums = [s for s in self.results.get(node, ()) if s.kind == "sum"]
        for sink in sums:
            self.write(f"{sink.name}_v += {self._carried(sink.name, node)}")
        others = [s for s in self.results.get(node, ()) if s.kind != "sum"]
        if others:
            self.results[node] = others
            super()._keep(node)

    def _renew(self) -> None:
        """The states and their copies take their new values."""
        for node, sink in self.loop.sinks:
            new = sink.kind == "state" and node in self.renewing
            if new and self.tiles[node].name not in self.copies:
                self._renew_copy(sink.name, self.tiles[node])
        values = [
            (s.name, self._carried(s.name, n)) for n, s in self.loop.sinks if s.kind == "state"
        ]
        for name, value in values:
            if value != f"{name}_v":
                self.write(f"{name}_v = {value}")

    def _epilogue(self) -> None:
        self.turned.clear()
        super()._epilogue()

    def _prologue(self) -> None:
        self.write("head = (gl.program_id(0) % H).to(gl.int64)")
        self.write("sequence = (gl.program_id(0) // H).to(gl.int64)")
        self.write("N = T")
        self._pointers()

    def _header(self) -> None:
        super()._header()
        start = self.lines.index("import triton")
        definitions = self.layouts.lines()
        copies = self.schedule.prefetch or self.schedule.early
        names = ["async_copy"] if copies else []
        names += ["fence_async_shared", "warpgroup_mma"]
        self.lines[start : start + 2] = [
            "from triton.experimental import gluon",
            "from triton.experimental.gluon import language as gl",
            f"from triton.experimental.gluon.language.nvidia.hopper import {', '.join(names)}",
            "",
            *definitions,
            *(START_COPY.splitlines() if copies else ()),
        ]
        self.lines = [_in_gluon(line) for line in self.lines]
        self.body = [_in_gluon(line) for line in self.body]


START_COPY = """

@gluon.jit
def start_copy(target, address):
    if address.dtype.element_ty == target.dtype:
        async_copy.async_copy_global_to_shared(target, address)
    else:
        target.store(gl.load(address).to(target.dtype))

"""


def made_order(loop: Loop) -> Callable[[fx.Node], int]:
    """The places of nodes in a graph, to sort by."""
    return {n: i for i, n in enumerate(loop.graph.nodes)}.__getitem__


def _in_gluon(line: str) -> str:
    """Triton's names by those of Gluon, which are the same."""
    line = line.replace("@triton.jit", "@gluon.jit").replace("tl.range(", "range(")
    return re.sub(r"\btl\.", "gl.", line)


def gluon_renderer(loop: Loop, schedule: Schedule) -> GluonRenderer:
    """A renderer that has seen in which layouts vectors are made that are carried.

    Raises:
        NotLowerable: where the loop has no Gluon form.
    """
    first = GluonRenderer(loop, schedule)
    source = first.render()
    if (needed := shared_bytes(source)) > SHARED_BYTES:
        raise NotLowerable(f"{needed} bytes of shared memory, of {SHARED_BYTES}")
    return GluonRenderer(loop, schedule, first.seen)


def shared_bytes(source: str) -> int:
    """The least a kernel takes of shared memory: what is alive at a time."""
    lines = source.splitlines()
    change = [0] * (len(lines) + 1)
    for at, line in enumerate(lines):
        if found := re.match(r" *(\w+) = gl.allocate_shared_memory\(DOT, \[([0-9, ]+)\]", line):
            size = 2 * math.prod(int(n) for n in found[2].split(","))
            uses = [i for i, x in enumerate(lines) if re.search(rf"\b{found[1]}\b", x)]
            # What is there before the loop is there in all of it.
            last = len(lines) - 1 if line.startswith("    " + found[1]) else max(uses)
            change[at] += size
            change[last + 1] -= size
    return max(itertools.accumulate(change))
