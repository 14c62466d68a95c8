"""Pieces: wide dimensions divided, so that a tile is no wider than registers and the matrix unit like it.

Before, with j of 256::

    z[t j] = x[t i] W[i j];  y[t i] = f(z)[t j] V[j i]

After, with j of 128 in two pieces, each a tile of its own::

    z0[t j] = x[t i] W0[i j];  z1[t j] = x[t i] W1[i j]
    y[t i] = f(z0)[t j] V0[j i] + f(z1)[t j] V1[j i]
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx
from tttc.codegen.loop import Loop, Piece, Sink, Source, used

from tttc.ir import ops
from tttc.ir.body import spec_of
from tttc.ir.build import dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.spec import Dims, parse

ADDED = (ops.contraction, ops.masked_contraction)


def divided(loop: Loop, widest: int) -> Loop:
    """The loop with every feature dimension wider than ``widest`` in pieces of that size.

    The first piece of an argument keeps its name, the others are ``Loop.pieces``.

    Raises:
        NotLowerable: where an operator treats a wide dimension as a whole.
    """
    wide = {d: n // widest for d, n in loop.sizes.items() if n > widest and n % widest == 0}
    if not wide:
        return loop
    graph = fx.Graph()
    made: dict[fx.Node, list[fx.Node]] = {}
    sources: dict[fx.Node, Source] = {}
    pieces: dict[str, Piece] = {}
    wanted = used(loop)

    def divides(dims: Dims) -> str | None:
        found = [d for d in dims if d in wide]
        if len(found) > 1:
            raise NotLowerable(f"two wide dimensions in one value: {' '.join(found)}")
        return found[0] if found else None

    def named(name: str, dim: str | None, i: int) -> str:
        if dim is None or i == 0:
            return name
        pieces[f"{name}_{dim}{i}"] = Piece(name, dim, i * widest)
        return f"{name}_{dim}{i}"

    for node in loop.graph.nodes:
        if node.op == "output":
            continue
        dims = dims_of(node)
        dim = divides(dims)
        count = wide[dim] if dim else 1
        if node.op == "placeholder":
            source = loop.sources[node]
            made[node] = []
            for i in range(count):
                new = graph.placeholder(named(str(node.target), dim, i))
                sources[new] = Source(source.kind, named(source.name, dim, i))
                new.meta = {"dims": dims}
                made[node].append(new)
            continue
        if node not in wanted:
            continue
        summed = divides(tuple(d for d in parse(spec_of(node)).labels if d not in dims))
        if summed and (dim or node.target not in ADDED):
            raise NotLowerable(f"{node.target} over a dimension in pieces")

        def copy(node: fx.Node, i: int) -> fx.Node:
            new = graph.node_copy(node, lambda x: made[x][i if len(made[x]) > 1 else 0])
            new.meta = {"dims": dims_of(node)}
            return new

        if summed is None:
            made[node] = [copy(node, i) for i in range(count)]
            continue
        total = copy(node, 0)
        text = " ".join(dims)
        for i in range(1, wide[summed]):
            part = copy(node, i)
            total = graph.call_function(
                ops.elementwise, ("add", f"{text}, {text} -> {text}", total, part)
            )
            total.meta = {"dims": dims}
        made[node] = [total]
    sinks = [
        (new, Sink(sink.kind, named(sink.name, divides(dims_of(node)), i)))
        for node, sink in loop.sinks
        for i, new in enumerate(made[node])
    ]
    graph.output(tuple(node for node, _ in sinks))
    save = tuple(
        name
        for whole in loop.save
        for name in (whole, *(p for p, piece in pieces.items() if piece.of == whole))
    )
    return replace(
        loop,
        graph=graph,
        sources=sources,
        sinks=sinks,
        sizes=loop.sizes | dict.fromkeys(wide, widest),
        pieces=pieces,
        whole={d: loop.sizes[d] for d in wide},
        save=save,
    )
