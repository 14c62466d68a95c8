"""Rendering a :class:`~tttc.codegen.loop.Loop` so that each warp holds a piece of its widest dimension.

A mini-batch of 16 tokens is too few for warpgroups, and products of few tokens by many features keep no warp busy for
long: what takes time is that warps wait for each other. Here a warp has its own piece of the widest dimension, of the
state too, which stays in the accumulators of its matrix unit. Products that keep the dimension need no other warp; those
that sum over it leave each warp with a part, and the parts are added up as late as possible::

    z[w t j] = x[t i] W[i w j];  y[t i] = sum over w of (f(z)[w t j] V[w j i])

Values without the dimension are spread over all threads, rows within a warp. Written in Gluon, for its layouts.

Source: the accumulators of ``mma.m16n8k16`` are laid out as its operands are (PTX ISA), so that products follow each
other in registers.
"""

from __future__ import annotations

from torch import fx
from tttc.codegen.exchanges import fewer_barriers
from tttc.codegen.gluon_source import for_warps
from tttc.codegen.loop import Loop, forgotten
from tttc.codegen.not_finite import any_not_finite
from tttc.codegen.ordering import on_demand, products_first
from tttc.codegen.schedule import Schedule
from tttc.codegen.triton_tiles import Tile
from tttc.codegen.warp_operators import WarpOperators
from tttc.codegen.warp_tiles import Share

from tttc.ir.build import ancestors, dims_of
from tttc.ir.errors import NotLowerable

OF_ALL = """

@gluon.jit
def of_all(x, shape: gl.constexpr, layout: gl.constexpr):
    \"\"\"A matrix that all warps have.\"\"\"
    everywhere = gl.full(shape, 0, x.dtype, layout)
    made, _ = gl.broadcast(gl.expand_dims(x, 0), everywhere)
    return made
"""


class WarpRenderer(WarpOperators):
    """Renders one loop for warps that each hold a piece."""

    lines: list[str]
    indent: int
    tiles: dict[fx.Node, Tile]

    def render(self) -> str:
        """The source of the kernel."""
        self._declare_arguments()
        self._prologue()
        self._parameters()
        self._turns()
        if self.schedule.nan == "again":
            axes = {f"{n}_v": len(d) + self.spread(d) for n, d in self._state_dims().items()}
            states = any_not_finite(axes.items())
            self.write(f"if {states}:  # once more, with care for what is not finite")
            self.indent += 1
            self.exact = True
            self._turns()
            self.indent -= 1
        self._epilogue()
        self.body, self.lines, self.indent = self.lines, [], 0
        self._header()
        return "\n".join([*self.lines, *self.body]) + "\n"

    def _header(self) -> None:
        super()._header()
        before = [*self.layouts.lines(), *OF_ALL.splitlines()]
        self.lines, self.body = for_warps(self.lines, self.body, before)

    def _prologue(self) -> None:
        self.write("head = (gl.program_id(0) % H).to(gl.int64)")
        self.write("sequence = (gl.program_id(0) // H).to(gl.int64)")
        self.write(f"N = gl.cdiv(T, {self.loop.mini_batch_size})")
        self._pointers()

    def _turns(self) -> None:
        """All mini-batches, from the states to start from."""
        self.tiles = {n: t for n, t in self.tiles.items() if n in self.invariant}
        for name, dims in self._state_dims().items():
            tile = self.load(name, f"{name}_ptr", dims, None)
            self.write(f"{name}_v = {tile.name}")
        for node, source in self.loop.sources.items():
            if source.kind == "state":
                self.tiles[node] = self._state_tile(source.name, dims_of(node))
        self._store_copies()
        self.write("first = 0")
        self._start_copies("0")
        before = len(self.lines)
        self.write("for n in range(0, N):")
        self.indent += 1
        self._mini_batch()
        self.indent -= 1
        self.write("async_copy.wait_group(0)  # what comes next may use the same rooms")
        self.lines[before:before] = [
            f"{'    ' * self.indent}{name} = {room}" for name, room in self.rooms.items()
        ]
        self.rooms.clear()
        self._forget()

    def _mini_batch(self) -> None:
        self._forget()
        self.rows = {}
        b = self.loop.mini_batch_size
        self.write(f"first = n * {b}")
        self.write(f"count = gl.minimum(T - first, {b})")
        self._save_states()
        for node in self._vectors():
            tensor, dims = self.loop.sources[node].name, dims_of(node)
            self.write(f"{tensor}_row_s = {self._room(node)}.index(n & 1)")
            self.copies[f"{tensor}_row"], self.rows[f"{tensor}_row"] = f"{tensor}_row_s", tensor
            self.tiles[node] = Share(
                f"{tensor}_row", dims, frozenset(), self.natural(dims), raw=True
            )
        self.write("async_copy.wait_group(0)")
        for node in (
            self._last()
        ):  # a row ends with it: tokens beyond the sequence are copies of its last one
            tensor = self._last_tensor(node)
            words = f"{tensor}_row_s.slice({b - 1}, 1).load({self.layouts.vector(1)})"
            value = self._numbers_of(tensor, words, self._place_of_last(tensor))
            self.tiles[node] = self.let("x", f"gl.sum({value}, 0)", ())
        for node in self._matrices():
            tensor, memory = self.loop.sources[node].name, self._memory(node)
            name = self.fresh("x")
            self.write(f"{name}_s = {self._room(node)}.index(n & 1)")
            self.copies[name] = f"{name}_s"
            self.tiles[node] = Share(name, memory, frozenset(), self.natural(memory), raw=True)
        body = len(self.lines)
        self.write(f"first = gl.minimum(n + 1, N - 1) * {b}")
        self._start_copies("(n + 1) & 1")
        self.write(f"first = n * {b}")
        start = self.lines[body:]
        del self.lines[body:]
        for node in self._sequence():
            if node not in self.tiles and not self._deferred(node):
                self.emit(node)
            if node in self.tiles:
                self._keep(node)
        for node in self.results:
            if node in self.loop.sources:
                self._keep(node)
        self.lines[body:] = fewer_barriers(
            self.lines[body:], self.rooms, self.packed, self._filled(), start
        )
        self._renew()
        self._store_copies()

    def _order(self) -> list[fx.Node]:
        """Each value right before it is read, results of tokens before new states: those wait for nobody."""
        nodes = [
            n for n in self.loop.graph.nodes
            if n.op == "call_function" and n in self.used and n not in self._fetched()
        ]  # fmt: skip
        results = [n for n, s in self.loop.sinks if s.kind != "state"]
        results += [n for n, s in self.loop.sinks if s.kind == "state"]
        order = on_demand(
            nodes, results, lambda n: len(dims_of(n)) < 2, self._updates_last(nodes), freeing=True
        )
        return products_first(order)

    def _sequence(self) -> list[fx.Node]:
        """New states are made between the last product of the results and what else these need, which waits."""
        order = self._order()
        needed = ancestors(n for n, s in self.loop.sinks if s.kind != "state")
        made = [
            i for i, n in enumerate(order)
            if n in needed and any(self._dot_labels(x) for x in (n, *n.all_input_nodes) if x in order)
        ]  # fmt: skip
        cut = max(made, default=len(order) - 1) + 1
        tail = [n for n in order[cut:] if n in needed]
        waiting, ready = [n for n in order[cut:] if n not in needed], []
        for node in waiting:
            if not any(
                x in tail or (x in waiting and x not in ready) for x in node.all_input_nodes
            ):
                ready.append(node)
        return [*order[:cut], *ready, *tail, *(n for n in waiting if n not in ready)]

    def _keep(self, node: fx.Node) -> None:
        """Store what a node goes to as soon as it is made."""
        for sink in self.results.get(node, ()):
            self.store(sink.name, f"{sink.name}_ptr", self.tile(node), "rows")

    def _renew(self) -> None:
        """The states take their new values, all at once."""
        values = []
        for node, sink in self.loop.sinks:
            if sink.kind == "state":
                tile = self.tile(node)
                values.append((sink.name, self.line_up(tile, self.order(dims_of(node)))))
        for name, value in values:
            if value != f"{name}_v":
                self.write(f"{name}_v = {value}")


def warp_renderer(loop: Loop, schedule: Schedule) -> WarpRenderer:
    """A renderer for warps that share the widest dimension of a loop.

    Raises:
        NotLowerable: where the loop has no such form.
    """
    renderer = WarpRenderer(loop, schedule)
    if schedule.nan == "again" and (name := forgotten(loop)):
        raise NotLowerable(f"what is not finite may not show in {name} at the end")
    return renderer
