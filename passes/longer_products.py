"""Longer products: the product over the tokens before one, times that token's own number, is the product up to it.

Where a state decays, what a token sees of the state is a running product without the token's own number, by which the
update then multiplies it; what is handed on is the one with it. Both take as long as the rest of small tiles does.

Before::

    a = running_product("s<t", "t -> t s", x);   b = contraction("t, t s -> t s", x, a)
    c = running_product("s<=t", "t -> t s", x)

After::

    c = running_product("s<=t", "t -> t s", x);  b = masked("s<t", "t s -> t s", c)
"""

from __future__ import annotations

from torch import fx
from tttc.passes.simplify import simplify

from tttc.ir import ops
from tttc.ir.body import Body, head_of, operands_of, spec_of
from tttc.ir.build import Builder, dims_of
from tttc.ir.spec import parse, parse_relation


def longer_products(body: Body) -> Body:
    """The body with running products that include their token where that is multiplied in."""
    if not any(map(_is_short, body.nodes)):
        return body
    graph = fx.Graph()
    graph.output(graph.graph_copy(body.gm.graph, {}))
    changed = False
    while _replace_one(graph):
        changed = True
    return simplify(body.with_graph(graph)) if changed else body


def _is_short(node: fx.Node) -> bool:
    """Whether a node is a running product without the token's own number."""
    return node.target is ops.running_product and parse_relation(head_of(node)).strict


def _replace_one(graph: fx.Graph) -> bool:
    """Replace the first product that can be; whether there was one."""
    for node in graph.nodes:
        factors = _factors(node, root=True)
        for short in filter(_is_short, factors):
            (own,) = operands_of(short)
            if own in factors and len(short.users) == 1:  # else there would be both
                factors.remove(short)
                factors.remove(own)
                _replace(graph, node, short, factors)
                return True
    return False


def _replace(graph: fx.Graph, node: fx.Node, short: fx.Node, factors: list[fx.Node]) -> None:
    """Put the longer product, times the other factors, in the place of a product."""
    relation, builder = parse_relation(head_of(short)), Builder(graph)
    (own,) = operands_of(short)
    with graph.inserting_before(node):
        whole = str(relation._replace(strict=False))
        value = builder.running_product(whole, own, dims_of(short))
        if relation.earlier in dims_of(short):  # of a token and itself the longer one is 1
            value = builder.masked(str(relation), value)
        for factor in sorted(factors, key=lambda n: len(dims_of(n))):
            dims = {*dims_of(factor), *dims_of(value)}
            value = builder.contraction(
                [factor, value], tuple(d for d in dims_of(node) if d in dims)
            )
        value = builder.contraction([value], dims_of(node))
    node.replace_all_uses_with(value)
    graph.eliminate_dead_code()


def _factors(node: fx.Node, root: bool = False) -> list[fx.Node]:
    """What a product multiplies, through products that nobody else reads; other values are themselves."""
    product = node.target is ops.contraction and not parse(spec_of(node)).summed
    operands = operands_of(node) if product else ()
    nodes = [x for x in operands if isinstance(x, fx.Node)]
    if not nodes or len(nodes) < len(operands) or (len(node.users) > 1 and not root):
        return [] if root else [node]
    return [f for x in nodes for f in _factors(x)]
