"""The operators of the IR as lines of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from tttc.codegen.triton_functions import FUNCTIONS
from tttc.codegen.triton_solve import triangular_solve
from tttc.codegen.triton_tiles import Tile, base
from tttc.codegen.triton_vectors import Vectors

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, operands_of, spec_of
from tttc.ir.build import dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.functions import FUNCTIONS as IR_FUNCTIONS
from tttc.ir.spec import Dims, parse, parse_relation

LARGEST_BROADCAST = 1 << 17  # elements of a broadcast product that registers can hold for a moment

POLES = ("div", "reciprocal", "rsqrt", "log", "pow")  # functions that are not finite of zero


class Operators(Vectors):
    """One operator after another."""

    def emit(self, node: fx.Node) -> None:
        """One operator."""
        if node.target is ops.rename:
            source = self.tile(operands_of(node)[0])
            names = dict(zip(dims_of(node.args[1]), dims_of(node), strict=True))
            dims = tuple(names[d] for d in source.dims)
            zero = frozenset(names[d] for d in source.zero)
            self.tiles[node] = self.sorted_tile(source.name, dims, zero)
            return
        render: dict[Any, Callable[[fx.Node], Tile]] = {
            ops.elementwise: self._elementwise,
            ops.contraction: self._contraction,
            ops.masked_contraction: self._masked_contraction,
            ops.masked: self._masked,
            ops.running_product: self._running_product,
            ops.triangular_solve: lambda n: triangular_solve(self, n),
            ops.reduction: self._reduction,
            ops.broadcast: self._broadcast,
            ops.last: self._last,
            ops.at_last: self._at_last,
        }
        self.tiles[node] = render[node.target](node)

    def _elementwise(self, node: fx.Node) -> Tile:
        if node in self.repeats:
            return self._renewed(node)
        function = str(node.args[0])
        operands = operands_of(node)
        target = self.order(dims_of(node))
        fused = self._accumulated(node, function, operands, target)
        if fused is not None:
            return fused
        tiles = [self.tile(x) for x in operands]
        values = [self.line_up(t, target) for t in tiles]
        zero: frozenset[str] = frozenset()
        kind = IR_FUNCTIONS[function].linear
        if kind == "product":
            zero = frozenset().union(*(t.zero for t in tiles))
        elif kind == "first":
            zero = tiles[0].zero
        elif kind == "sum":
            zero = frozenset.intersection(*(t.zero & frozenset(t.dims) for t in tiles))
        if function not in POLES:
            return self.let("e", FUNCTIONS[function].format(*values), target, zero)
        # Beyond the size of a dimension a divisor is zero: what comes of that must not meet sums, or a product with zero.
        divisors = tiles[1:] if function == "div" else tiles
        beyond = tuple(d for d in target if self.ragged(d) and any(d in t.dims for t in divisors))
        text = FUNCTIONS[function].format(*values)
        if function == "div" and len(tiles[1].dims) < len(target):
            # A division takes about eight instructions, and a divisor is the same for a row of numbers. Of numbers of
            # 32 bits it stays one: x / max(x) is 1 somewhere.
            text = f"{values[0]} * (1.0 / {values[1]}) if FAST else {text}"
        made = self.let("e", text, target, zero - set(beyond))
        return self.cleared(made, beyond)

    def _contraction(self, node: fx.Node) -> Tile:
        if self._dot_labels(node) is not None:
            return self._dot(node)
        return self._broadcast_product(node, [self.tile(x) for x in operands_of(node)])

    def _masked_contraction(self, node: fx.Node) -> Tile:
        if self._dot_labels(node) is not None:
            return self._dot(node)
        r = parse_relation(str(node.args[0]))
        tiles = [self.tile(x) for x in operands_of(node)]
        pair = self.order((r.later, r.earlier))
        both = [i for i, t in enumerate(tiles) if set(pair) <= set(t.dims)]
        if not both and len(tiles) == 1:
            return self._causal_sum(node, tiles[0])
        if not both:
            shape = ", ".join(str(self.side(d)) for d in pair)
            tiles.append(Tile(f"tl.full(({shape}), 1.0, tl.float32)", pair))
        if (
            self.schedule.nan == "ignored"
        ):  # else the product is masked: zero times infinity is not zero
            i = both[0] if both else -1
            tiles[i] = self._causal(tiles[i], node.args[0])
        return self._broadcast_product(node, tiles, masked=True)

    def _causal_sum(self, node: fx.Node, x: Tile) -> Tile:
        """One operand under a causal sum: a matrix product with the mask, or a sum of what the mask leaves."""
        spec, relation = parse(spec_of(node)), str(node.args[0])
        r = parse_relation(relation)
        rows_columns = self.order(spec.result)
        summed = [d for d in x.dims if d not in spec.result]
        sides = [self.side(d) for d in (*spec.result, *summed)]
        if len(x.dims) != 2 or len(rows_columns) != 2 or len(summed) != 1 or min(sides) < 16:
            target = self.order(tuple(dict.fromkeys((*x.dims, r.later, r.earlier))))
            shape = ", ".join(str(self.side(d)) for d in target)
            value = f"{self.line_up(x, target)} + tl.zeros(({shape},), tl.float32)"
            tile = self._causal(Tile(f"({value})", target, x.zero), relation)
            return self._broadcast_product(node, [tile], masked=True)
        rows, columns = rows_columns
        (inner,) = summed
        if inner != r.earlier:
            x = self.cleared(x, (inner,))
        pair = self.order((r.later, r.earlier))
        shape = ", ".join(str(self.side(d)) for d in pair)
        ones = self._causal(Tile(f"tl.full(({shape}), 1.0, tl.float32)", pair), relation)
        labels = (rows, columns, inner)
        if self.schedule.nan == "ignored":
            left, right = (ones, x) if rows in ones.dims else (x, ones)
            return self.let("c", self._product(left, right, labels, None), (rows, columns))
        clean, reached = self._finite(x, ones, relation, labels)
        left, right = (ones, clean) if rows in ones.dims else (clean, ones)
        made = self.let(
            "c", self._product(left, right, labels, None), (rows, columns), note=str(spec)
        )
        value = f'tl.where({reached} > 0, float("nan"), {made.name})'
        return self.let("c", value, (rows, columns))

    def _broadcast_product(self, node: fx.Node, tiles: list[Tile], masked: bool = False) -> Tile:
        """A product without the matrix unit: multiply, then add up."""
        value, every, zero = self._multiplied(node, tiles, masked)
        spec = parse(spec_of(node))
        result = self.order(spec.result)
        summed = tuple(d for d in every if d not in result)
        for d in reversed(summed):
            value = f"tl.sum({value}, {every.index(d)})"
        return self.let(
            "c" if summed else "e", value, result, zero, note=str(spec) if summed else ""
        )

    def _multiplied(
        self, node: fx.Node, tiles: list[Tile], masked: bool = False
    ) -> tuple[str, Dims, frozenset[str]]:
        """What a product without the matrix unit adds up, its axes, and along which of the result it is zero."""
        spec = parse(spec_of(node))
        result = self.order(spec.result)
        every = self.order(tuple(dict.fromkeys(d for t in tiles for d in t.dims)))
        summed = tuple(d for d in every if d not in result)
        volume = 1
        for d in every:
            volume *= self.side(d)
        if volume > LARGEST_BROADCAST:
            raise NotLowerable(f"a product over {' '.join(every)} is too large for registers")
        # Causal sums over earlier tokens stay within the sequence.
        within = ""
        if masked:
            r = parse_relation(str(node.args[0]))
            within = r.earlier if r.later in result else ""
        for d in summed:
            if base(d) not in (TOKEN, EARLIER) or d == within:
                continue
            i = min(
                (i for i, t in enumerate(tiles) if d in t.dims),
                key=lambda i: self._elements(tiles[i]),
            )
            tiles[i] = self.cleared(tiles[i], (d,))
        ragged = tuple(d for d in summed if self.ragged(d))
        tiles = [self.cleared(t, ragged) for t in tiles]
        zero = frozenset().union(*(t.zero for t in tiles)) & frozenset(result)
        value = " * ".join(self.line_up(t, every) for t in tiles)
        if masked and len(tiles) > 1 and self.schedule.nan != "ignored":
            value = self._causal(Tile(f"({value})", every), node.args[0]).name
        return value, every, zero

    def sum_kind(self, node: fx.Node) -> tuple[int, int, int] | None:
        """Sides and axis of what a sum over one feature adds up, None where a node is no such sum of rows."""
        if node.target is not ops.contraction or self._dot_labels(node) is not None:
            return None
        spec = parse(spec_of(node))
        every = self.order(spec.labels)
        if len(every) != 2 or len(spec.summed) != 1 or base(spec.summed[0]) in (TOKEN, EARLIER):
            return None
        if not any(set(every) == set(dims_of(x)) for x in operands_of(node)):
            return None
        return self.side(every[0]), self.side(every[1]), every.index(spec.summed[0])

    def emit_together(self, nodes: tuple[fx.Node, ...]) -> None:
        """Sums of one kind at once."""
        made = []
        for node in nodes:
            value, _, zero = self._multiplied(node, [self.tile(x) for x in operands_of(node)])
            made.append((value, Tile(self.fresh("c"), self.order(dims_of(node)), zero)))
        kind = self.sum_kind(nodes[0])
        assert kind is not None
        names = ", ".join(tile.name for _, tile in made)
        values = ", ".join(value for value, _ in made)
        self.write(f"{names} = sums_{len(made)}({values}, {kind[2]}, FAST)")
        self.tiles |= {node: tile for node, (_, tile) in zip(nodes, made, strict=True)}

    def _masked(self, node: fx.Node) -> Tile:
        return self._causal(self.tile(operands_of(node)[0]), node.args[0])

    def _running_product(self, node: fx.Node) -> Tile:
        """Products over the tokens before each: a column for every token they start after, or one for all."""
        r = parse_relation(str(node.args[0]))
        tile = self.tile(operands_of(node)[0])
        if r.strict:
            tile = self._token_before(tile, r.later, r.earlier)
        target = self.order(dims_of(node))
        axis = target.index(r.later)
        if r.earlier not in target:
            return self.let("e", f"tl.cumprod({tile.name}, {axis})", target)
        later, earlier = (d + self.index((d,), target) for d in (r.later, r.earlier))
        after = f"{earlier} + 1 < {later}" if r.strict else f"{earlier} < {later}"
        factors = self.let("e", f"tl.where({after}, {self.line_up(tile, target)}, 1.0)", target)
        return self._causal(
            self.let("e", f"tl.cumprod({factors.name}, {axis})", target), str(node.args[0])
        )

    def _token_before(self, tile: Tile, later: str, other: str) -> Tile:
        """Each token's value taken from the token before it, one for the first."""
        names = {later: other}
        dims = tuple(names.get(d, d) for d in tile.dims)
        moved = self.sorted_tile(tile.name, dims, frozenset())
        target = self.order((later, *dims))
        t, s = (d + self.index((d,), target) for d in (later, other))
        value = f"tl.where({s} + 1 == {t}, {self.line_up(moved, target)}, 0.0)"
        shifted = self.let("e", f"tl.sum({value}, {target.index(other)})", tile.dims)
        first = f"{later}{self.index((later,), tile.dims)} == 0"
        return self.let("e", f"tl.where({first}, 1.0, {shifted.name})", tile.dims)

    def _reduction(self, node: fx.Node) -> Tile:
        function = str(node.args[0])
        if function not in ("amax", "amin"):
            raise NotLowerable(f"the reduction {function} has no Triton form")
        tile = self.tile(operands_of(node)[0])
        result = self.order(dims_of(node))
        gone = [d for d in tile.dims if d not in result]
        worst = "-inf" if function == "amax" else "inf"
        ragged = tuple(d for d in gone if self.ragged(d))
        value, name = tile.name, {"amax": "tl.max", "amin": "tl.min"}[function]
        if ragged:
            value = f'tl.where({self.mask(ragged, tile.dims)}, {value}, float("{worst}"))'
        poison = f"tl.where({tile.name} != {tile.name}, {tile.name}, 0.0)"
        for d in reversed(gone):
            axis = tile.dims.index(d)
            value, poison = f"{name}({value}, {axis})", f"tl.sum({poison}, {axis})"
        return self.let("r", f"{value} + {poison}", result)

    def _broadcast(self, node: fx.Node) -> Tile:
        tile = self.tile(operands_of(node)[0])
        target = self.order(dims_of(node))
        if not target:
            return self.let("e", f"tl.full((), {tile.name}, tl.float32)", ())
        shape = ", ".join(str(self.side(d)) for d in target)
        return self.let(
            "e", f"{self.line_up(tile, target)} + tl.zeros(({shape},), tl.float32)", target
        )

    def _last(self, node: fx.Node) -> Tile:
        (source,) = operands_of(node)
        (gone,) = [d for d in dims_of(source) if d not in dims_of(node)]
        tile = self.tile(source)
        result = self.order(dims_of(node))
        at = f"(first + {gone}){self.index((gone,), tile.dims)} == last"
        return self.let(
            "c", f"tl.sum(tl.where({at}, {tile.name}, 0.0), {tile.dims.index(gone)})", result
        )

    def _at_last(self, node: fx.Node) -> Tile:
        source, _ = operands_of(node)
        tile, target = self.tile(source), self.order(dims_of(node))
        (token,) = [d for d in target if d not in tile.dims]
        at = f"(first + {token} == last){self.index((token,), target)}"
        zero = tile.zero | {token}
        return self.let("m", f"tl.where({at}, {self.line_up(tile, target)}, 0.0)", target, zero)
