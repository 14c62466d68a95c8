"""Triangular systems out of the way of the state: a system is solved for what is given, before the state is known.

Before: the system waits for the state, mini-batch after mini-batch::

    y = triangular_solve("s<t", A, K @ state - v)

After: two systems that wait for nothing, and one product that does::

    W = triangular_solve("s<t", A, K)
    u = triangular_solve("s<t", A, v)
    y = W @ state - u

It is more to compute, so it pays where what does not wait for the state runs in a kernel of its own
(:mod:`tttc.codegen.stages`). Source: the WY representation as arXiv 2406.06484 computes it (section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx
from tttc.codegen.loop import Loop

from tttc.ir import ops
from tttc.ir.body import head_of, operands_of
from tttc.ir.build import Builder, dims_of
from tttc.ir.functions import FUNCTIONS
from tttc.ir.spec import parse_relation


def has_solves(loop: Loop) -> bool:
    """Whether a loop solves triangular systems."""
    return any(n.target is ops.triangular_solve for n in loop.graph.nodes)


class _Distributor:
    """One run of the pass."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.graph = fx.Graph()
        self.builder = Builder(self.graph)
        self.env: dict[fx.Node, Any] = {}
        self.waiting = {n for n, s in loop.sources.items() if s.kind == "state"}
        for node in loop.graph.nodes:
            if node.op == "call_function" and self.waiting & set(node.all_input_nodes):
                self.waiting.add(node)

    def run(self) -> Loop:
        for node in self.loop.graph.nodes:
            if node.op == "output":
                continue
            self.env[node] = self.solved(node) or self.copied(node)
        sinks = [(self.env[n], sink) for n, sink in self.loop.sinks]
        self.graph.output(tuple(n for n, _ in sinks))
        sources = {self.env[n]: s for n, s in self.loop.sources.items()}
        return replace(self.loop, graph=self.graph, sources=sources, sinks=sinks)

    def copied(self, node: fx.Node) -> fx.Node:
        new = self.graph.node_copy(node, self.env.__getitem__)
        new.meta = {"dims": dims_of(node)}
        return new

    def solved(self, node: fx.Node) -> Any:
        """What takes the place of a system that waits for the state only on its right side; else None."""
        if node.target is not ops.triangular_solve:
            return None
        system, x = operands_of(node)
        if system in self.waiting or x not in self.waiting:
            return None
        r = parse_relation(head_of(node))
        (own,) = {r.earlier, r.later} & set(dims_of(node))
        if not self.distributes(x, own):
            return None
        names = {d: d for d in dims_of(x)}
        return self.distributed(x, own, names, lambda y: self.builder.triangular_solve(str(r), self.env[system], y))  # fmt: skip

    def distributes(self, x: Any, own: str) -> bool:
        """Whether a right side is a sum of products, each of rows that are known and of what waits for the state.

        ``own``: the token dimension of the rows.
        """
        if not isinstance(x, fx.Node):
            return False
        if x not in self.waiting:
            return True
        operands = operands_of(x)
        if x.target is ops.rename:
            renamed = dict(zip(dims_of(x), dims_of(operands[0]), strict=True))
            return self.distributes(operands[0], renamed[own])
        if x.target is ops.elementwise:
            kind = FUNCTIONS[head_of(x)].linear
            inside = [y for y in operands if isinstance(y, fx.Node)]
            whole = all(set(dims_of(y)) == set(dims_of(x)) for y in inside)
            sums = kind == "sum" and len(inside) == len(operands)
            scaled = kind in ("product", "first") and len(inside) == 1
            return whole and (sums or scaled) and all(self.distributes(y, own) for y in inside)
        if x.target is ops.contraction:
            rows = [y for y in operands if own in dims_of(y)]
            return len(rows) == 1 and rows[0] not in self.waiting and len(dims_of(rows[0])) == 2
        return False

    def distributed(
        self, x: Any, own: str, names: dict[str, str], solve: Callable[[Any], Any]
    ) -> Any:
        """What solves for ``x``, its dimensions called as ``names`` says."""
        result = tuple(names[d] for d in dims_of(x))
        operands = operands_of(x) if x in self.waiting else ()
        if x not in self.waiting:
            return solve(self.builder.rename(self.env[x], names))
        if x.target is ops.rename:
            inner = {d: names[e] for d, e in zip(dims_of(operands[0]), dims_of(x), strict=True)}
            was = next(d for d, e in zip(dims_of(operands[0]), dims_of(x), strict=True) if e == own)
            return self.distributed(operands[0], was, inner, solve)
        if x.target is ops.elementwise:
            parts = [
                self.distributed(y, own, names, solve) if isinstance(y, fx.Node) else y
                for y in operands
            ]
            return self.builder.copy(x, parts, result)
        rows = {own: names[own]}
        parts = [
            solve(self.builder.rename(self.env[y], rows)) if own in dims_of(y) else self.env[y]
            for y in operands
        ]
        return self.builder.copy(x, parts, result)


def solved_before_states(loop: Loop) -> Loop:
    """The loop with every triangular system that can be solved before the state is known solved there."""
    return _Distributor(loop).run() if has_solves(loop) else loop
