"""Unit-triangular systems over the tokens of a tile, in Triton.

The inverse of ``I + L`` is built from the inverses of its diagonal blocks, of 1, 2, 4, ... tokens: of two
neighbours ``P`` and ``Q`` with ``B`` between them the inverse is ``[[P, 0], [-Q B P, Q]]``, so that all blocks of a
size take two products. Unlike a product of powers of ``L``, which reaches the same depth, it makes no numbers larger
than those of inverses: like tokens (whose powers grow like binomial coefficients) lose no digits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx
from tttc.codegen.not_finite import any_not_finite
from tttc.codegen.triton_tiles import Tile

from tttc.ir.body import operands_of
from tttc.ir.build import dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.spec import Dims, parse_relation

if TYPE_CHECKING:
    from tttc.codegen.triton_products import Products

# Products of the inverse stay closer to float32 than those it goes into: errors in it are errors of every token. Beside
# operands of 16 bits tf32 is close enough (about 5e-4 of an inverse that is then rounded by 2e-3), and takes a third of
# the products and far fewer registers.
INVERSE = """@triton.jit
def unit_triangular_inverse(L, rows, columns, SIZE: tl.constexpr, DOT: tl.constexpr, FAST: tl.constexpr):
    SINGLE: tl.constexpr = "tf32x3" if DOT == tl.float32 else "tf32"
    EXACT: tl.constexpr = SINGLE if FAST else "ieee"
    apart = rows ^ columns
    inverse = tl.where(apart == 0, 1.0, 0.0) - tl.where(apart == 1, L, 0.0)
    for level in tl.static_range(1, 10):
        if (1 << level) < SIZE:
            between = tl.where((apart >= (1 << level)) & (apart < (2 << level)), L, 0.0)
            below = tl.dot(between, inverse, input_precision=EXACT)
            inverse -= tl.dot(inverse, below, input_precision=EXACT)
    return inverse


"""


def triangular_solve(renderer: Products, node: fx.Node) -> Tile:
    """The tile that solves a system, by its inverse.

    Raises:
        NotLowerable: where more than one feature dimension is solved for.
    """
    x = renderer.tile(operands_of(node)[1])
    r = parse_relation(str(node.args[0]))
    (own,) = {r.earlier, r.later} & set(dims_of(node))
    other = r.earlier if own == r.later else r.later
    columns = [d for d in x.dims if d != own]
    if len(columns) > 1:
        raise NotLowerable("a triangular system of tiles has no Triton form")
    given, inverse = _inverse(renderer, node, own, other)
    result = renderer.order(dims_of(node))
    zero = frozenset(d for d in columns if d in x.zero)

    def solved(x: Tile) -> str:
        return _applied(renderer, inverse, x, result, own, other)

    def cleared() -> Tile:
        return renderer.let("f", _finite(x), x.dims, x.zero)

    right = cleared() if renderer.schedule.nan == "product" else x
    made = renderer.let("y", solved(right), result, zero, note=f"solved over {r}")
    if renderer.schedule.nan == "ignored":
        return made
    depth = renderer.indent
    if renderer.schedule.nan == "branch":  # what is not finite shows in the solution
        renderer.write(f"if {any_not_finite((t.name, len(t.dims)) for t in (given, made))}:")
        renderer.indent += 1
        renderer.write(f"{made.name} = {solved(cleared())}")
    _poison(renderer, made, given, x, own, other, own == r.later)
    renderer.indent = depth
    return made


def _inverse(renderer: Products, node: fx.Node, own: str, other: str) -> tuple[Tile, Tile]:
    """The system, zero where its relation does not hold, and its inverse: once for all right sides in a place."""
    system_node, relation = operands_of(node)[0], str(node.args[0])
    key = (system_node, relation, own)
    if key in renderer.inverses:
        return renderer.inverses[key]
    system = renderer.tile(system_node)
    r = parse_relation(relation)
    pair = renderer.order((own, other))
    side = renderer.side(own)
    whole = f"{renderer.line_up(system, pair)} + tl.zeros(({side}, {side}), tl.float32)"
    if set(system.dims) == set(pair):
        whole = system.name
    held = renderer._causal(Tile(whole, pair), relation)
    if other == r.later:  # tokens beyond the sequence come first
        held = renderer.cleared(held, (other,))
    given = held
    if renderer.schedule.nan != "ignored":
        held = renderer.let("f", _finite(given), pair)
    rows, cols = (f"{d}{renderer.index((d,), pair)}" for d in pair)
    inverse = renderer.let(
        "c", f"unit_triangular_inverse({held.name}, {rows}, {cols}, {side}, DOT, FAST)", pair
    )
    renderer.inverses[key] = given, inverse
    return given, inverse


def _finite(tile: Tile) -> str:
    return f"tl.where({tile.name} * 0.0 == 0.0, {tile.name}, 0.0)"


def _poison(
    renderer: Products, made: Tile, system: Tile, x: Tile, own: str, other: str, forwards: bool
) -> None:
    """What is not finite reaches the tokens that are solved after it."""
    pair = system.dims
    bad = "tl.where({0} * 0.0 == 0.0, 0.0, 1.0)".format
    rows = renderer.let("f", f"tl.sum({bad(system.name)}, {pair.index(other)})", (own,))
    wrong = renderer.let("f", f"{bad(x.name)} + {renderer.line_up(rows, x.dims)}", x.dims)
    at = {d: d + renderer.index((d,), pair) for d in pair}
    order = "<=" if forwards else ">="
    seen = renderer.let("m", f"tl.where({at[other]} {order} {at[own]}, 1.0, 0.0)", pair)
    count = _applied(renderer, seen, wrong, made.dims, own, other)
    renderer.write(f'{made.name} = tl.where({count} > 0, float("nan"), {made.name})')


def _applied(renderer: Products, pairs: Tile, x: Tile, result: Dims, own: str, other: str) -> str:
    """A tile over pairs of tokens times rows of tokens."""
    if len(x.dims) == 1:
        seen = x.name + renderer.index((other,), pairs.dims)
        return f"tl.sum({pairs.name} * {seen}, {pairs.dims.index(other)})"
    # The other token dimension takes the place of the own one in what is summed.
    seen = Tile(x.name, tuple(other if d == own else d for d in x.dims))
    left, right = (pairs, seen) if result[0] == own else (seen, pairs)
    return renderer._product(left, right, (*result, other), None)
