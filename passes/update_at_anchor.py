"""Update at the anchor: the mini-batch approximation of an online rule. It computes something else, where asked to.

What a token adds to the state is taken at the state its mini-batch started from, not at the one the token before it
left; how the state is scaled and added up stays as it is, and so do the outputs.

Before::

    g = contraction("i, i j -> j", k, carry_W) - v
    W = alpha * carry_W - outer(k, g)

After::

    g = contraction("i, i j -> j", k, anchor_W) - v
    W = alpha * carry_W - outer(k, g)

Source: mini-batch gradient descent in place of online gradient descent, arXiv 2407.04620, section 2.4.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from tttc.passes.chunkwise import dependents, scales

from tttc.ir.body import Body, operands_of, role
from tttc.ir.build import Builder, dims_of
from tttc.ir.errors import NotLowerable


class _Anchored:
    """One run of the pass."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self.graph = fx.Graph()
        self.builder = Builder(self.graph)
        self.arguments: dict[fx.Node, fx.Node] = {}
        for node in body.placeholders:
            new = self.graph.placeholder(str(node.target))
            new.meta["dims"] = dims_of(node)
            self.arguments[node] = new
        carries = [p for p in body.placeholders if role(p)[0] == "carry"]
        by_role = {role(p): p for p in body.placeholders}
        self.anchors = {c: self.arguments[by_role["anchor", role(c)[1]]] for c in carries}
        self.touched = dependents(body, carries)
        self.updates = {**self.arguments, **self.anchors}  # as part of what a token adds
        self.states = dict(self.arguments)  # as multiples of the state
        self.values = dict(self.arguments)  # as outputs see them

    def run(self) -> Body:
        results = self.body.results
        new = results[: self.body.states]
        for leaf, value in zip(self.anchors, new, strict=True):
            if value in self.touched and not self.scaled(value, leaf):
                raise NotLowerable("the new state is not what tokens add to the old one")
        states = [self.state(x) for x in new]
        outputs = [self.value(x) for x in results[self.body.states :]]
        self.graph.output((*states, *outputs))
        return self.body.with_graph(self.graph)

    def scaled(self, node: Any, leaf: fx.Node) -> bool:
        """Whether a sum of multiples has one of the leaf."""
        if node is leaf or node not in self.touched:
            return node is leaf
        return scales(node, self.touched) and any(self.scaled(x, leaf) for x in operands_of(node))

    def state(self, node: Any) -> Any:
        """A sum of multiples of the state and of what is added to it."""
        if not isinstance(node, fx.Node) or node in self.states:
            return self.states.get(node, node)
        if node in self.touched and scales(node, self.touched):
            operands = [self.state(x) for x in operands_of(node)]
            self.states[node] = self.builder.copy(node, operands, dims_of(node))
        else:
            self.states[node] = self.update(node)
        return self.states[node]

    def update(self, node: Any) -> Any:
        """What a token adds, or what that is made of."""
        return self.made(node, self.updates)

    def value(self, node: Any) -> Any:
        """What an output is made of: new states are those that are handed on."""
        if node in self.body.results[: self.body.states]:
            return self.state(node)
        return self.made(node, self.values)

    def made(self, node: Any, known: dict[fx.Node, fx.Node]) -> Any:
        if not isinstance(node, fx.Node) or node in known:
            return known.get(node, node)
        of = self.update if known is self.updates else self.value
        known[node] = self.builder.copy(node, [of(x) for x in operands_of(node)], dims_of(node))
        return known[node]


def update_at_anchor(body: Body) -> Body:
    """The one-token body whose updates are taken at the anchor; ``body`` takes them at the carry.

    Raises:
        NotLowerable: where the new state is not the old one, scaled, and something added to it.
    """
    return _Anchored(body).run()
