"""Copies from device memory to shared memory that are under way before they are read."""

from __future__ import annotations

import math

from torch import fx
from tttc.codegen.gluon_tiles import NEAR, WAITS, GluonTiles, Held
from tttc.codegen.triton_tiles import Tile

from tttc.ir.build import dims_of
from tttc.ir.spec import Dims


class GluonCopies(GluonTiles):
    """Small tiles a turn of the loop ahead, others a product ahead."""

    begins: dict[int, dict[fx.Node, None]]

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
        place = {n: i for i, n in enumerate(self.loop.graph.nodes)}
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
            for x in sorted(set().union(*(read(y) for y in inputs)), key=place.__getitem__):
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

    def _load(self, node: fx.Node) -> None:
        super()._load(node)
        if math.prod(self.side(d) for d in dims_of(node)) >= WAITS:
            self.loaded[node] = self.products
