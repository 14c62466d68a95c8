"""Operators of kernels whose warps each hold a piece: what is linear is put off until parts are added up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx
from tttc.codegen.triton_functions import FUNCTIONS
from tttc.codegen.triton_tiles import Tile, base
from tttc.codegen.warp_products import WarpProducts
from tttc.codegen.warp_tiles import Share

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, operands_of, spec_of
from tttc.ir.build import dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.spec import Dims, parse


class WarpOperators(WarpProducts):
    """One operator after another."""

    def emit(self, node: fx.Node) -> None:
        """One operator."""
        if node.target is ops.rename:
            source = self.tile(operands_of(node)[0])
            names = dict(zip(dims_of(node.args[1]), dims_of(node), strict=True))
            dims = tuple(names[d] for d in source.dims)
            zero = frozenset(names[d] for d in source.zero)
            if self.order(dims) != dims:
                raise NotLowerable("a tile is turned under new names")
            self.tiles[node] = replace(source, dims=dims, zero=zero)
            return
        super().emit(node)

    def _elementwise(self, node: fx.Node) -> Tile:
        function = str(node.args[0])
        if "propagate_nan" in FUNCTIONS[function]:
            raise NotLowerable(f"{function} has no form for warps yet")
        operands = operands_of(node)
        target = self.order(dims_of(node))
        fused = self._accumulated(node, function, operands, target)
        if fused is not None:
            return fused
        tiles = [self.tile(x) for x in operands]
        put_off = self._put_off(function, tiles, target)
        return put_off if put_off is not None else super()._elementwise(node)

    def _put_off(self, function: str, tiles: list[Share], target: Dims) -> Share | None:
        """A function of what warps have yet to add up that is linear in it; None where it is added up first."""
        parts = [t for t in tiles if t.partial]
        if not parts or any(t.dims != target for t in parts):
            return None
        if function == "neg" and not parts[0].rest:
            made = self.let("e", f"-{parts[0].name}", target, parts[0].zero)
        elif function == "mul" and len(parts) == 1 and not parts[0].rest and self.spread(target):
            values = [t.name if t.partial else self.line_up(t, target) for t in tiles]
            made = self.let("e", f"{values[0]} * {values[1]}", target)
        elif function in ("add", "sub") and self.spread(target):
            values = [t.name if t.partial else self._first_alone(t, target) for t in tiles]
            made = self.let("e", FUNCTIONS[function].format(*values), target)
        elif function in ("add", "sub") and tiles[0].partial and not tiles[1].partial:
            sign = "+" if function == "add" else "-"
            rest = f"{tiles[0].rest} {sign} {self.line_up(tiles[1], target)}"
            return Share(tiles[0].name, target, frozenset(), tiles[0].layout, True, True, rest)
        else:
            return None
        return self.of_product(made, partial=True)

    def _first_alone(self, tile: Share, target: Dims) -> str:
        return f"gl.where({self.places_of_warps()} == 0, {self.line_up(tile, target)}, 0.0)"

    def _masked_contraction(self, node: fx.Node) -> Tile:
        if self._dot_labels(node) is None:
            raise NotLowerable(f"a causal sum that is no matrix product: {spec_of(node)}")
        return self._dot(node)

    def _masked(self, node: fx.Node) -> Tile:
        return self._causal(self.tile(operands_of(node)[0]), node.args[0])

    def _broadcast_product(self, node: fx.Node, tiles: list[Any], masked: bool = False) -> Tile:
        """Multiply, then add up."""
        spec = parse(spec_of(node))
        every = self.order(tuple(dict.fromkeys(d for t in tiles for d in t.dims)))
        result = self.order(spec.result)
        summed = [d for d in every if d not in result]
        for d in summed:
            if base(d) in (TOKEN, EARLIER):
                i = min(
                    (i for i, t in enumerate(tiles) if d in t.dims),
                    key=lambda i: len(tiles[i].dims),
                )
                tiles[i] = self.cleared(tiles[i], (d,))
        if not summed:
            put_off = self._put_off("mul", tiles, every) if len(tiles) == 2 else None
            if put_off is not None:
                return put_off
            return self.let("e", " * ".join(self.line_up(t, every) for t in tiles), result)
        whole = len(every) == 1 or not self.spread(every)
        if (not whole and summed != [every[0]]) or (whole and len(summed) > 1):
            raise NotLowerable(f"a sum over {' '.join(summed)} of {' '.join(every)}")
        value = " * ".join(self.line_up(t, every) for t in tiles)
        if len(every) == 2 and whole and summed == [every[0]] and self._rows_of_warp(every):
            return self._sum_of_rows(value, every, str(spec))
        if whole and self.wide in every:
            value = f"gl.sum(gl.sum({value}, 1), 0)"
        else:
            axis = every.index(summed[0]) + (0 if whole else 1)
            value = f"gl.sum({value}, {axis})"
        made = self.let("c", value, result, note=str(spec))
        if len(every) == 2:
            made.layout = self.layouts.slice(
                self.natural(every), every.index(summed[0]) + (0 if whole else 1)
            )
        return made

    def _rows_of_warp(self, dims: Dims) -> int:
        return self.layouts.rows_of_warp(*(self.side(d) for d in dims))

    def _sum_of_rows(self, value: str, dims: Dims, note: str) -> Tile:
        """A sum over the rows of a matrix that is spread over all threads, from what each warp makes of its own."""
        rows, columns = (self.side(d) for d in dims)
        room = self.fresh("p")
        shape = f"[{self.warps}, {columns}]"
        self.rooms[room] = (
            f"gl.allocate_shared_memory(gl.float32, {shape}, {self.layouts.sums_shared()})"
        )
        split = f"[{self.warps}, {self._rows_of_warp(dims)}, {columns}]"
        self.write(f"{room}.store(gl.sum(gl.reshape({value}, {split}), 1))")
        total = f"gl.sum({room}.load({self.layouts.sums(rows, columns)}), 0)"
        layout = self.natural(dims[1:])
        return self.let("c", f"gl.convert_layout({total}, {layout})", dims[1:], note=note)
