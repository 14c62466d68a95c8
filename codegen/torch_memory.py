"""Where the operators of a bound graph write: over an operand, or into memory that is given to it.

Before::

    a = matmul(x, w);  b = add(a, c);  d = exp(b);  return sum(d)

After (``space_0`` is an argument)::

    a = matmul(x, w, out=space_0);  b = add(a, c, out=a);  d = exp(b, out=b);  return sum(d)

Nodes say in ``meta["owned"]`` whether their values are of full size and of the dtype computed in; only such memory is
written over. ``fresh`` are the operators that write to memory of their own or to ``out``; ``readers``, these among
them, those that return no view of an operand.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tttc.ir.build import dims_of
from tttc.ir.spec import Dims


def write_over(graph: fx.Graph, elementwise: set[Any], fresh: set[Any], readers: set[Any]) -> None:
    """Elementwise operations write over an operand that nobody reads again: memory just read is fast."""
    position = {node: i for i, node in enumerate(graph.nodes)}

    def free(x: Any, at: fx.Node) -> bool:
        return (
            isinstance(x, fx.Node)
            and x.target in fresh
            and x.meta.get("owned", False)
            and max(x.users, key=lambda u: position[u]) is at
            and all(
                u.target in readers for u in x.users
            )  # no result, and nothing holds a view of it
        )

    for node in graph.nodes:
        if node.target in elementwise and "out" not in node.kwargs and node.meta.get("owned"):
            over = next((x for x in node.args if free(x, node)), None)
            if over is not None:
                node.kwargs = {**node.kwargs, "out": over}


def place(graph: fx.Graph, fresh: set[Any], readers: set[Any]) -> list[Dims]:
    """Other results get a place in memory that is given, one after another the same place."""
    nodes = list(graph.nodes)
    held: dict[fx.Node, set[fx.Node]] = {}  # whose memory a node may be a view of
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        views = set().union(*(held[x] for x in node.all_input_nodes))
        for x in views:
            last[x] = i if node.op != "output" else len(nodes)
        if node.target in fresh and "out" in node.kwargs:
            held[node] = held[node.kwargs["out"]]
        elif node.target in fresh and node.meta.get("owned"):
            held[node] = {node}
            last[node] = i
        else:
            held[node] = set() if node.target in readers else views
    begin = next((n for n in nodes if n.op != "placeholder"), None)
    free: list[fx.Node] = []
    taken: list[tuple[fx.Node, fx.Node]] = []
    dims: dict[fx.Node, Dims] = {}
    for i, node in enumerate(nodes):
        free += [space for x, space in taken if last[x] < i]
        taken = [(x, space) for x, space in taken if last[x] >= i]
        if node not in held or held[node] != {node}:
            continue
        space = next((x for x in free if dims[x] == dims_of(node)), None)
        if space is None:
            with graph.inserting_before(begin):
                space = graph.placeholder(f"space_{len(dims)}", default_value=None)
            dims[space] = dims_of(node)
        else:
            free.remove(space)
        taken.append((node, space))
        node.kwargs = {**node.kwargs, "out": space}
    return list(dims.values())
