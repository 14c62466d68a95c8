"""How long values wait: products and sums make the threads of a kernel wait for each other, functions do not."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from tttc.ir import ops


def makes_wait(node: fx.Node) -> bool:
    """Whether a node makes every warp wait for the others: a product, a sum, an extreme."""
    return node.target in (
        ops.contraction,
        ops.masked_contraction,
        ops.triangular_solve,
        ops.reduction,
        ops.last,
    )


def depths(nodes: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """How many products and sums lie on the way to each node, itself included."""
    depth: dict[fx.Node, int] = {}
    for node in nodes:
        before = max((depth.get(x, 0) for x in node.all_input_nodes), default=0)
        depth[node] = before + int(makes_wait(node))
    return depth
