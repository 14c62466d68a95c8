"""Matrix products of warps that each hold a piece: whole ones, and parts of a sum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx
from tttc.codegen.triton_tiles import Tile, base
from tttc.codegen.warp_memory import WarpMemory
from tttc.codegen.warp_tiles import Share

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, operands_of, spec_of
from tttc.ir.errors import NotLowerable
from tttc.ir.spec import Dims, parse, parse_relation


class WarpProducts(WarpMemory):
    """Which operands a product has, what is masked of them, and whose part the result is."""

    exact = False  # whether what is not finite is kept from tokens that do not see it

    def cleared(self, tile: Tile, dims: Dims) -> Tile:
        """The tile with zeros at tokens beyond the sequence."""
        missing = tuple(d for d in tile.dims if d in dims and d not in tile.zero)
        if not missing:
            return tile
        share = self.share(tile)
        value = self.line_up(share, share.dims)
        value = f"gl.where({self.mask(missing, share.dims)}, {value}, 0.0)"
        return self.let("m", value, share.dims, share.zero | set(missing))

    def negated(self, tile: Tile) -> Tile:
        share = self.share(tile)
        value = share.name if share.partial and not share.rest else self.line_up(share, share.dims)
        made = self.let("n", f"-{value}", share.dims, share.zero)
        made.partial = share.partial
        return made

    def _causal(self, tile: Tile, relation: Any) -> Tile:
        """A tile over pairs of tokens, zero where the relation does not hold."""
        share, r = self.share(tile), parse_relation(str(relation))
        comparison = "<" if r.strict else "<="
        later, earlier = (self.places(d, share.dims) for d in (r.later, r.earlier))
        if not share.partial:
            self.line_up(share, share.dims)
        made = self.let(
            "m",
            f"gl.where({earlier} {comparison} {later}, {share.name}, 0.0)",
            share.dims,
            share.zero,
        )
        made.partial = share.partial
        return made

    def _is_tile(self, x: Any, target: Dims) -> bool:
        return isinstance(x, fx.Node) and x in self.tiles and self.tiles[x].dims == target

    def _dot(self, node: fx.Node, accumulator: Tile | None = None, negative: bool = False) -> Tile:
        """A matrix product; where warps have parts of what it sums over, a sum that they have yet to add up."""
        labels = self._dot_labels(node)
        assert labels is not None
        rows, columns, inner = labels
        spec = parse(spec_of(node))
        tiles = {
            frozenset(o): self.tile(x)
            for x, o in zip(operands_of(node), spec.operands, strict=True)
        }
        left, right = tiles[frozenset((rows, inner))], tiles[frozenset((inner, columns))]
        values = pairs = None
        if node.target is ops.masked_contraction:
            r = parse_relation(str(node.args[0]))
            pair = {r.earlier, r.later}
            pairs = left if set(left.dims) == pair else right
            values = right if pairs is left else left
            masked = self.share(self._causal(pairs, str(node.args[0])))
            left, right = (masked, right) if pairs is left else (left, masked)
            pairs = masked
        if base(inner) in (TOKEN, EARLIER) and not (pairs is not None and inner == r.earlier):
            small = left if self.elements(left) <= self.elements(right) else right
            cleared = self.share(self.cleared(small, (inner,)))
            left, right = (cleared, right) if small is left else (left, cleared)
        if negative:
            if left is pairs or (
                right is not pairs and self.elements(left) <= self.elements(right)
            ):
                left = self.share(self.negated(left))
            else:
                right = self.share(self.negated(right))
        if pairs is not None and self.exact:
            assert values is not None
            return self._with_care(left, right, values, labels, str(node.args[0]), accumulator)
        return self._multiply(left, right, labels, accumulator, str(spec))

    def _multiply(
        self,
        left: Share,
        right: Share,
        labels: tuple[str, str, str],
        accumulator: Tile | None,
        note: str = "",
    ) -> Share:
        rows, columns, inner = labels
        target = (rows, columns)
        if not self.spread(target) and inner != self.wide and not (left.partial or right.partial):
            # Of tokens and features: one warp makes it, and it is added up with what others make.
            pair = left if left.lead else right
            if not pair.lead:
                raise NotLowerable("a product of matrices without the dimension that warps share")
            alone = self.of_first(pair)
            left, right = (alone, right) if pair is left else (left, alone)
        partial = inner == self.wide or left.partial or right.partial
        if partial and self.wide in target:
            for x in (left, right):
                if x.partial:
                    self.add_up(x)
            partial = False
        a, b = self.factor(left, 0, rows, inner), self.factor(right, 1, columns, inner)
        rest = ""
        start = self.zeros(target)
        if accumulator is not None:
            onto = self.share(accumulator)
            if partial == onto.partial:
                start, rest = (onto.name if partial else self.line_up(onto, target)), onto.rest
            elif partial:
                rest = f" + {self.line_up(onto, target)}"
            else:
                raise NotLowerable("a whole product onto parts of a sum")
        made = self.let("c", f"mma_v2({a}, {b}, {start})", target, note=note)
        self.products += 1
        return self.of_product(made, partial, rest)

    def _with_care(
        self, left: Share, right: Share, values: Share, labels: tuple[str, str, str], relation: str,
        accumulator: Tile | None,
    ) -> Share:  # fmt: skip
        """A causal product of finite values; not a number where a token sees one that is not finite."""
        pairs_left = left is not values and set(left.dims) != set(values.dims)
        rows, columns, _ = labels
        whole = self.line_up(values, values.dims)
        sign = "-" if (right if pairs_left else left).name != values.name else ""
        finite = f"{whole} * 0.0 == 0.0"
        clean = self.let("f", f"gl.where({finite}, {sign}{whole}, 0.0)", values.dims, values.zero)
        bad = self.let("f", f"gl.where({finite}, 0.0, 1.0)", values.dims)
        pair = left if pairs_left else right
        ones = self.share(self._causal(self._ones(pair.dims), relation))
        seen = (ones, bad) if pairs_left else (bad, ones)
        reached = self._multiply(*seen, labels, None)
        given = (left, clean) if pairs_left else (clean, right)
        made = self._multiply(*given, labels, accumulator)
        value = f'{made.name} + gl.where({reached.name} > 0.0, float("nan"), 0.0)'
        total = self.let("c", value, (rows, columns))
        return self.of_product(total, made.partial, made.rest)

    def _ones(self, dims: Dims) -> Share:
        return self.let("f", f"{self.zeros(dims)} + 1.0", dims)

    def of_product(self, made: Share, partial: bool, rest: str = "") -> Share:
        """A tile as what the matrix unit leaves, or what is computed of that element by element."""
        return replace(made, lead=True, partial=partial, rest=rest, layout=self.layouts.product())
