"""Batch: from one token to a mini-batch of tokens, in the primal form.

With named dimensions this is a label: whatever depends on the token gains the dimension ``t``. Only the
carry needs thought: where it is affine in itself with scalar coefficients (``passes/affine.py``), its value at token t is
a causal sum with coefficients for pairs of tokens (``passes/recurrence.py``).

Before (one token)::

    S = elementwise("add", "i j, i j -> i j", carry_S, u)
    z = contraction("i, i j -> j", q, S)

After (a mini-batch; every token's fast weights are materialised)::

    u1 = rename("t i j -> s i j", u)
    S1 = masked_contraction("s<=t", "s i j -> t i j", u1)
    S  = elementwise("add", "i j, t i j -> t i j", carry_S, S1)
    z  = contraction("t i, t i j -> t j", q, S)

With a decay, ``S = a * carry.S + u``::

    F  = running_product("s<=t", "t -> t s", a)
    p  = running_product("s<=t", "t -> t", a)
    S1 = masked_contraction("s<=t", "t s, s i j -> t i j", F, u1)
    S  = p * carry_S + S1

Source: the cumulative sum of equation 7 of arXiv 2407.04620, for any inner model; with momentum and decay,
section 3.2 of arXiv 2501.00663.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from tttc.passes.affine import System
from tttc.passes.recurrence import Recurrence

from tttc.ir.body import TOKEN, Body, operands_of, role
from tttc.ir.build import Builder, dims_of
from tttc.ir.errors import NotLowerable


class _Batcher:
    """One run of the pass."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self.graph = fx.Graph()
        self.builder = Builder(self.graph)
        self.env: dict[Any, Any] = {}
        self.running: set[Any] = set()
        self.system = System(body)
        self.leaves = {v: c for c, v in self.system.values.items() if self.system.recurrent(c)}

    def run(self) -> Body:
        for old in self.body.placeholders:
            new = self.graph.placeholder(str(old.target))
            new.meta["dims"] = ((TOKEN,) if role(old)[0] == "token" else ()) + dims_of(old)
            self.env[old] = new
        start = {c: self.env.pop(c) for c in self.system.carries}
        self.recurrence = Recurrence(self.system, self.builder, self.batched, start, self.like)
        for leaf in self.leaves.values():
            self.system.update(leaf)
        final = []
        for leaf, value in self.system.values.items():
            new = start[leaf] if value is leaf else self.batched(value)
            final.append(self.builder.last(new, TOKEN) if TOKEN in dims_of(new) else new)
        for value in self.body.results[self.body.states :]:
            new = self.batched(value)
            if TOKEN not in dims_of(new):
                raise NotLowerable("an output does not depend on the token")
            final.append(new)
        self.graph.output(tuple(final))
        return self.body.with_graph(self.graph, batched=True)

    def batched(self, node: Any) -> Any:
        """The node for a mini-batch of tokens; for a carry, what each token finds."""
        if not isinstance(node, fx.Node):
            return node
        if node in self.env:
            return self.env[node]
        if node in self.running:
            raise NotLowerable(
                "the update depends on the state it makes: tokens run one after another"
            )
        self.running.add(node)
        if node in self.system.touched:
            new = self.recurrence.before(node)
        elif node in self.leaves:
            new = self.recurrence.after(self.leaves[node])
        else:
            operands = [self.batched(x) for x in operands_of(node)]
            varies = any(TOKEN in dims_of(x) for x in operands)
            result = ((TOKEN,) if varies else ()) + dims_of(node)
            new = self.builder.copy(node, operands, result)
        self.running.discard(node)
        self.env[node] = new
        return new

    def like(self) -> fx.Node:
        """The smallest floating argument that says how many tokens there are."""
        tokens = [
            p for p in self.body.placeholders
            if role(p)[0] == "token" and str(p.target) not in self.body.whole
        ]  # fmt: skip
        if not tokens:
            raise NotLowerable("a state decays and no token has floating values")
        return self.env[min(tokens, key=lambda p: (not p.users, len(dims_of(p))))]


def batch(body: Body) -> Body:
    """The body for a mini-batch of tokens; the one for one token is left as it is.

    Raises:
        NotLowerable: where tokens of a mini-batch can only run one after another, with the reason.
    """
    return _Batcher(body).run()
