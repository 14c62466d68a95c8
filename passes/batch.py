"""Batch: from one token to a mini-batch of tokens, in the primal form.

With named dimensions this is a label: whatever depends on the token gains the dimension ``t``. Only the
carry needs thought. Where it is affine in itself, ``S = carry.S + u``, its value at token t is a causal sum.

Before (one token)::

    S = elementwise("add", "i j, i j -> i j", carry_S, u)
    z = contraction("i, i j -> j", q, S)

After (a mini-batch; every token's fast weights are materialised)::

    u1 = rename("t i j -> s i j", u)
    S1 = masked_contraction("s<=t", "s i j -> t i j", u1)
    S  = elementwise("add", "i j, t i j -> t i j", carry_S, S1)
    z  = contraction("t i, t i j -> t j", q, S)

Source: the cumulative sum of equation 7 of arXiv 2407.04620, for any inner model.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, Body, head_of, operands_of, role
from tttc.ir.build import Builder, dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.functions import FUNCTIONS


def affine_in(node: Any, leaf: fx.Node, builder: Builder, touched: set[fx.Node]) -> tuple[Any, Any]:
    """``node`` as ``a * leaf + u``: the pair ``(a, u)``, either possibly 0; ``a`` is a number or a scalar node.

    ``touched`` holds the nodes that depend on ``leaf``.

    Raises:
        NotLowerable: where the node is not affine in the leaf with a scalar coefficient.
    """
    if node is leaf:
        return 1, 0
    if not isinstance(node, fx.Node) or node not in touched:
        return 0, node
    parts = operands_of(node) if node.op == "call_function" else ()
    kind = FUNCTIONS[head_of(node)].linear if node.target is ops.elementwise else ""
    if kind == "sum":
        pairs = [affine_in(x, leaf, builder, touched) for x in parts]
        if all(
            a == 0 or dims_of(x) == dims_of(node) for (a, _), x in zip(pairs, parts, strict=True)
        ):
            sign = {"add": (1, 1), "sub": (1, -1), "neg": (-1,)}[head_of(node)]
            return tuple(_signed_sum([p[i] for p in pairs], sign, builder) for i in (0, 1))  # type: ignore[return-value]
    product = kind == "product" or (
        node.target is ops.contraction
        and set(dims_of(node)) == {d for x in parts for d in dims_of(x)}
    )
    if product:
        inside = [x for x in parts if isinstance(x, fx.Node) and x in touched]
        others = [x for x in parts if not (isinstance(x, fx.Node) and x in touched)]
        if len(inside) == 1 and not any(dims_of(x) for x in others):
            a, u = affine_in(inside[0], leaf, builder, touched)
            for x in others:
                a, u = _times(x, a, builder), _times(x, u, builder)
            return a, u
    raise NotLowerable("the new state is not affine in the old one with a scalar coefficient")


def _signed_sum(values: list[Any], signs: tuple[int, ...], builder: Builder) -> Any:
    total: Any = 0
    for value, sign in zip(values, signs, strict=True):
        if isinstance(value, (int, float)) and isinstance(total, (int, float)):
            total = total + sign * value
        elif isinstance(value, (int, float)) and value == 0:
            continue
        elif isinstance(total, (int, float)) and total == 0:
            total = value if sign > 0 else builder.elementwise("neg", value)
        else:
            total = builder.elementwise("add" if sign > 0 else "sub", total, value)
    return total


def _times(x: Any, y: Any, builder: Builder) -> Any:
    if isinstance(y, (int, float)) and y in (0, 1):
        return y * x if y == 0 and isinstance(x, (int, float)) else (x if y == 1 else 0)
    if isinstance(x, (int, float)) and isinstance(y, (int, float)):
        return x * y
    return builder.elementwise("mul", x, y, result=dims_of(y))


class _Batcher:
    """One run of the pass."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self.graph = fx.Graph()
        self.builder = Builder(self.graph)
        self.env: dict[Any, Any] = {}
        self.running: set[Any] = set()
        self.carries = [p for p in body.placeholders if role(p)[0] == "carry"]
        self.touched = {c: _dependents(body, c) for c in self.carries}
        # Affine analysis writes its coefficients into the one-token graph, which is copied for it.
        self.scratch = Builder(body.gm.graph)
        self.recurrent: dict[fx.Node, tuple[fx.Node, Any, Any]] = {}  # new value -> (leaf, a, u)

    def run(self) -> Body:
        for old in self.body.placeholders:
            new = self.graph.placeholder(str(old.target))
            new.meta["dims"] = ((TOKEN,) if role(old)[0] == "token" else ()) + dims_of(old)
            self.env[old] = new
        results = self.body.results
        state, outputs = results[: self.body.states], results[self.body.states :]
        with self.body.gm.graph.inserting_before(self.body.gm.graph.output_node()):
            for leaf, value in zip(self.carries, state, strict=True):
                if value in self.touched[leaf] or value is leaf:
                    a, u = affine_in(value, leaf, self.scratch, self.touched[leaf])
                    if value is not leaf and a == 0:
                        raise NotLowerable("the new state only seems to depend on the old one")
                    if not (isinstance(a, (int, float)) and a == 1):
                        raise NotLowerable("a state decays; its tokens run one after another")
                    self.recurrent[value] = (leaf, a, u)
        final = []
        for value in state:
            new = self.batched(value)
            final.append(self.builder.last(new, TOKEN) if TOKEN in dims_of(new) else new)
        for value in outputs:
            new = self.batched(value)
            if TOKEN not in dims_of(new):
                raise NotLowerable("an output does not depend on the token")
            final.append(new)
        self.graph.output(tuple(final))
        return self.body.with_graph(self.graph, batched=True)

    def batched(self, node: Any) -> Any:
        """The node for a mini-batch of tokens."""
        if not isinstance(node, fx.Node):
            return node
        key: Any = node
        if node in self.carries:
            key = ("before", node)
        elif node in self.env:
            return self.env[node]
        if key in self.env:
            return self.env[key]
        if key in self.running:
            raise NotLowerable(
                "the update depends on the state it makes: tokens run one after another"
            )
        self.running.add(key)
        if node in self.carries:
            new = self.before(node)
        elif node in self.recurrent:
            leaf, _, u = self.recurrent[node]
            new = self.accumulated(leaf, u, strict=False)
        else:
            operands = [self.batched(x) for x in operands_of(node)]
            varies = any(TOKEN in dims_of(x) for x in operands)
            result = ((TOKEN,) if varies else ()) + dims_of(node)
            new = self.builder.copy(node, operands, result)
        self.running.discard(key)
        self.env[key] = new
        return new

    def before(self, leaf: fx.Node) -> Any:
        """The carry as it stood before each token."""
        for owner, _, u in self.recurrent.values():
            if owner is leaf:
                return self.accumulated(leaf, u, strict=True)
        raise NotLowerable("a token uses the state that the token before it made anew")

    def accumulated(self, leaf: fx.Node, u: Any, strict: bool) -> Any:
        """The carry at the start of the mini-batch and what tokens have added to it."""
        start = self.env[leaf]
        added = self.batched(u)
        if isinstance(added, (int, float)) and added == 0:
            return start
        if TOKEN not in dims_of(added):
            raise NotLowerable("what is added to the state does not depend on the token")
        earlier = self.builder.rename(added, {TOKEN: EARLIER})
        relation = f"{EARLIER}{'<' if strict else '<='}{TOKEN}"
        dims = (TOKEN, *dims_of(start))
        total = self.builder.masked_contraction(relation, [earlier], dims)
        return self.builder.elementwise("add", start, total, result=dims)


def _dependents(body: Body, leaf: fx.Node) -> set[fx.Node]:
    found = {leaf}
    for node in body.gm.graph.nodes:
        if node.op == "call_function" and any(x in found for x in node.all_input_nodes):
            found.add(node)
    return found


def batch(body: Body) -> Body:
    """The body for a mini-batch of tokens; the one for one token is left as it is.

    Raises:
        NotLowerable: where tokens of a mini-batch can only run one after another, with the reason.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(body.gm.graph, mapping))  # type: ignore[arg-type]
    return _Batcher(body.with_graph(graph)).run()
