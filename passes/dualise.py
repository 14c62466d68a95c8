"""Dualise: no token's fast weights are materialised, because a better contraction order never makes them.

Before (primal: ``b * i * j`` numbers are made)::

    S = masked_contraction("s<=t", "s i j -> t i j", u)        # u = k_si * g_sj
    W = elementwise("sub", "i j, t i j -> t i j", A, S)
    z = contraction("t i, t i j -> t j", q, W)

After (dual)::

    p = contraction("t i, i j -> t j", q, A)
    a = contraction("t i, s i -> t s", q, k)
    c = masked_contraction("s<=t", "t s, s j -> t j", a, g)
    z = elementwise("sub", "t j, t j -> t j", p, c)

Products are distributed over the sums inside them, nested contractions become one, like terms are added up,
and each product is evaluated in the order that costs least. Nothing here knows an inner model: it is a
change of contraction order (section 2.5 and appendix A of arXiv 2407.04620, for one layer).
"""

from __future__ import annotations

from typing import Any

from torch import fx
from tttc.passes.evaluate_terms import TermEvaluator
from tttc.passes.opened import Opened
from tttc.passes.terms import Expander, Term, collect

from tttc.ir.body import Body, operands_of
from tttc.ir.build import dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.spec import Dims


class Dualiser(TermEvaluator):
    """One run of the pass."""

    def __init__(self, body: Body, mini_batch_size: int) -> None:
        super().__init__(body, mini_batch_size)
        self.opened = Opened(body, self.sizes).nodes

    def run(self) -> Body:
        needed = self._needed()
        for node in self.body.gm.graph.nodes:
            if node.op == "placeholder":
                new = self.graph.placeholder(str(node.target))
                new.meta["dims"] = dims_of(node)
                self.env[node] = new
            elif node.op == "call_function" and node in needed:
                self.env[node] = self.root(node) if node in self.opened else self.copied(node)
        self.graph.output(tuple(self.env[x] for x in self.body.results))
        return self.body.with_graph(self.graph, orders=self.orders)

    def _needed(self) -> set[fx.Node]:
        """Nodes that are made: results, and what those are made of once opened nodes are looked through."""
        needed: set[fx.Node] = set()
        stack = list(self.body.results)
        while stack:
            node = stack.pop()
            if node in needed or node.op != "call_function":
                continue
            needed.add(node)
            inputs = list(node.all_input_nodes)
            if node in self.opened:
                inputs = self._atoms(node)
            stack += inputs
        return needed

    def _atoms(self, node: fx.Node) -> list[fx.Node]:
        found: list[fx.Node] = []
        stack = list(node.all_input_nodes)
        while stack:
            x = stack.pop()
            if x in self.opened:
                stack += x.all_input_nodes
            else:
                found.append(x)
        return found

    def copied(self, node: fx.Node) -> fx.Node:
        operands = [self.env.get(x, x) if isinstance(x, fx.Node) else x for x in operands_of(node)]
        return self.builder.copy(node, operands, dims_of(node))

    def root(self, node: fx.Node) -> fx.Node:
        """A value evaluated in the cheapest order."""
        result = dims_of(node)
        expander = Expander(self.opened, self.sizes, self._last_of, self._each)
        return self.evaluated(collect(expander.expand(node, result), result), result)

    def evaluated(self, terms: list[Term], result: Dims) -> Any:
        """A sum of terms, all axes of the result there."""
        made = self.assemble([self.evaluate(t, result) for t in terms], result)
        if dims_of(made) != result:
            raise NotLowerable("a value of the mini-batch is the same along a dimension")
        return made

    def _last_of(self, node: fx.Node, dim: str) -> fx.Node:
        """The last token's value of a node, in terms of the old graph (a stand-in until it is made)."""
        key = ("last", node, dim)
        if key not in self.memo:
            source = self.env.get(node, node)
            self.memo[key] = self.builder.last(source, dim)
            self.env[self.memo[key]] = self.memo[key]
        return self.memo[key]


def dualise(body: Body, mini_batch_size: int) -> Body:
    """The batched body without any value larger than what it is made of; costs are taken at ``mini_batch_size``.

    Raises:
        NotLowerable: where fast weights pass through a nonlinear function token by token.
    """
    return Dualiser(body, mini_batch_size).run()
