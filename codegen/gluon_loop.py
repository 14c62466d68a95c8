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
from typing import Any

from torch import fx
from tttc.codegen.gluon_copies import GluonCopies
from tttc.codegen.gluon_source import START_COPY, in_gluon
from tttc.codegen.gluon_tiles import WAITS, Held
from tttc.codegen.loop import Loop
from tttc.codegen.schedule import Schedule
from tttc.codegen.triton_functions import FUNCTIONS
from tttc.codegen.triton_tiles import Tile
from tttc.codegen.waiting import kept_and_repeated

from tttc.ir import ops
from tttc.ir.body import operands_of, spec_of
from tttc.ir.build import dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.spec import Dims, parse

SHARED_BYTES = 227 * 1024  # of a multiprocessor of sm_90, for one program


class GluonRenderer(GluonCopies):
    """Renders one loop for warpgroups."""

    lines: list[str]
    body: list[str]
    fenced: bool

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

    def sum_kind(self, node: fx.Node) -> None:
        """Sums are made one by one: their tiles have layouts of their own."""

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
        copies = self.schedule.prefetch or self.schedule.early
        names = ["async_copy"] if copies else []
        names += ["fence_async_shared", "warpgroup_mma"]
        self.lines, self.body = in_gluon(
            self.lines,
            self.body,
            [f"from triton.experimental.gluon.language.nvidia.hopper import {', '.join(names)}"],
            [*self.layouts.lines(), *(START_COPY.splitlines() if copies else ())],
        )


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
