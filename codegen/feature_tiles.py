"""Tiles of kernels whose warps each hold some features: where they are, and how operators read them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import fx
from tttc.codegen.feature_layouts import ROWS, FeatureLayouts
from tttc.codegen.loop import Loop, only_products_read
from tttc.codegen.ordering import most_live
from tttc.codegen.schedule import Schedule
from tttc.codegen.sizes import THREADS, state_elements
from tttc.codegen.triton_loop import Renderer
from tttc.codegen.triton_tiles import Tile

from tttc.ir import ops
from tttc.ir.body import is_token, operands_of, spec_of
from tttc.ir.build import dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.spec import Dims, parse

OPERATORS = (
    ops.elementwise, ops.contraction, ops.masked_contraction, ops.masked, ops.rename, ops.last, ops.at_last, ops.broadcast,
)  # fmt: skip
LEAST_TOKENS = 16  # of a mini-batch: an operand of the matrix unit


@dataclass
class Placed(Tile):
    """A tile. ``layout``: of a vector, where it is not the usual one. ``raw``: it is in shared memory alone."""

    layout: str = ""
    raw: bool = False


class FeatureTiles(Renderer):
    """Which layout a value has, and how it gets into another one."""

    lines: list[str]
    tiles: dict[fx.Node, Tile]
    constants = (*Renderer.constants, "WHOLE")  # whether all mini-batches are whole

    def __init__(self, loop: Loop, schedule: Schedule) -> None:
        self.layouts = FeatureLayouts(schedule.num_warps)
        self.pairs: dict[frozenset[str], Dims] = {}  # axes of matrices of features
        super().__init__(loop, schedule)
        self.copies: dict[str, str] = {}  # tiles in shared memory
        self.turned: dict[tuple[str, str, int], str] = {}  # what was read, by products before
        self.products = 0  # matrix products so far
        self.rooms: list[str] = []  # in shared memory, allocated before the loop
        self.sizes_of_rooms: dict[str, int] = {}  # of all of them, in bytes
        self.scaled = self._scaled()
        self.home = ""  # the layout of the vector that is being made, where it is not the usual one
        self._check()
        self._choose_axes()

    # -- which loops --------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Refuse what this renderer has no form for."""
        loop = self.loop
        if not loop.tokens or loop.parallel or loop.refresh or loop.once:
            raise NotLowerable("features are spread over warps for mini-batches, one after another")
        rows = ROWS * self.schedule.num_warps
        if loop.mini_batch_size < LEAST_TOKENS or loop.mini_batch_size & (loop.mini_batch_size - 1):
            raise NotLowerable(
                f"mini-batches of {loop.mini_batch_size} tokens are no columns of products"
            )
        for d in self.dims:
            size = self.size(d)
            if not is_token(d) and (size % rows or size & (size - 1)):
                raise NotLowerable(
                    f"{d} has {size} elements, which are no rows of {self.schedule.num_warps} warps"
                )
        for node in loop.graph.nodes:
            if node not in self.used:
                continue
            if len(dims_of(node)) > 2:
                raise NotLowerable(f"more than two dimensions: {' '.join(dims_of(node))}")
            if node.op != "call_function":
                continue
            if node.target not in OPERATORS:
                raise NotLowerable(
                    f"{node.target.__name__} has no form for features over warps yet"
                )
            if node.target is ops.rename:
                continue
            labels = parse(spec_of(node)).labels
            if len(labels) > 3 or (len(labels) == 3 and self._dot_labels(node) is None):
                raise NotLowerable(f"no matrix product: {spec_of(node)}")
            if node.target is ops.masked_contraction and self._dot_labels(node) is None:
                raise NotLowerable(f"a causal sum that is no matrix product: {spec_of(node)}")
        if self.schedule.nan == "again" and any(s.kind == "sum" for _, s in loop.sinks):
            raise NotLowerable("sums over mini-batches are not made twice")

    def _choose_axes(self) -> None:
        """Rows of a matrix of features: those of the computed factor it is a product of, which lie in their warps."""
        for node in self.loop.graph.nodes:
            labels = self._dot_labels(node) if node in self.used else None
            if labels is None or any(map(is_token, dims_of(node))):
                continue
            inner = labels[2]
            for x, dims in zip(operands_of(node), parse(spec_of(node)).operands, strict=True):
                if isinstance(x, fx.Node) and not self._is_raw(x) and x not in self.scaled:
                    (row,) = [d for d in dims if d != inner]
                    (column,) = [d for d in dims_of(node) if d != row]
                    self.pairs.setdefault(frozenset((row, column)), (row, column))

    def order(self, dims: Dims) -> Dims:
        """Axes of a tile."""
        return self.pairs.get(frozenset(dims)) or super().order(dims)

    def _is_raw(self, node: fx.Node) -> bool:
        """Whether a value is a matrix that comes through shared memory in the dtype of operands."""
        while node.target is ops.rename:
            (node,) = operands_of(node)  # type: ignore[assignment]
        source = self.loop.sources.get(node)
        return source is not None and len(dims_of(node)) == 2 and self._narrow(node)

    def _narrow(self, node: fx.Node) -> bool:
        """Whether a matrix is in the dtype of operands, or read by products alone, which round it to that."""
        kind = self.loop.sources[node].kind
        return kind == "token" or (
            kind in ("saved", "value") and only_products_read(self.loop, node)
        )

    def _scaled(self) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
        """Matrices of tokens times a number for each row or column that products alone read: the matrix and the numbers.

        A product multiplies something else by the numbers: the matrix stays as it lies in shared memory.
        """
        found = {}
        for node in self.loop.graph.nodes:
            if node not in self.used or node.target is not ops.contraction:
                continue
            spec = parse(spec_of(node))
            if len(spec.operands) != 2 or spec.summed or any(n is node for n, _ in self.loop.sinks):
                continue
            small, large = sorted(operands_of(node), key=lambda x: len(dims_of(x)))
            if len(dims_of(small)) != 1 or len(dims_of(large)) != 2 or not self._is_raw(large):
                continue
            if all(self._dot_labels(u) is not None for u in node.users if u in self.used):
                found[node] = (large, small)
        return found

    def _deferred(self, node: fx.Node) -> bool:
        return node in self.scaled or super()._deferred(node)

    # -- layouts ------------------------------------------------------------------------------------------

    @property
    def warps(self) -> int:
        return self.schedule.num_warps

    def natural(self, dims: Dims) -> str:
        """The layout in which values over these dimensions are computed."""
        if len(dims) == 2:
            return self.layouts.product()
        if not dims:
            return ""
        return self.layouts.across() if is_token(dims[0]) else self.layouts.down()

    def within(self, dim: str, target: Dims) -> str:
        """The layout of a vector along ``dim`` in tiles over ``target``."""
        if len(target) == 1:
            return self.home or self.natural(target)
        return self.layouts.across() if target.index(dim) else self.layouts.down()

    def places(self, dim: str, target: Dims) -> str:
        """The indices along a dimension, lined up with tiles over ``target``."""
        layout = self.within(dim, target)
        return f"gl.arange(0, {self.side(dim)}, layout={layout}){self.index((dim,), target)}"

    def mask(self, dims: Dims, target: Dims) -> str:
        """Which tokens lie within the sequence, lined up with ``target``."""
        return " & ".join(f"({self.places(d, target)} < count)" for d in dims)

    def zeros(self, dims: Dims) -> str:
        """A tile of zeros."""
        shape = ", ".join(str(self.side(d)) for d in dims)
        return f"gl.zeros([{shape}], gl.float32, {self.natural(dims)})" if dims else "0.0"

    def _forget(self) -> None:
        """What was read in a turn of the loop is of that turn."""
        self.turned.clear()
        self.copies.clear()

    # -- reading ------------------------------------------------------------------------------------------

    def room(self, name: str, kind: str, size: int, shape: list[int], layout: str) -> str:
        """The line that allocates a room in shared memory; ``size``: bytes of a number."""
        self.sizes_of_rooms[name] = size * math.prod(shape)
        return f"{name} = gl.allocate_shared_memory({kind}, {shape}, {layout})"

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that a rendered kernel takes."""
        return sum(self.sizes_of_rooms.values())

    @property
    def registers(self) -> int:
        """Registers of a thread of a rendered kernel for the state and for the most matrices that live at a time."""

        def size(node: fx.Node) -> int:
            dims = dims_of(node)
            if len(dims) < 2 or node in self.loop.sources or self._deferred(node):
                return 0
            each = THREADS if all(map(is_token, dims)) else THREADS * self.warps
            return self._on_chip(node) // each

        return state_elements(self.loop) // (THREADS * self.warps) + most_live(
            self._sequence(), size
        )

    def placed(self, tile: Tile) -> Placed:
        """The tile as one of this renderer's."""
        if isinstance(tile, Placed):
            return tile
        return Placed(tile.name, tile.dims, tile.zero)

    def line_up(self, tile: Tile, target: Dims) -> str:
        """A tile in the layout of tiles over ``target``, with axes of size 1 where it lacks theirs."""
        tile = self.placed(tile)
        if not tile.dims:
            return self.number(tile)
        if len(tile.dims) == 1:
            return self.vector(tile, self.within(tile.dims[0], target)) + self.index(
                tile.dims, target
            )
        if tile.raw:
            return self._read(tile, target)
        if tile.dims == target:
            return tile.name
        return self._once(tile, "turned", f"gl.convert_layout(gl.permute({tile.name}, (1, 0)), {self.layouts.product()})")  # fmt: skip

    def number(self, tile: Placed) -> str:
        """A single number."""
        return tile.name

    def _once(self, tile: Tile, how: str, value: str) -> str:
        """A value read from a tile, where it was not read so since the last product."""
        key = (tile.name, how, self.products)
        if key not in self.turned:
            name = self.turned[key] = self.fresh("r")
            self.write(f"{name} = {value}")
        return self.turned[key]

    def _read(self, tile: Placed, target: Dims) -> str:
        """A matrix from shared memory."""
        turned = "" if tile.dims == target else ".permute((1, 0))"
        value = f"{self.copies[tile.name]}{turned}.load({self.layouts.product()}).to(gl.float32)"
        return self._once(tile, " ".join(target), value)

    def vector(self, tile: Placed, layout: str) -> str:
        """A vector in a layout."""
        if (tile.layout or self.natural(tile.dims)) == layout:
            return tile.name
        return self._once(tile, layout, f"gl.convert_layout({tile.name}, {layout})")

    def copy(self, tile: Placed) -> str:
        """The copy of a matrix in shared memory, in the dtype of operands."""
        if tile.name not in self.copies:
            name = self.copies[tile.name] = f"{self.fresh('k')}_s"
            rows, columns = (self.side(d) for d in tile.dims)
            layout = self.layouts.shared(columns, 2)
            self.rooms.append(self.room(name, "DOT", 2, [rows, columns], layout))
            self.write(f"{name}.store({tile.name}.to(DOT))")
        return self.copies[tile.name]

    def factor(self, tile: Tile, which: int, wanted: Dims) -> str:
        """An operand of a product, with the axes ``wanted``; 0 for the left one, 1 for the right one."""
        tile, layout = self.placed(tile), self.layouts.operand(which)
        everywhere = all(map(is_token, tile.dims))  # every warp has all of it
        if not tile.raw and ((which == 0 and tile.dims == wanted) or everywhere):
            value = f"{tile.name}.to(DOT)"
            if tile.dims != wanted:
                value = f"gl.permute({value}, (1, 0))"
            return f"gl.convert_layout({value}, {layout})"
        turned = "" if tile.dims == wanted else ".permute((1, 0))"
        name = self.copies[tile.name] if tile.raw else self.copy(tile)
        return self._once(
            tile, f"{layout} {' '.join(wanted)}", f"{name}{turned}.load({layout}).to(DOT)"
        )

    def let(
        self, prefix: str, value: str, dims: Dims, zero: frozenset[str] = frozenset(), note: str = ""
    ) -> Placed:  # fmt: skip
        """Assign a value to a new variable, in the layout that its dimensions have."""
        made = self.placed(super().let(prefix, value, dims, zero, note))
        made.layout = self.home if len(dims) == 1 else ""
        return made

    def cleared(self, tile: Tile, dims: Dims) -> Tile:
        """The tile with zeros at tokens beyond the sequence."""
        missing = tuple(d for d in tile.dims if d in dims and d not in tile.zero and is_token(d))
        if not missing:
            return tile
        dims = self.order(tile.dims)
        with self._at_home(self.placed(tile).layout if len(dims) == 1 else ""):
            value = self.line_up(tile, dims)
            value = f"{value} if WHOLE else gl.where({self.mask(missing, dims)}, {value}, 0.0)"
            return self.let("m", value, dims, tile.zero | set(missing))

    def negated(self, tile: Tile) -> Tile:
        dims = self.order(tile.dims)
        with self._at_home(self.placed(tile).layout if len(dims) == 1 else ""):
            return self.let("n", f"-{self.line_up(tile, dims)}", dims, tile.zero)

    @contextmanager
    def _at_home(self, layout: str) -> Iterator[None]:
        """Vectors are made in a layout."""
        before, self.home = self.home, layout
        yield
        self.home = before

    def _home(self, node: fx.Node) -> str:
        """Where a vector of tokens is made: along rows where nothing but pairs of tokens reads it so."""
        dims = dims_of(node)
        if len(dims) != 1 or not is_token(dims[0]):
            return ""
        users = [u for u in node.users if u in self.used]
        along = [
            all(
                map(
                    is_token,
                    parse(spec_of(u)).labels if u.target is ops.contraction else dims_of(u),
                )
            )
            and self.order(tuple(dict.fromkeys(d for x in u.all_input_nodes for d in dims_of(x))))[
                :1
            ]
            == dims
            and len({d for x in u.all_input_nodes for d in dims_of(x)}) == 2
            for u in users
        ]
        return self.layouts.down() if users and all(along) else ""

    def _is_tile(self, x: Any, target: Dims) -> bool:
        return (
            isinstance(x, fx.Node) and x in self.tiles and self.order(self.tiles[x].dims) == target
        )
