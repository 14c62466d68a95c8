"""What an iteration picks of a tensor, picked from the tensor itself: through the slices and views in between.

Before::

    piece = aten.slice(k, 1, 8, 12)
    moved = aten.permute(piece, [1, 0, 2])
    token = aten.select(moved, 0, 3)

After::

    token = aten.select(k, 1, 11)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def compose_picks(graph: fx.Graph) -> None:
    """Move every ``select`` next to the argument it picks from, in place."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is aten.select.int and _of_argument(node):
            new = _Composer(graph, node).picked(*node.args)
            if new is not node:
                node.replace_all_uses_with(new)
    graph.eliminate_dead_code()


_VIEWS = (aten.slice.Tensor, aten.permute.default, aten.unsqueeze.default)


def _of_argument(node: fx.Node) -> bool:
    x: Any = node.args[0]
    if x.op == "placeholder":
        return False
    while x.op == "call_function" and x.target in _VIEWS:
        x = x.args[0]
    return x.op == "placeholder"


class _Composer:
    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self.graph, self.node = graph, node

    def call(self, target: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_before(self.node):
            new = self.graph.call_function(target, args)
        new.meta = dict(self.node.meta)
        values = [x.meta["val"] if isinstance(x, fx.Node) else x for x in args]
        new.meta["val"] = target(*values)
        return new

    def picked(self, x: Any, dim: int, index: int) -> fx.Node:
        """Entry ``index`` along ``dim``."""
        rank = x.meta["val"].dim()
        dim = dim % rank
        if x.op == "call_function" and x.target is aten.slice.Tensor:
            base, along, start, *rest = (*x.args, 0, 0)[: max(len(x.args), 3)]
            along, start = along % rank, start or 0
            size = base.meta["val"].shape[along]
            if tuple(rest[1:]) in ((), (1,)):
                if along != dim:
                    inner = self.picked(base, dim, index)
                    return self.call(x.target, inner, along - (along > dim), *x.args[2:])
                start = max(start + size, 0) if start < 0 else start
                index = index + x.meta["val"].shape[dim] if index < 0 else index
                return self.picked(base, dim, start + index)
        if x.op == "call_function" and x.target is aten.permute.default:
            order = [p % rank for p in x.args[1]]
            inner = self.picked(x.args[0], order[dim], index)
            left = [p - (p > order[dim]) for i, p in enumerate(order) if i != dim]
            return inner if left == sorted(left) else self.call(x.target, inner, left)
        if x.op == "call_function" and x.target is aten.unsqueeze.default:
            at = x.args[1] % rank
            if at != dim:
                inner = self.picked(x.args[0], dim - (dim > at), index)
                return self.call(x.target, inner, at - (at > dim))
        return self.call(aten.select.int, x, dim, index)
