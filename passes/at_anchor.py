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
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(body.gm.graph, mapping))  # type: ignore[arg-type]
    by_role = {role(n): n for n in graph.nodes if n.op == "placeholder"}
    for (kind, index), node in by_role.items():
        if kind == "carry":
            node.replace_all_uses_with(by_role["anchor", index])
    return body.with_graph(graph)
