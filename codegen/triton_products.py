"""Matrix products: causal ones, those added into a sum, and what they do with values that are not finite."""

from __future__ import annotations

from typing import Any

from torch import fx
from tttc.codegen.triton_memory import Memory
from tttc.codegen.triton_tiles import Tile, base

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, operands_of, spec_of
from tttc.ir.build import dims_of
from tttc.ir.spec import Dims, parse, parse_relation


class Products(Memory):
    """Products that the matrix unit makes."""

    def _accumulated(
        self, node: fx.Node, function: str, operands: tuple[Any, ...], target: Dims
    ) -> Tile | None:
        """A sum with a matrix product in it, made by the matrix unit."""
        if not self.schedule.accumulate or function not in ("add", "sub"):
            return None
        x, y = operands
        if self._pending(y) and self._is_tile(x, target):
            pending, other, negative = y, x, function == "sub"
        elif function == "add" and self._pending(x) and self._is_tile(y, target):
            pending, other, negative = x, y, False
        else:
            return None
        return self._dot(pending, self.tile(other), negative)

    def _is_tile(self, x: Any, target: Dims) -> bool:
        return isinstance(x, fx.Node) and x in self.tiles and self.tiles[x].dims == target

    def _pending(self, x: Any) -> bool:
        """Whether a node is a matrix product that its one user makes itself."""
        return isinstance(x, fx.Node) and x in self.used and x not in self.tiles

    def _deferred(self, node: fx.Node) -> bool:
        """A product whose only user is a sum of the same shape, which accumulates into the other operand."""
        if node in self.repeats.values():
            return True
        if not self.schedule.accumulate or self._dot_labels(node) is None:
            return False
        users = [u for u in node.users if u in self.used]
        if len(users) != 1 or any(n is node for n, _ in self.loop.sinks):
            return False
        (user,) = users
        if user.target is not ops.elementwise or user.args[0] not in ("add", "sub"):
            return False
        operands = operands_of(user)
        other = operands[0] if operands[1] is node else operands[1]
        if user.args[0] == "sub" and operands[1] is not node:
            return False
        if not isinstance(other, fx.Node) or other is node or self._deferred_candidate(other, user):
            return False
        return dims_of(other) != () and self._tile_dims(other) == self.order(dims_of(node))

    def _deferred_candidate(self, other: fx.Node, user: fx.Node) -> bool:
        """Of two products in a sum the second accumulates into the first."""
        operands = operands_of(user)
        return (
            self._dot_labels(other) is not None
            and operands[1] is other
            and operands[0] is not other
            and ([u for u in other.users if u in self.used] == [user] and user.args[0] == "add")
        )

    def _dot(self, node: fx.Node, accumulator: Tile | None = None, negative: bool = False) -> Tile:
        """A matrix product, causal where the node is."""
        labels = self._dot_labels(node)
        assert labels is not None
        rows, columns, inner = labels
        spec = parse(spec_of(node))
        by_dims = {frozenset(o): x for x, o in zip(operands_of(node), spec.operands, strict=True)}
        left = self.tile(by_dims[frozenset((rows, inner))])
        right = self.tile(by_dims[frozenset((inner, columns))])
        causal = node.target is ops.masked_contraction
        if causal:
            r = parse_relation(str(node.args[0]))
            pairs_left = set(left.dims) == {r.earlier, r.later}
            if pairs_left:
                left = self._causal(left, str(node.args[0]))
            else:
                right = self._causal(right, node.args[0])
        if base(inner) in (TOKEN, EARLIER) and not (causal and inner == r.earlier):
            # Of causal sums only those over later tokens reach beyond the sequence.
            # What lies in memory as a product reads it need not pass through registers: rather the other one.
            sizes = [(self._elements(x), x.name in self.loaded) for x in (left, right)]
            small = left if sizes[0] <= sizes[1] else right
            cleared = self.cleared(small, (inner,))
            left, right = (cleared, right) if small is left else (left, cleared)
        if self.ragged(inner):
            left, right = self.cleared(left, (inner,)), self.cleared(right, (inner,))
        if negative and self._elements(left) <= self._elements(right):
            left = self.negated(left)
        elif negative:
            right = self.negated(right)
        zero = frozenset(d for d in (rows,) if d in left.zero) | frozenset(
            d for d in (columns,) if d in right.zero
        )
        if accumulator is not None:
            zero &= accumulator.zero
        made = Tile(self.fresh("c"), (rows, columns), zero)
        labels = (rows, columns, inner)
        if not causal or self.schedule.nan == "ignored":
            self.write(f"{made.name} = {self._product(left, right, labels, accumulator)}  # {spec}")
            return made
        values, pairs = (right, left) if pairs_left else (left, right)
        if self.schedule.nan == "product":
            clean, reached = self._finite(values, pairs, str(node.args[0]), labels)
            left, right = (left, clean) if pairs_left else (clean, right)
            self.write(f"{made.name} = {self._product(left, right, labels, accumulator)}  # {spec}")
            self.write(f'{made.name} = tl.where({reached} > 0, float("nan"), {made.name})')
            return made
        self.write(f"{made.name} = {self._product(left, right, labels, accumulator)}  # {spec}")
        self.write(f"if tl.sum(tl.sum({values.name} * 0.0, 1), 0) != 0.0:")
        self.indent += 1
        clean, reached = self._finite(values, pairs, str(node.args[0]), labels)
        left, right = (left, clean) if pairs_left else (clean, right)
        exact = self._product(left, right, labels, accumulator)
        self.write(f'{made.name} = tl.where({reached} > 0, float("nan"), {exact})')
        self.indent -= 1
        return made

    def negated(self, tile: Tile) -> Tile:
        """The tile times minus one."""
        return self.let("n", f"-{tile.name}", tile.dims)

    def _product(
        self, left: Tile, right: Tile, labels: tuple[str, str, str], accumulator: Tile | None
    ) -> str:
        rows, columns, inner = labels
        a = self._operand(left, (rows, inner))
        b = self._operand(right, (inner, columns))
        extra = f", acc={accumulator.name}" if accumulator is not None else ""
        return f"tl.dot({a}, {b}{extra}, input_precision=PRECISION)"

    def _finite(
        self, values: Tile, pairs: Tile, relation: str, labels: tuple[str, str, str]
    ) -> tuple[Tile, str]:
        """What a causal product sums, with zeros for what is not finite, and a tile that counts who must see that.

        Zero times infinity is not a number: without this, tokens before one that is not finite would see it.
        """
        rows, columns, inner = labels
        clean = self.let(
            "f",
            f"tl.where({values.name} * 0.0 == 0.0, {values.name}, 0.0)",
            values.dims,
            values.zero,
        )
        bad = self.let("f", f"tl.where({values.name} * 0.0 == 0.0, 0.0, 1.0)", values.dims)
        bad = self.cleared(bad, tuple(d for d in values.dims if d != inner and self.ragged(d)))
        shape = ", ".join(str(self.side(d)) for d in pairs.dims)
        ones = self._causal(Tile(f"tl.full(({shape},), 1.0, tl.float32)", pairs.dims), relation)
        left, right = (ones, bad) if rows in pairs.dims else (bad, ones)
        a, b = self._operand(left, (rows, inner)), self._operand(right, (inner, columns))
        return clean, self.let("c", f"tl.dot({a}, {b})", (rows, columns)).name

    def _operand(self, tile: Tile, dims: Dims) -> str:
        name = f"{tile.name}.to(DOT)"
        return name if tile.dims == dims else f"tl.trans({name})"

    def _causal(self, tile: Tile, relation: Any) -> Tile:
        """A tile over pairs of tokens, zero where the relation does not hold."""
        r = parse_relation(str(relation))
        comparison = "<" if r.strict else "<="
        later = r.later + self.index((r.later,), tile.dims)
        earlier = r.earlier + self.index((r.earlier,), tile.dims)
        return self.let(
            "m", f"tl.where({earlier} {comparison} {later}, {tile.name}, 0.0)", tile.dims, tile.zero
        )
