"""Numbers in the values of a loop: what its programs hold, tile by tile."""

from __future__ import annotations

import math

from torch import fx
from tttc.codegen.loop import Loop, used
from tttc.codegen.work import is_product

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, is_token, spec_of
from tttc.ir.build import dims_of
from tttc.ir.cost import element_count
from tttc.ir.spec import parse

THREADS = 32  # of a warp
STATE_REGISTERS = (
    80  # of a thread, at most, where warps can be added: tiles and operands need the others
)
MOST_WARPS = 8  # with 16, matrix products of 64 rows are made more than once


def state_elements(loop: Loop) -> int:
    """Numbers of the state that one program keeps in registers: those it makes, and those it starts from."""
    wanted = used(loop)
    made = {sink.name for _, sink in loop.sinks if sink.kind == "state"}
    counted = {
        source.name: element_count(dims_of(node), loop.sizes)
        for node, source in loop.sources.items()
        if source.kind == "state" and (source.name in made or node in wanted)
    }
    return sum(counted.values())


def matrix_elements(loop: Loop) -> int:
    """Numbers of the matrices without tokens that a parallel loop reads for a mini-batch or adds up."""
    read = {n for n, s in loop.sources.items() if s.kind in ("saved", "value") and n in used(loop)}
    nodes = read | {n for n, s in loop.sinks if s.kind == "sum"}
    matrices = [dims_of(n) for n in nodes if len(dims_of(n)) > 1]
    return sum(element_count(d, loop.sizes) for d in matrices if not {TOKEN, EARLIER} & set(d))


def size(loop: Loop, dim: str) -> int:
    """The size of a dimension."""
    return loop.mini_batch_size if is_token(dim) else loop.sizes[dim]


def value_elements(loop: Loop, node: fx.Node) -> int:
    """Numbers of a value of one mini-batch."""
    return math.prod(size(loop, d) for d in dims_of(node))


def tile_elements(loop: Loop) -> int:
    """Numbers of the largest tile that has tokens of a mini-batch in it."""
    return max(
        (value_elements(loop, n) for n in used(loop) if any(map(is_token, dims_of(n)))), default=0
    )


def row_dims(loop: Loop) -> set[str]:
    """The dimensions that are tokens of one turn: of a mini-batch, or of a token that is a tile."""
    if loop.tokens:
        return {d for n in used(loop) for d in dims_of(n) if is_token(d)}
    passing = ("token", "value")
    kept = {d for n, s in loop.sources.items() if s.kind not in passing for d in dims_of(n)}
    read = {d for n, s in loop.sources.items() if s.kind == "token" for d in dims_of(n)}
    return read - kept


def tile_rows(loop: Loop) -> int:
    """Tokens that one turn of the loop handles."""
    if loop.tokens:
        return loop.mini_batch_size
    return max((loop.sizes[d] for d in row_dims(loop)), default=1)


def wide_tile(loop: Loop) -> int:
    """Numbers of the largest tile that has tokens and features."""
    rows = row_dims(loop)
    tiles = [n for n in used(loop) if 0 < len(rows.intersection(dims_of(n))) < len(dims_of(n))]
    return max((value_elements(loop, n) for n in tiles), default=0)


def product_features(loop: Loop) -> int:
    """The smallest feature dimension of a matrix product; 0 where there is no such product."""
    rows = row_dims(loop)
    dims = {d for n in used(loop) if is_product(n) for d in parse(spec_of(n)).labels}
    return min((loop.sizes[d] for d in dims - rows), default=0)


def product_flops(loop: Loop) -> int:
    """Floating-point operations of the matrix products of one turn."""
    labels = [parse(spec_of(n)).labels for n in used(loop) if is_product(n)]
    return sum(2 * math.prod(size(loop, d) for d in dims) for dims in labels)


def products(loop: Loop) -> int:
    """Products of two operands in a turn of the loop."""
    kinds = (ops.contraction, ops.masked_contraction)
    return sum(n.target in kinds and len(n.all_input_nodes) == 2 for n in used(loop))


def fits(loop: Loop, warps: int) -> bool:
    """Whether the state of a program, or two of its largest tiles where it has none, leave registers to others."""
    elements = state_elements(loop)
    if loop.parallel:
        known = loop.sizes | {TOKEN: loop.mini_batch_size, EARLIER: loop.mini_batch_size}
        tiles = [dims_of(n) for n in used(loop)]
        elements = 2 * max(math.prod(known.get(d, 1) for d in dims) for dims in tiles)
    return elements <= STATE_REGISTERS * THREADS * warps
