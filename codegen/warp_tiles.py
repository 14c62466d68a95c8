"""Tiles of kernels whose warps each hold a piece of the widest dimension: where they are, how operators read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tttc.codegen.loop import Loop
from tttc.codegen.schedule import Schedule
from tttc.codegen.triton_loop import Renderer
from tttc.codegen.triton_tiles import Tile, base
from tttc.codegen.warp_layouts import WarpLayouts

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, spec_of
from tttc.ir.build import dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.spec import Dims, parse

OPERATORS = (
    ops.elementwise, ops.contraction, ops.masked_contraction, ops.masked, ops.rename, ops.last,
)  # fmt: skip
MOST_ROWS = 32  # tokens of a mini-batch: each warp holds all rows of its piece
NEAR = 2  # products for which an operand stays in registers
LEAST = 16  # sides of what the matrix unit multiplies


def pairwise(terms: Sequence[str]) -> str:
    """A sum of sums, so that few additions wait for each other.

    >>> pairwise(["a", "b", "c", "d"])
    '(a + b) + (c + d)'
    """
    if len(terms) == 1:
        return terms[0]
    half = len(terms) // 2
    left, right = pairwise(terms[:half]), pairwise(terms[half:])
    return f"({left}) + ({right})" if half > 1 else f"{left} + {right}"


@dataclass
class Share(Tile):
    """A tile: its layout, and what of it a warp has.

    ``lead``: its array has a leading axis of warps: pieces of the wide dimension, or, of pairs of tokens, the same for
    all. ``partial``: it is the sum of what the warps have, and ``rest``. ``raw``: it is in shared memory alone.
    """

    layout: str = ""
    lead: bool = False
    partial: bool = False
    rest: str = ""
    raw: bool = False


class WarpTiles(Renderer):
    """Which layout a value has, and how it gets into another one."""

    lines: list[str]
    body: list[str]

    def __init__(self, loop: Loop, schedule: Schedule) -> None:
        self.layouts = WarpLayouts(schedule.num_warps)
        self.wide = ""
        self.axes: dict[Dims, Dims] = {}
        super().__init__(loop, schedule)
        self.copies: dict[str, str] = {}  # tiles in shared memory
        self.turned: dict[
            tuple[str, str, int], str
        ] = {}  # tiles in other layouts, by products before
        self.products = 0  # matrix products so far
        # Left operands that all warps have, by tile and what is summed over, and the products before they were read.
        self.recent: dict[tuple[str, str], tuple[str, int]] = {}
        self.read: set[str] = (
            set()
        )  # tiles that products have read in this turn: later ones read copies, if there are
        # In shared memory, of their own: what is shared makes warps wait.
        self.rooms: dict[str, str] = {}
        self.packed: set[str] = set()  # pairs of tokens as operands of products
        self._check()
        self._choose_axes()

    # -- which loops --------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Refuse what this renderer has no form for; find the wide dimension."""
        loop = self.loop
        if not loop.tokens or loop.parallel or loop.refresh or loop.once or loop.reverse:
            raise NotLowerable(
                "warps share mini-batches of tokens, one after another, of a forward"
            )
        rows = loop.mini_batch_size
        if rows % LEAST or rows > MOST_ROWS:
            raise NotLowerable(f"warps share mini-batches of {LEAST} or {MOST_ROWS} tokens")
        sizes = {d: loop.sizes[d] for n in self.used for d in dims_of(n) if d in loop.sizes}
        self.wide = max(sizes, key=lambda d: sizes[d])
        for d, n in sizes.items():
            least = LEAST * (self.schedule.num_warps if d == self.wide else 1)
            if n % least or n & (n - 1):
                raise NotLowerable(
                    f"{d} has {n} elements, which {self.schedule.num_warps} warps cannot share"
                )
        for node, source in loop.sources.items():
            if node not in self.used and source.kind != "state":
                continue
            if source.kind not in ("state", "token", "shared"):
                raise NotLowerable(f"arguments that are {source.kind} have no form for warps yet")
            if self.wide in dims_of(node) and source.kind != "state":
                raise NotLowerable(f"{source.name} has the dimension that warps share")
            if (
                len(dims_of(node)) == 2
                and source.kind == "state"
                and self.wide not in dims_of(node)
            ):
                raise NotLowerable(f"{source.name} lacks the dimension that warps share")
        for _, sink in loop.sinks:
            if sink.kind not in ("state", "token"):
                raise NotLowerable(f"results that are {sink.kind} have no form for warps yet")
        for node in loop.graph.nodes:
            if node not in self.used or node.op != "call_function":
                continue
            if node.target not in OPERATORS:
                raise NotLowerable(f"{node.target.__name__} has no form for warps yet")
            if node.target is ops.last and not self._of_last_token(node):
                raise NotLowerable("the last of computed tokens has no form for warps yet")
            if node.target is not ops.rename and len(parse(spec_of(node)).labels) > 3:
                raise NotLowerable(f"more than a matrix product: {spec_of(node)}")

    def _choose_axes(self) -> None:
        """Rows and columns of matrices without tokens: what most products sum over is their columns."""
        votes: dict[Dims, dict[str, int]] = {}
        for node in self.loop.graph.nodes:
            labels = self._dot_labels(node) if node in self.used else None
            if labels is None:
                continue
            for x in node.all_input_nodes:
                dims = dims_of(x)
                if not any(base(d) in (TOKEN, EARLIER) for d in dims) and labels[2] in dims:
                    seen = votes.setdefault(dims, {})
                    seen[labels[2]] = seen.get(labels[2], 0) + 1
        for pair, seen in votes.items():
            columns = max(pair, key=lambda d: seen.get(d, 0))
            (rows,) = set(pair) - {columns}
            self.axes[pair] = (rows, columns)

    def order(self, dims: Dims) -> Dims:
        """Rows and columns of a pair of dimensions."""
        return self.axes.get(dims) or super().order(dims)

    def _forget(self) -> None:
        """What was read in a turn of the loop is of that turn."""
        self.turned.clear()
        self.recent.clear()
        self.read.clear()

    # -- layouts ------------------------------------------------------------------------------------------

    @property
    def warps(self) -> int:
        return self.schedule.num_warps

    def piece(self, dim: str) -> int:
        """The side of what one warp has of a dimension."""
        return self.side(dim) // (self.warps if dim == self.wide else 1)

    def shape(self, dims: Dims, lead: bool) -> str:
        """The shape of an array."""
        sides = [self.piece(d) for d in dims]
        return f"[{', '.join(map(str, [self.warps, *sides] if lead else sides))}]"

    def spread(self, dims: Dims) -> bool:
        """Whether tiles over these dimensions have an axis of warps."""
        tokens = sum(base(d) in (TOKEN, EARLIER) for d in dims)
        return self.wide in dims or tokens == 2

    def natural(self, dims: Dims) -> str:
        """The layout in which values over these dimensions are computed."""
        if not dims:
            return ""
        if self.spread(dims):
            product = self.layouts.product()
            return product if len(dims) == 2 else self.layouts.slice(product, 1)
        if len(dims) == 2:
            if base(dims[0]) not in (TOKEN, EARLIER):
                raise NotLowerable("a matrix of features lacks the dimension that warps share")
            return self.layouts.rows(*(self.side(d) for d in dims))
        (d,) = dims
        if base(d) in (TOKEN, EARLIER):
            return self.layouts.slice(self.layouts.rows(self.side(d), self._features()), 1)
        return self.layouts.slice(self.layouts.rows(self.loop.mini_batch_size, self.side(d)), 0)

    def _features(self) -> int:
        """Columns of the matrices of tokens that sums over features leave vectors of."""
        found = {
            self.side(d)
            for node, source in self.loop.sources.items()
            if source.kind == "token" and len(dims_of(node)) == 2
            for d in dims_of(node)
            if base(d) not in (TOKEN, EARLIER)
        }
        return max(found, default=64)

    def within(self, dim: str, target: Dims) -> tuple[str, list[int]]:
        """The layout of a vector along ``dim`` in tiles over ``target``, and the axes it is expanded by there."""
        parent, axis = self.natural(target), target.index(dim)
        if not self.spread(target):
            return (
                (parent, [])
                if len(target) == 1
                else (self.layouts.slice(parent, 1 - axis), [1 - axis])
            )
        if len(target) == 1:
            return parent, []
        part = self.layouts.slice(parent, 2 - axis)
        if dim == self.wide:
            return part, [2 - axis]
        return self.layouts.slice(part, 0), [0, 2 - axis]

    @staticmethod
    def expanded(value: str, axes: list[int]) -> str:
        """A value with axes of size 1."""
        for axis in axes:
            value = f"gl.expand_dims({value}, {axis})"
        return value

    def places(self, dim: str, target: Dims, layout: str = "") -> str:
        """The indices along a dimension, lined up with tiles over ``target``."""
        inside, axes = self.within(dim, target)
        return self.expanded(f"gl.arange(0, {self.side(dim)}, layout={layout or inside})", axes)

    def mask(self, dims: Dims, target: Dims) -> str:
        """Which tokens lie within the sequence, lined up with ``target``."""
        return " & ".join(f"({self.places(d, target)} < count)" for d in dims)

    def let(
        self,
        prefix: str,
        value: str,
        dims: Dims,
        zero: frozenset[str] = frozenset(),
        note: str = "",
    ) -> Share:
        """Assign a value to a new variable, in the layout that its dimensions have."""
        tile = super().let(prefix, value, dims, zero, note)
        return Share(tile.name, dims, zero, self.natural(dims), self.spread(dims))

    # -- reading ------------------------------------------------------------------------------------------

    def tile(self, x: Any) -> Share:
        """The tile of a node or number."""
        tile = super().tile(x)
        return tile if isinstance(tile, Share) else Share(tile.name, (), frozenset())

    def share(self, tile: Tile) -> Share:
        """The tile as one of this renderer's."""
        return (
            tile
            if isinstance(tile, Share)
            else Share(
                tile.name, tile.dims, tile.zero, self.natural(tile.dims), self.spread(tile.dims)
            )
        )

    def line_up(self, tile: Tile, target: Dims) -> str:
        """A tile in the layout of tiles over ``target``, with axes of size 1 where it lacks theirs."""
        tile = self.share(tile)
        if not tile.dims:
            return tile.name
        if tile.partial:
            self.add_up(tile)
        if len(tile.dims) == 2:
            if tile.dims != target:
                raise NotLowerable(
                    f"a tile over {' '.join(tile.dims)} in one over {' '.join(target)}"
                )
            return self._in_registers(tile)
        layout, axes = self.within(tile.dims[0], target)
        return self.expanded(self.vector(tile, layout), axes)

    def _in_registers(self, tile: Share) -> str:
        if not tile.raw:
            return tile.name
        key = (tile.name, tile.layout, self.products)
        if key not in self.turned:
            name = self.turned[key] = self.fresh("r")
            self.write(f"{name} = {self.copies[tile.name]}.load({tile.layout}).to(gl.float32)")
        return self.turned[key]

    def vector(self, tile: Share, layout: str) -> str:
        """A vector in a layout; from one to another it goes through shared memory."""
        if tile.layout == layout:
            return tile.name
        if tile.lead:
            return self._once(tile, layout, f"gl.convert_layout({tile.name}, {layout})")
        return self._once(tile, layout, f"{self._numbers(tile)}.load({layout})")

    def _once(self, tile: Share, layout: str, value: str) -> str:
        """A value read from a tile, where it was not read so since the last product."""
        key = (tile.name, layout, self.products)
        if key not in self.turned:
            name = self.turned[key] = self.fresh("l")
            self.write(f"{name} = {value}")
        return self.turned[key]

    def _numbers(self, tile: Share) -> str:
        if tile.name not in self.copies:
            name = self.copies[tile.name] = f"{tile.name}_s"
            numbers = self.layouts.numbers()
            self.rooms[name] = (
                f"gl.allocate_shared_memory(gl.float32, [{self.side(tile.dims[0])}], {numbers})"
            )
            self.write(f"{name}.store({tile.name})")
        return self.copies[tile.name]

    def add_up(self, tile: Share) -> None:
        """What warps have made of a sum, added up; from now on the tile is the sum."""
        name = self.fresh("c")
        if self.spread(tile.dims):  # of pairs: every warp gets the sum
            self.write(f"{name} = gl.expand_dims(gl.sum({tile.name}, 0), 0)")
        else:
            sides = [self.side(d) for d in tile.dims]
            room, part = self._room_of_parts(*sides), self.layouts.part(*sides)
            self.write(f"{room}.store({tile.name})")
            total = pairwise([f"{room}.slice({w}, 1, 0).load({part})" for w in range(self.warps)])
            rows = self.layouts.rows(*sides)
            self.write(f"{name} = gl.convert_layout(gl.sum({total}, 0), {rows}){tile.rest}")
        tile.name, tile.partial, tile.rest = name, False, ""
        tile.layout, tile.lead = self.natural(tile.dims), self.spread(tile.dims)

    def _room_of_parts(self, rows: int, columns: int) -> str:
        """Room in shared memory for what warps have made of a sum; one sum after another uses it."""
        room = f"parts_{rows}x{columns}"
        if room not in self.rooms:
            shape, layout = f"[{self.warps}, {rows}, {columns}]", self.layouts.parts(columns)
            self.rooms[room] = f"gl.allocate_shared_memory(gl.float32, {shape}, {layout})"
        return room

    # -- products -----------------------------------------------------------------------------------------

    def copy(self, tile: Share) -> str:
        """The copy of a matrix in shared memory, in the dtype of operands."""
        if tile.name not in self.copies:
            if tile.partial:
                self.add_up(tile)
            name = self.copies[tile.name] = f"{tile.name}_s"
            layout = self.layouts.shared(self.piece(tile.dims[-1]), tile.lead)
            shape = self.shape(tile.dims, tile.lead)
            self.rooms[name] = f"gl.allocate_shared_memory(DOT, {shape}, {layout})"
            self.write(f"{name}.store({tile.name}.to(DOT))")
        return self.copies[tile.name]

    def factor(self, tile: Share, which: int, other: str, inner: str) -> str:
        """An operand of a product: the left one has rows ``other``, the right one columns ``other``."""
        layout = self.layouts.operand(which)
        wanted = (inner, other) if which else (other, inner)
        sides = f"[{self.warps}, {', '.join(str(self.piece(d)) for d in wanted)}]"
        if tile.lead:
            copied = tile.name in self.copies and tile.name in self.read
            self.read.add(tile.name)
            if tile.dims[1] == inner and not copied:
                # What a thread has of a product's rows is what it needs of an operand's.
                value = f"{tile.name}.to(DOT)"
                value = f"gl.permute({value}, (0, 2, 1))" if which else value
                value = f"gl.convert_layout({value}, {layout})"
                if self.wide in tile.dims:
                    return value
                name = self.fresh("a")
                self.write(f"{name} = {value}")
                self.packed.add(name)
                return name
            turned = "" if tile.dims == wanted else ".permute((0, 2, 1))"
            return f"{self.copy(tile)}{turned}.load({layout})"
        name, at = self.recent.get((tile.name, inner), ("", -NEAR - 1))
        if at + NEAR >= self.products:
            return f"gl.convert_layout(gl.permute({name}, (0, 2, 1)), {layout})" if which else name
        turned = "" if tile.dims == wanted else ".permute((1, 0))"
        one = self.layouts.slice(layout, 0)
        value = f"of_all({self.copy(tile)}{turned}.load({one}), {sides}, {layout})"
        if which:
            return value
        name = self.fresh("a")
        self.write(f"{name} = {value}")
        self.recent[tile.name, inner] = name, self.products
        return name

    def zeros(self, dims: Dims) -> str:
        """The sum that a product starts from."""
        return f"gl.zeros({self.shape(dims, True)}, gl.float32, {self.layouts.product()})"

    def of_first(self, tile: Share) -> Share:
        """A tile that every warp has as a sum of what warps have: only the first one has it."""
        first = self.places_of_warps()
        made = self.let("m", f"gl.where({first} == 0, {tile.name}, 0.0)", tile.dims, tile.zero)
        made.partial = True
        return made

    def places_of_warps(self) -> str:
        """The number of the warp, lined up with tiles that have an axis of warps."""
        part = self.layouts.slice(self.layouts.slice(self.layouts.product(), 2), 1)
        return self.expanded(f"gl.arange(0, {self.warps}, layout={part})", [1, 2])

    def elements(self, tile: Share) -> int:
        """Numbers that all warps have of a tile."""
        return math.prod(self.piece(d) for d in tile.dims) * (self.warps if tile.lead else 1)
