"""Arguments of a kernel: their strides, and tiles loaded from them and stored to them."""

from __future__ import annotations

import math

from torch import fx
from tttc.codegen.loop import Source
from tttc.codegen.triton_tiles import Tile, Tiles, base

from tttc.ir.body import EARLIER, TOKEN
from tttc.ir.build import dims_of
from tttc.ir.spec import Dims


class Memory(Tiles):
    """Tensors in device memory."""

    def declare(self, tensor: str, lead: tuple[str, ...], dims: Dims) -> None:
        """A tensor argument with its strides."""
        if tensor in self.strides:
            return
        self.strides[tensor] = [*lead, *dims]
        piece = self.loop.piece(tensor)
        if piece is None:
            self.arguments.append(tensor)
        else:
            self.declare(piece.of, lead, dims)

    def stride(self, tensor: str, axis: str) -> str:
        """The stride of an argument along an axis: an argument too, but for what kernels pass to each other."""
        if piece := self.loop.piece(tensor):
            tensor = piece.of
        if tensor in self.values:
            sizes = ["B", "H", "N", *map(str, self.values[tensor])]
            after = sizes[self.strides[tensor].index(axis) + 1 :]
            numbers = math.prod(int(n) for n in after if n.isdigit())
            return " * ".join([*(n for n in after if not n.isdigit()), str(numbers)])
        return f"{tensor}_s{self.strides[tensor].index(axis)}"

    def argument(self, tensor: str) -> str:
        """The argument of the kernel that a tensor, or a piece of one, is."""
        piece = self.loop.piece(tensor)
        return piece.of if piece else tensor

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
        tile = self.sorted_tile(name, memory, frozenset(ragged))
        self.loaded.add(tile.name)
        return tile

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
        self.write(
            f"tl.store({address}, {value}.to({self.argument(tensor)}.dtype.element_ty){condition})"
        )

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
        tokens = [d for d in dims if base(d) in (TOKEN, EARLIER)]
        if (
            not tokens
        ):  # wide dimensions are rows of tiles: every kernel finds them in the same place
            dims = tuple(sorted(dims, key=lambda d: -self.loop.whole_size(d)))
        self.declare(name, ("B", "H", "N"), dims)
        piece = self.loop.piece(name)
        self.values[piece.of if piece else name] = tuple(
            self.side(d) if d in tokens else self.loop.whole_size(d) for d in dims
        )

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
