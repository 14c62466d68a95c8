"""Which values are opened: looked through, to be made in another order than the program makes them.

A matrix for every token, larger than what it is made of, is never to be made: it and all linear values that read it are
opened, and sums and scaled values around them, where nobody else needs the parts.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from tttc.passes.terms import linear_kind

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, Body, is_token, operands_of, spec_of
from tttc.ir.build import dims_of
from tttc.ir.cost import element_count
from tttc.ir.errors import NotLowerable
from tttc.ir.spec import parse


class Opened:
    """The values of a body that are opened; costs are taken at ``sizes``.

    Raises:
        NotLowerable: where fast weights pass through a nonlinear function token by token.
    """

    def __init__(self, body: Body, sizes: dict[str, int]) -> None:
        self.body = body
        self.sizes = sizes
        self._sums: dict[fx.Node, bool] = {}
        self.heavy = self._heavy()
        self.nodes = self._opened()

    def _heavy(self) -> set[fx.Node]:
        """Matrices (or more) of which every token has its own, larger than what they are made of: never to be made.

        A vector for every token is what tokens are; so is what a matrix product makes of them.
        """
        largest: dict[fx.Node, int] = {}
        heavy: set[fx.Node] = set()
        for node in self.body.gm.graph.nodes:
            if node.op == "output":
                continue
            size = element_count(dims_of(node), self.sizes)
            features = [d for d in dims_of(node) if d not in (TOKEN, EARLIER)]
            sources = [largest[x] for x in node.all_input_nodes if x in largest]
            if (
                1 < len(features) < len(dims_of(node))
                and linear_kind(node)
                and sources
                and size > max(sources)
                and (not self._sums_up(node) or any(x in heavy for x in node.all_input_nodes))
            ):
                heavy.add(node)
                largest[node] = max(sources)
            else:
                largest[node] = size
        return heavy

    @staticmethod
    def _sums_up(node: fx.Node) -> bool:
        return node.target is ops.contraction and bool(parse(spec_of(node)).summed)

    def _opened(self) -> set[fx.Node]:
        opened = set(self.heavy)
        for node in self.body.nodes:
            if node in opened or not linear_kind(node):
                continue
            if any(x in self.heavy for x in node.all_input_nodes):
                opened.add(node)
        for node in self.heavy:
            for user in node.users:
                if user.op == "output" or not linear_kind(user):
                    raise NotLowerable(
                        "fast weights pass through a nonlinear function token by token: there is no dual form"
                    )
        # A sum into which such a value flows is one sum with it, where nobody else needs the part.
        changed = True
        while changed:
            changed = False
            for node in self.body.nodes:
                if (
                    node in opened
                    or node.target is not ops.elementwise
                    or linear_kind(node) != "sum"
                ):
                    continue
                if any(x in opened and len(x.users) == 1 for x in node.all_input_nodes):
                    opened.add(node)
                    changed = True
            for node in self.body.nodes:
                if node in opened or self._coefficients(node):
                    continue
                if not (self._causal_sum(node) or self._scaled(node)):
                    continue
                users = [u for u in node.users if u.op != "output"]
                at_end = node.target is ops.last
                if (users or at_end) and all(u in opened for u in users):
                    opened.add(node)
                    changed = True
        return opened

    @staticmethod
    def _coefficients(node: fx.Node) -> bool:
        """Numbers for pairs of tokens, and sums of such: small, and factors of many products."""
        dims = dims_of(node)
        pairs = len(dims) > 1 or node.target is ops.masked_contraction
        return pairs and all(is_token(d) for d in dims)

    def _scaled(self, node: fx.Node) -> bool:
        """A value times per-token numbers, or renamed: opened, the numbers join the others of the product."""
        if linear_kind(node) == "view":
            return node.target is ops.rename
        if node.target is not ops.elementwise or linear_kind(node) != "product":
            return False
        return any(self._per_token(x) for x in operands_of(node))

    @staticmethod
    def _per_token(x: Any) -> bool:
        return all(d in (TOKEN, EARLIER) for d in dims_of(x))

    def _causal_sum(self, node: fx.Node) -> bool:
        """A linear value made of a causal sum: worth opening, so that sums share their last product."""
        if node not in self._sums:
            inside = [x for x in node.all_input_nodes if self._causal_sum(x)]
            kind = linear_kind(node)
            passes_on = kind in ("sum", "view") or (
                kind == "product"
                and len(inside) == 1
                and all(self._per_token(x) for x in operands_of(node) if x is not inside[0])
            )
            self._sums[node] = bool(kind) and (
                node.target is ops.masked_contraction or (bool(inside) and passes_on)
            )
        return self._sums[node]
