"""Arguments of kernels whose warps each hold a piece: loads, copies a turn of the loop ahead, stores."""

from __future__ import annotations

from torch import fx
from tttc.codegen.triton_tiles import Tile, base
from tttc.codegen.warp_tiles import Share, WarpTiles

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, operands_of
from tttc.ir.build import dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.spec import Dims


class WarpMemory(WarpTiles):
    """Where arguments and results are, and when they are read."""

    tiles: dict[fx.Node, Tile]
    rows: dict[str, str]  # the arguments that vectors are, by their tiles

    def _place_in(self, tensor: str, dims: Dims, first: str, layout: str = "") -> str:
        """The offsets of a tile of arguments; ``first``: the first token, where it has tokens."""
        parts = []
        for d in dims:
            place = self._index(d, dims, layout)
            if base(d) in (TOKEN, EARLIER):
                place = f"({first} + gl.minimum({place}, T - 1 - {first})).to(gl.int64)"
                parts.append(f"{place} * {self.stride(tensor, 'T')}")
            else:
                parts.append(f"{place} * {self.stride(tensor, d)}")
        return " + ".join(parts)

    def _index(self, dim: str, dims: Dims, layout: str) -> str:
        """Indices along a dimension of an argument, in a layout or that of tiles over ``dims``."""
        if layout:
            part = self.layouts.slice(layout, 1 - dims.index(dim)) if len(dims) == 2 else layout
            places = f"gl.arange(0, {self.side(dim)}, layout={part})"
            return places + self.index((dim,), dims)
        if dim != self.wide:
            return self.places(dim, dims)
        product = self.layouts.product()
        if len(dims) == 1:
            whole = self.layouts.slice(product, 1)
            warp, own = self.layouts.slice(whole, 1), self.layouts.slice(whole, 0)
            axes = [[1], [0]]
        else:
            gone = 2 - dims.index(dim)
            part = self.layouts.slice(product, gone)
            warp, own = self.layouts.slice(part, 1), self.layouts.slice(part, 0)
            axes = [[1, gone], [0, gone]]
        size = self.piece(dim)
        first = self.expanded(f"gl.arange(0, {self.warps}, layout={warp})", axes[0])
        within = self.expanded(f"gl.arange(0, {size}, layout={own})", axes[1])
        return f"({first} * {size} + {within})"

    def load(self, tensor: str, pointer: str, dims: Dims, rows: str | None) -> Share:
        """Load an argument without tokens."""
        ordered = self.order(dims)
        offset = self._place_in(tensor, ordered, "0")
        address = f"{pointer} + {offset}" if offset else pointer
        return self.let("x", f"gl.load({address}).to(gl.float32)", ordered)

    def store(self, tensor: str, pointer: str, tile: Tile, rows: str | None) -> None:
        """Store a tile; rows of tokens beyond the sequence are left out."""
        share = self.share(tile)
        name = self.line_up(share, share.dims) if share.dims else share.name
        offset = self._place_in(tensor, share.dims, "first")
        address = f"{pointer} + {offset}" if offset else pointer
        value = f"{name}.to({self.argument(tensor)}.dtype.element_ty)"
        tokens = tuple(d for d in share.dims if base(d) in (TOKEN, EARLIER))
        condition = f", mask={self.mask(tokens, share.dims)}" if tokens else ""
        if self.wide in share.dims and tokens:
            raise NotLowerable("results with the dimension that warps share have no form yet")
        self.write(f"gl.store({address}, {value}{condition})")

    def _state_tile(self, name: str, dims: Dims) -> Share:
        return Share(
            f"{name}_v",
            self.order(dims),
            frozenset(),
            self.natural(self.order(dims)),
            self.spread(dims),
        )

    def _parameters(self) -> None:
        """What does not change, and room in shared memory."""
        for node, source in self.loop.sources.items():
            if source.kind == "shared" and node in self.used:
                tile = self.load(source.name, f"{source.name}_ptr", dims_of(node), None)
                self.write(f"{source.name}_v = {tile.name}")
                tile.name = f"{source.name}_v"
                self.tiles[node] = tile
        for node in self._matrices():
            memory = self._memory(node)
            rows, columns = (self.side(d) for d in memory)
            layout = self.layouts.shared(columns, False)
            self.write(
                f"{self._room(node)} = gl.allocate_shared_memory(DOT, [2, {rows}, {columns}], {layout})"
            )
        for node in self._vectors():
            size, numbers = self.side(dims_of(node)[0]), self.layouts.numbers()
            self.write(
                f"{self._room(node)} = gl.allocate_shared_memory(gl.int32, [2, {size}], {numbers})"
            )
            self._by_words(self.loop.sources[node].name)
        self.copied = {}
        for node, source in self.loop.sources.items():
            if source.kind != "state":
                continue
            dims = self.order(dims_of(node))
            if len(dims) == 2 and any(self._turns_state(u, dims) for u in node.users):
                name = self.copied[source.name] = f"{source.name}_s"
                layout = self.layouts.shared(self.piece(dims[1]), True)
                self.write(
                    f"{name} = gl.allocate_shared_memory(DOT, {self.shape(dims, True)}, {layout})"
                )
        self.invariant = set(self.tiles)

    def _by_words(self, tensor: str) -> None:
        """Numbers of an argument are copied by words."""
        if tensor not in self.by_words:
            self.by_words[tensor] = self.loop.mini_batch_size
            self.write(f"{tensor}_word, {tensor}_second = word_of({tensor}_ptr)")

    def _turns_state(self, user: fx.Node, dims: Dims) -> bool:
        """Whether a product sums over the rows of a state, so that it is read from shared memory."""
        labels = self._dot_labels(user) if user in self.used else None
        return labels is not None and labels[2] == dims[0]

    def _matrices(self) -> list[fx.Node]:
        return [n for n in self._fetched() if len(dims_of(n)) == 2]

    def _vectors(self) -> list[fx.Node]:
        found = [n for n in self._fetched() if len(dims_of(n)) == 1]
        return list(dict.fromkeys([*found, *(x for n in self._last() for x in n.all_input_nodes)]))

    def _filled(self) -> list[str]:
        """The names in a turn of what was copied for it."""
        made = (self.tiles[n].name for n in (*self._vectors(), *self._matrices()))
        return [self.copies[name] for name in made]

    def _last(self) -> list[fx.Node]:
        return [n for n in self._fetched() if n.target is ops.last]

    def _memory(self, node: fx.Node) -> Dims:
        return self.order(dims_of(node))

    def _room(self, node: fx.Node) -> str:
        return f"{self.loop.sources[node].name}_here"

    def _store_copies(self) -> None:
        for name, copy in self.copied.items():
            self.write(f"{copy}.store({name}_v.to(DOT))")
            self.copies[f"{name}_v"] = copy

    def _start_copies(self, slot: str) -> None:
        """Begin to copy what the mini-batch from token ``first`` on reads into shared memory."""
        for node in self._matrices():
            tensor, memory = self.loop.sources[node].name, self._memory(node)
            layout = self.layouts.read(*(self.side(d) for d in memory))
            address = f"{tensor}_ptr + {self._place_in(tensor, memory, 'first', layout)}"
            self.write(f"start_copy({self._room(node)}.index({slot}), {address})")
        for node in self._vectors():
            tensor, dims = self.loop.sources[node].name, dims_of(node)
            place = self._place_in(tensor, dims, "first", self.layouts.vector(self.side(dims[0])))
            self._copy_words(f"{self._room(node)}.index({slot})", tensor, place)
        self.write("async_copy.commit_group()")

    def _copy_words(self, target: str, tensor: str, place: str) -> None:
        self.write(f"start_copy({target}, {tensor}_word + words({tensor}_ptr, {tensor}_second + {place}))")  # fmt: skip

    def _place_of_last(self, tensor: str) -> str:
        """Where the last token of the mini-batch from token ``first`` on is."""
        at = f"gl.minimum(first + {self.loop.mini_batch_size}, T) - 1"
        own = f"gl.arange(0, 1, layout={self.layouts.vector(1)})"
        return f"gl.cast({at}, gl.int64) * {self.stride(tensor, 'T')} + {own}"

    def _numbers_of(self, tensor: str, words: str, place: str) -> str:
        return f"number_in({tensor}_ptr, {words}, {tensor}_second + {place})"

    def vector(self, tile: Share, layout: str) -> str:
        """A vector in a layout; from one to another it goes through shared memory."""
        if not tile.raw:
            return super().vector(tile, layout)
        tensor, words = self.rows[tile.name], f"{self.copies[tile.name]}.load({layout})"
        place = self._place_in(tensor, tile.dims, "first", layout)
        return self._once(tile, layout, self._numbers_of(tensor, words, place))

    def _last_tensor(self, node: fx.Node) -> str:
        """The argument whose last token a node is."""
        (token,) = operands_of(node)
        return self.loop.sources[token].name
