"""Arguments of kernels whose warps each hold some features: copies several turns ahead, stores a turn late."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from tttc.codegen.feature_tiles import FeatureTiles, Placed
from tttc.codegen.triton_tiles import Tile

from tttc.ir import ops
from tttc.ir.body import is_token, operands_of
from tttc.ir.build import dims_of
from tttc.ir.spec import Dims


@dataclass
class Late:
    """A matrix that waits in shared memory to be stored: other warps have parts of its rows."""

    tensor: str
    room: str
    dims: Dims  # as they lie in memory


class FeatureMemory(FeatureTiles):
    """Where arguments and results are, and when they are read and written."""

    late: list[Late]
    numbers: dict[str, fx.Node]  # arguments that are no matrices, by their tiles
    started: bool  # whether copies for a later turn have begun in this one
    lines: list[str]

    # -- what is read for every mini-batch ------------------------------------------------------------------

    def _kept(self, node: fx.Node) -> Dims:
        """The axes of an argument in shared memory: as it lies in device memory."""
        return self._as_stored(self._tensor(node), dims_of(node))

    def _as_stored(self, tensor: str, dims: Dims) -> Dims:
        """Axes as those of a tensor follow each other, the closest elements last; see :mod:`tttc.runtime.saved_states`."""
        axes = self.strides[tensor]
        dims = tuple(sorted(dims, key=lambda d: axes.index(d if d in axes else "T")))
        if tensor.startswith("saved_"):
            return tuple(sorted(dims, key=lambda d: -self.loop.whole_size(d)))
        return dims

    def _tensor(self, node: fx.Node) -> str:
        source = self.loop.sources.get(node)
        if source is None:
            source = self.loop.sources[operands_of(node)[0]]  # type: ignore[index]
        return f"saved_{source.name}" if source.kind == "saved" else source.name

    def _element(self, node: fx.Node) -> str:
        """The dtype of an argument in shared memory."""
        if len(dims_of(node)) == 2:
            return (
                "DOT"
                if self._narrow(node)
                else f"{self.argument(self._tensor(node))}.dtype.element_ty"
            )
        return "gl.int32"

    def _room(self, node: fx.Node) -> str:
        return f"{self._tensor(node)}_{'last' if node.target is ops.last else 'here'}"

    def _allocate(self) -> None:
        """Rooms for what is read, one for each mini-batch under way."""
        depth = self.schedule.num_stages
        for node in self._fetched():
            sides = [self.side(d) for d in self._kept(node)] or [1]
            shared = self.layouts.numbers() if len(sides) == 1 else self.layouts.shared(sides[1], self._size(node))  # fmt: skip
            self.write(
                self.room(
                    self._room(node), self._element(node), self._size(node), [depth, *sides], shared
                )
            )

    def _size(self, node: fx.Node) -> int:
        return 2 if len(dims_of(node)) == 2 and self._narrow(node) else 4

    def _under_way(self) -> None:
        """Begin with the first mini-batches, all but one of those for which there are rooms."""
        self.write("ahead = 0")
        self.write(f"first_ahead = (N - 1) * {self.loop.mini_batch_size}" if self.loop.reverse else "first_ahead = 0")  # fmt: skip
        for node in self._fetched():
            self._start_at(node)
        for slot in range(self.schedule.num_stages - 1):
            self._start_copies(str(slot))

    def _start_at(self, node: fx.Node) -> None:
        """Where an argument of the first mini-batch lies, and how far the next one is."""
        tensor, room, source = self._tensor(node), self._room(node), self.loop.sources.get(node)
        of_states = source is not None and source.kind in ("saved", "value")
        b = 1 if of_states else self.loop.mini_batch_size
        length, start = f"{self.stride(tensor, 'N' if of_states else 'T')} * {b}", f"{tensor}_ptr"
        if len(dims_of(node)) < 2:
            self.by_words[tensor] = b
            self.write(f"{room}_word, {room}_second = word_of({tensor}_ptr)")
            length, start = f"words({tensor}_ptr, {length})", f"{room}_word"
        self.write(f"{room}_step = gl.cast({length}, gl.int64)")
        at = f" + gl.cast(N - 1, gl.int64) * {room}_step" if self.loop.reverse else ""
        self.write(f"{room}_from = {start}{at}")

    def _start_copies(self, slot: str) -> None:
        """Begin to copy what the next mini-batch reads that is not under way; after the last one, that one again."""
        sign = "-" if self.loop.reverse else "+"
        self.write("most = T - 1 - first_ahead  # its last token")
        for node in self._fetched():
            self.write(f"start_copy({self._room(node)}.index({slot}), {self._address(node)})")
        self.write("async_copy.commit_group()")
        self.write("ahead += 1")
        self.write("more = gl.cast(ahead < N, gl.int64)")
        self.write(f"first_ahead {sign}= gl.cast(more, gl.int32) * {self.loop.mini_batch_size}")
        for node in self._fetched():
            room = self._room(node)
            self.write(f"{room}_from {sign}= more * {room}_step")

    def _address(self, node: fx.Node) -> str:
        """Where an argument of the next mini-batch lies."""
        tensor, kept, room = self._tensor(node), self._kept(node), self._room(node)
        if len(kept) == 2:
            layout = self.layouts.memory(*(self.side(d) for d in kept), self._size(node))
            return f"{room}_from + {self._places_in(tensor, kept, layout, 'most')}"
        return f"{room}_from + words({tensor}_ptr, {self._place_of(node, self.layouts.vector(), 'most')})"

    def _place_of(self, node: fx.Node, layout: str, most: str) -> str:
        """Where numbers are, counted from the first one of the first word."""
        tensor = self._tensor(node)
        place = self._places_in(tensor, self._kept(node), layout, most) or f"gl.arange(0, 1, layout={layout})"  # fmt: skip
        if node.target is ops.last:
            end = self.loop.mini_batch_size - 1
            last = f"({end} if WHOLE else gl.minimum({end}, {most}))"
            place = f"{last} * {self.stride(tensor, 'T')} + {place}"
        return f"{self._room(node)}_second + {place}"

    def _places_in(self, tensor: str, dims: Dims, layout: str, most: str = "") -> str:
        """Offsets of a tile of an argument from its first token; ``most``: of the last token, if not all are there.

        Rows beyond the sequence repeat its last token: finite where that is, and never counted.
        """
        parts = []
        for axis, d in enumerate(dims):
            part = self.layouts.slice(layout, 1 - axis) if len(dims) == 2 else layout
            place = f"gl.arange(0, {self.side(d)}, layout={part})"
            stride = self.stride(tensor, d if d in self.strides[tensor] else "T")
            if is_token(d) and d not in self.strides[tensor]:
                place = f"({place} if WHOLE else gl.minimum({place}, {most}))" if most else place
            parts.append(f"{place}{self.index((d,), dims)} * {stride}")
        return " + ".join(parts)

    def _arrived(self) -> None:
        """What is read for this mini-batch is in its room."""
        depth = self.schedule.num_stages
        self.write(f"async_copy.wait_group({depth - 2})")
        self.started = False
        for node in self._fetched():
            name, kept = self.fresh("x"), self._kept(node)
            self.write(f"{name}_s = {self._room(node)}.index(step % {depth})")
            self.copies[name] = f"{name}_s"
            self.tiles[node] = Placed(name, kept, raw=True)
            if len(kept) < 2:
                self.numbers[name] = node
            elif self._narrow(node):
                self.loaded.add(name)

    def _start_next(self) -> None:
        """Begin with a later mini-batch: after a moment when warps have waited for each other, so that they need not."""
        if not self.started:
            depth = self.schedule.num_stages
            self._start_copies(f"(step + {depth - 1}) % {depth}")
            self.started = True

    def _read_numbers(self, tile: Tile, layout: str) -> str:
        node = self.numbers[tile.name]
        words = f"{self.copies[tile.name]}.load({layout})"
        return f"number_in({self._tensor(node)}_ptr, {words}, {self._place_of(node, layout, 'count - 1')})"

    def number(self, tile: Placed) -> str:
        """A single number."""
        if not tile.raw:
            return super().number(tile)
        value = self._read_numbers(tile, self.layouts.vector())
        return self._once(tile, "number", f"gl.sum({value}, 0)")

    def vector(self, tile: Placed, layout: str) -> str:
        """A vector in a layout."""
        if not tile.raw:
            return super().vector(tile, layout)
        return self._once(tile, layout, self._read_numbers(tile, layout))

    # -- what is read once ----------------------------------------------------------------------------------

    def load(self, tensor: str, pointer: str, dims: Dims, rows: str | None) -> Tile:
        """Load an argument that is the same for all mini-batches."""
        ordered = self.order(dims)
        parts = [f"{self.places(d, ordered)} * {self.stride(tensor, d)}" for d in ordered]
        address = " + ".join([pointer, *parts])
        return self.let("x", f"gl.load({address}).to(gl.float32)", ordered)

    # -- what is written ------------------------------------------------------------------------------------

    def store(self, tensor: str, pointer: str, tile: Tile, rows: str | None) -> None:
        """Store a tile; rows of tokens beyond the sequence are left out."""
        dims = self.order(tile.dims)
        value = f"{self.line_up(tile, dims)}.to({self.argument(tensor)}.dtype.element_ty)"
        if len(dims) == 2 and not all(map(is_token, dims)) and self.indent_of_turn == self.indent:
            self._store_late(tensor, value, dims)
            return
        parts = []
        for d in dims:
            stride = self.stride(tensor, d if d in self.strides[tensor] else "T")
            place = self.places(d, dims)
            if is_token(d) and d not in self.strides[tensor]:
                place = f"(first + {place}).to(gl.int64)"
            parts.append(f"{place} * {stride}")
        tokens = tuple(d for d in dims if is_token(d) and rows is not None)
        condition = f", mask=None if WHOLE else {self.mask(tokens, dims)}" if tokens else ""
        self.write(f"gl.store({' + '.join([pointer, *parts])}, {value}{condition})")

    def _store_late(self, tensor: str, value: str, dims: Dims) -> None:
        """Put a matrix where it is stored from a turn later."""
        memory = self._as_stored(tensor, dims)
        room = f"{tensor}_there"
        rows, columns = (self.side(d) for d in memory)
        kind = f"{self.argument(tensor)}.dtype.element_ty"
        self.rooms.append(
            self.room(
                room,
                kind,
                2 if any(map(is_token, dims)) else 4,
                [rows, columns],
                self.layouts.shared(columns, 2),
            )
        )
        turned = "" if memory == dims else ".permute((1, 0))"
        self.write(f"{room}{turned}.store({value})")
        self.late.append(Late(tensor, room, memory))

    def _late_from(self) -> list[str]:
        """The lines that say where late stores begin."""
        made = []
        for x in self.late:
            has_tokens = any(is_token(d) and d not in self.strides[x.tensor] for d in x.dims)
            length = f"{self.stride(x.tensor, 'T')} * {self.loop.mini_batch_size}" if has_tokens else self.stride(x.tensor, "N")  # fmt: skip
            made.append(f"{x.tensor}_length = gl.cast({length}, gl.int64)")
            start = f" + gl.cast(N - 1, gl.int64) * {x.tensor}_length" if self.loop.reverse else ""
            made.append(f"{x.tensor}_to = {x.tensor}_ptr{start}")
        return ["    " * self.indent + line for line in made]

    def _store_those_late(self, after: bool) -> list[str]:
        """The lines that store what the turn before has made; ``after``: those after the last turn.

        The first turn stores what the next one overwrites, in the same threads.
        """
        if not self.late:
            return []
        before, self.lines = self.lines, []
        b = self.loop.mini_batch_size
        of = "N - 1" if after else "gl.maximum(step - 1, 0)"
        self.write(f"left = T - {f'(N - 1 - ({of}))' if self.loop.reverse else f'({of})'} * {b}")
        for x in self.late:
            layout = self.layouts.memory(*(self.side(d) for d in x.dims), 2)
            offset, tokens = self._places_in(x.tensor, x.dims, layout), []
            for i, d in enumerate(x.dims):
                if is_token(d) and d not in self.strides[x.tensor]:
                    part = self.layouts.slice(layout, 1 - i)
                    places = f"gl.arange(0, {self.side(d)}, layout={part})"
                    tokens.append(f"({places} < left){self.index((d,), x.dims)}")
            mask = f", mask=None if WHOLE else {' & '.join(tokens)}" if tokens else ""
            self.write(f"gl.store({x.tensor}_to + {offset}, {x.room}.load({layout}){mask})")
            if not after:
                sign = "-" if self.loop.reverse else "+"
                self.write(f"{x.tensor}_to {sign}= gl.cast(step > 0, gl.int64) * {x.tensor}_length")
        made, self.lines = self.lines, before
        return made

    indent_of_turn = -1  # the depth of lines that are made once a turn

    def _keep(self, node: fx.Node) -> None:
        """Store what a node goes to, but for new states, as soon as it is made."""
        for sink in self.results.get(node, ()):
            tile = self.tiles[node]
            if sink.kind == "sum":
                self.write(f"{sink.name}_v += {self.line_up(tile, self.order(tile.dims))}")
                continue
            pointer, rows = f"{sink.name}_ptr", None
            if sink.kind == "value":
                pointer += f" + gl.cast(n, gl.int64) * {self.stride(sink.name, 'N')}"
            else:
                rows = "rows"
            self.store(sink.name, pointer, tile, rows)
