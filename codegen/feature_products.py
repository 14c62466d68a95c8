"""Products and sums of kernels whose warps each hold some features."""

from __future__ import annotations

from typing import Any

from torch import fx
from tttc.codegen.feature_sums import FeatureSums
from tttc.codegen.feature_tiles import Placed
from tttc.codegen.triton_functions import FUNCTIONS
from tttc.codegen.triton_tiles import Tile

from tttc.ir import ops
from tttc.ir.body import is_token, operands_of, spec_of
from tttc.ir.build import dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.spec import Dims, parse, parse_relation


class FeatureProducts(FeatureSums):
    """One operator after another."""

    def emit(self, node: fx.Node) -> None:
        """One operator."""
        if node.target is ops.rename:
            source = self.placed(self.tile(operands_of(node)[0]))
            names = dict(zip(dims_of(node.args[1]), dims_of(node), strict=True))
            dims = tuple(names[d] for d in source.dims)
            zero = frozenset(names[d] for d in source.zero)
            self.tiles[node] = Placed(source.name, dims, zero, source.layout, source.raw)
            return
        super().emit(node)

    def _elementwise(self, node: fx.Node) -> Tile:
        if "propagate_nan" in FUNCTIONS[str(node.args[0])]:
            raise NotLowerable(f"{node.args[0]} has no form for features over warps yet")
        with self._at_home(self._home(node)):
            return super()._elementwise(node)

    def _broadcast(self, node: fx.Node) -> Tile:
        tile, target = self.tile(operands_of(node)[0]), self.order(dims_of(node))
        return self.let("e", f"{self.line_up(tile, target)} + {self.zeros(target)}", target)

    def _masked(self, node: fx.Node) -> Tile:
        return self._causal(self.tile(operands_of(node)[0]), node.args[0])

    def _causal(self, tile: Tile, relation: Any) -> Tile:
        """A tile over pairs of tokens, zero where the relation does not hold."""
        r, dims = parse_relation(str(relation)), self.order(tile.dims)
        comparison = "<" if r.strict else "<="
        later, earlier = (self.places(d, dims) for d in (r.later, r.earlier))
        value = f"gl.where({earlier} {comparison} {later}, {self.line_up(tile, dims)}, 0.0)"
        return self.let("m", value, dims, tile.zero)

    def _last(self, node: fx.Node) -> Tile:
        (source,) = operands_of(node)
        tile = self.tile(source)
        dims, result = self.order(tile.dims), self.order(dims_of(node))
        (gone,) = [d for d in dims if d not in result]
        value = f"gl.where({self._is_last(gone, dims)}, {self.line_up(tile, dims)}, 0.0)"
        return self._in_place(f"gl.sum({value}, {dims.index(gone)})", result, dims.index(gone))

    def _at_last(self, node: fx.Node) -> Tile:
        tile, target = self.tile(operands_of(node)[0]), self.order(dims_of(node))
        (token,) = [d for d in target if d not in tile.dims]
        value = f"gl.where({self._is_last(token, target)}, {self.line_up(tile, target)}, 0.0)"
        return self.let("m", value, target, tile.zero | {token})

    def _is_last(self, token: str, target: Dims) -> str:
        return f"({self.places(token, target)} == count - 1)"

    def _in_place(self, value: str, result: Dims, axis: int) -> Placed:
        """A sum over an axis, where it is left."""
        made = self.let("c", value, result)
        if result:
            made.layout = self.layouts.across() if axis == 0 else self.layouts.down()
        return made

    # -- products -------------------------------------------------------------------------------------------

    def _dot(self, node: fx.Node, accumulator: Tile | None = None, negative: bool = False) -> Tile:
        """A matrix product, causal where the node is."""
        labels = self._dot_labels(node)
        assert labels is not None
        rows, columns, inner = labels
        spec = parse(spec_of(node))
        sides: dict[frozenset[str], Tile] = {}
        numbers: list[
            Tile
        ] = []  # which scale what is summed over, or rows or columns of the product
        for x, o in zip(operands_of(node), spec.operands, strict=True):
            if isinstance(x, fx.Node) and x in self.scaled:
                large, small = self.scaled[x]
                numbers.append(self.tile(small))
                x = large
            sides[frozenset(o)] = self.tile(x)
        left, right = (
            self.placed(sides[frozenset(pair)]) for pair in ((rows, inner), (inner, columns))
        )
        earlier = values = None
        if node.target is ops.masked_contraction:
            r = parse_relation(str(node.args[0]))
            pairs_left = set(left.dims) == {r.earlier, r.later}
            masked = self.placed(self._causal(left if pairs_left else right, node.args[0]))
            values, earlier = (right if pairs_left else left), r.earlier
            left, right = (masked, right) if pairs_left else (left, masked)
        within = is_token(inner) and inner != earlier  # else causal sums stay within the sequence
        after = ""
        for i, x in enumerate(numbers):
            if within and x.dims == (inner,):
                x, within = self.cleared(x, (inner,)), False
            if negative and i == 0:
                x, negative = self.negated(x), False
            if x.dims != (inner,):
                after += f" * {self.line_up(x, (rows, columns))}"
            elif left.raw:
                right = self._times(right, x)
            else:
                left = self._times(left, x)
        if within and left.raw:
            right = self.placed(self.cleared(right, (inner,)))
        elif within:
            left = self.placed(self.cleared(left, (inner,)))
        if negative and (
            left.raw or (not right.raw and self._elements(right) < self._elements(left))
        ):
            right = self.placed(self.negated(right))
        elif negative:
            left = self.placed(self.negated(left))
        if values is not None and self.schedule.nan == "product":
            return self._with_care(left, right, labels, node, accumulator)
        if after:
            made = self._multiply(left, right, labels, None)
            base = (
                f"{self.line_up(accumulator, (rows, columns))} + "
                if accumulator is not None
                else ""
            )
            return self.let("c", f"{base}{made.name}{after}", (rows, columns), note=str(spec))
        return self._multiply(left, right, labels, accumulator, str(spec))

    def _times(self, tile: Placed, numbers: Tile) -> Placed:
        dims = self.order(tile.dims)
        return self.let("e", f"{self.line_up(tile, dims)} * {self.line_up(numbers, dims)}", dims, tile.zero | numbers.zero)  # fmt: skip

    def _multiply(
        self, left: Tile, right: Tile, labels: tuple[str, str, str], accumulator: Tile | None, note: str = ""
    ) -> Placed:  # fmt: skip
        rows, columns, inner = labels
        a, b = self.factor(left, 0, (rows, inner)), self.factor(right, 1, (inner, columns))
        target = (rows, columns)
        start = self.zeros(target) if accumulator is None else self.line_up(accumulator, target)
        made = self.let("c", f"mma_v2({a}, {b}, {start})", target, note=note)
        self.products += 1
        return made

    def _with_care(
        self, left: Placed, right: Placed, labels: tuple[str, str, str], node: fx.Node, accumulator: Tile | None
    ) -> Tile:  # fmt: skip
        """A causal product of finite values; not a number where a token sees one that is not finite."""
        rows, columns, _ = labels
        pairs_left = all(map(is_token, left.dims))
        pair, values = (left, right) if pairs_left else (right, left)
        # Numbers that have scaled it since it was masked may be infinite.
        pair = self.placed(self._causal(pair, node.args[0]))
        dims = self.order(values.dims)
        whole = self.line_up(values, dims)
        clean = self.let("f", f"gl.where({whole} * 0.0 == 0.0, {whole}, 0.0)", dims, values.zero)
        bad = self.let("f", f"gl.where({whole} * 0.0 == 0.0, 0.0, 1.0)", dims)
        ones = self.let("f", f"{self.zeros(pair.dims)} + 1.0", pair.dims)
        ones = self.placed(self._causal(ones, node.args[0]))
        reached = self._multiply(*((ones, bad) if pairs_left else (bad, ones)), labels, None)
        made = self._multiply(
            *((pair, clean) if pairs_left else (clean, pair)), labels, accumulator
        )
        value = f'gl.where({reached.name} > 0.0, float("nan"), {made.name})'
        return self.let("c", value, (rows, columns))

    # -- sums -----------------------------------------------------------------------------------------------

    def _broadcast_product(self, node: fx.Node, tiles: list[Tile], masked: bool = False) -> Tile:
        """Multiply, then add up."""
        value, every, summed = self._summand(node, tiles)
        result = self.order(parse(spec_of(node)).result)
        if not summed:
            return self.let("e", value, result)
        if len(every) == 1 or len(summed) == 2:
            for axis in reversed(range(len(every))):
                value = f"gl.sum({value}, {axis})"
            return self.let("c", value, ())
        if summed == every[:1] and not is_token(summed[0]):
            (made,) = self._sums_of_features([(value, every)])
            return made
        axis = every.index(summed[0])
        return self._in_place(f"gl.sum({value}, {axis})", result, axis)

    def _summand(self, node: fx.Node, tiles: list[Tile]) -> tuple[str, Dims, tuple[str, ...]]:
        """What is added up, its axes, and those that are summed over."""
        every = self.order(tuple(dict.fromkeys(d for t in tiles for d in t.dims)))
        summed = tuple(d for d in every if d not in parse(spec_of(node)).result)
        for d in filter(is_token, summed):
            having = [i for i, t in enumerate(tiles) if d in t.dims]
            i = min(having, key=lambda i: len(tiles[i].dims))
            tiles[i] = self.cleared(tiles[i], (d,))
        return " * ".join(self.line_up(t, every) for t in tiles), every, summed

    def sum_kind(self, node: fx.Node) -> tuple[int, int, int] | None:
        kind = super().sum_kind(node)
        # Sums along rows pass through shared memory, together where they can.
        return kind if kind is not None and kind[2] == 0 and not is_token(self.order(parse(spec_of(node)).labels)[0]) else None  # fmt: skip

    def emit_together(self, nodes: tuple[fx.Node, ...]) -> None:
        """Sums of one kind at once."""
        given = []
        for node in nodes:
            value, every, _ = self._summand(node, [self.tile(x) for x in operands_of(node)])
            given.append((value, every))
        for node, made in zip(nodes, self._sums_of_features(given), strict=True):
            self.tiles[node] = made
