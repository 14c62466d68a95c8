"""At the anchor: the body of a mini-batch that starts at its beginning, where the carry is the anchor.

Before::

    S = elementwise("add", "i j, t i j -> t i j", carry_S, total)

After::

    S = elementwise("add", "i j, t i j -> t i j", anchor_S, total)
"""

from __future__ import annotations

from torch import fx

from tttc.ir.body import Body, role


def at_anchor(body: Body) -> Body:
    """The body with every carry replaced by its anchor; the carry stays an argument, unused."""
    return _replaced(body, "carry", "anchor")


def at_carry(body: Body) -> Body:
    """The body with every anchor replaced by its carry: what one token is where mini-batches have one."""
    return _replaced(body, "anchor", "carry")


def _replaced(body: Body, kind: str, by: str) -> Body:
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(body.gm.graph, mapping))  # type: ignore[arg-type]
    by_role = {role(n): n for n in graph.nodes if n.op == "placeholder"}
    for (of, index), node in by_role.items():
        if of == kind:
            node.replace_all_uses_with(by_role[by, index])
    return body.with_graph(graph)
