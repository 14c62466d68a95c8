"""A fused region: a piece of the model graph that passes over memory once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from tttc.ir.lazy_graph import LazyGraph


class FusedRegion(torch.nn.Module):
    """Memory-bound operations outlined into one call.

    ``graph_module`` holds them as a graph of its own and runs them by torch operations. A code generator may
    set ``launch``, which takes the same arguments and returns the same values, or None where these arguments
    are not for it.
    """

    launch: Callable[..., Any] | None

    def __init__(
        self, graph_module: fx.GraphModule, bytes_before: sympy.Expr, bytes_after: sympy.Expr
    ) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.bytes_before = bytes_before
        self.bytes_after = bytes_after
        self.launch = None

    def forward(self, *args: Any) -> Any:
        """The region's outputs: a tensor, or a tuple of several."""
        if self.launch is not None:
            out = self.launch(*args)
            if out is not None:
                return out
        return self.graph_module(*args)

    # Nobody hooks into a region, and PyTorch looks for hooks at each call.
    __call__ = forward


def outlined(
    gm: fx.GraphModule, nodes: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]
) -> fx.GraphModule:
    """Nodes as a graph of their own; a tensor, or a tuple of several."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = {"val": node.meta["val"]}
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    results = tuple(env[n] for n in outputs)
    graph.output(results[0] if len(results) == 1 else results)
    # Where kernels run, nobody asks for its Python.
    return LazyGraph(gm, graph, class_name="Region")
