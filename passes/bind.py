"""Operators of a graph that is about to run, by what calls them soonest."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tttc.ir.lazy_graph import LazyGraph

aten = torch.ops.aten

# Python's own way to an operator takes half as long as the one through its overload.
BINDINGS: dict[Any, Any] = {
    aten.add.Tensor: torch.add,
    aten.addmm.default: torch.addmm,
    aten.bmm.default: torch.bmm,
    aten.expand.default: torch.Tensor.expand,
    aten.mm.default: torch.mm,
    aten.mul.Tensor: torch.mul,
    aten.permute.default: torch.permute,
    aten.sum.dim_IntList: torch.sum,
    aten.t.default: torch.t,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.view.default: torch.Tensor.view,
    aten._unsafe_view.default: torch.Tensor.view,
}
_VIEWS = (aten.view.default, aten._unsafe_view.default)


def bind(gm: fx.GraphModule) -> fx.GraphModule:
    """Call operators by PyTorch's Python functions, and no view of a view, in place.

    ::

        a = aten.t(w); b = aten.t(a)                      c = torch.mm(x, w)
        c = aten.mm(x, b)
        d = aten._unsafe_view(c, [B, T, D])               e = torch.Tensor.view(c, [B, T, H, d])
        e = aten.view(d, [B, T, H, d])

    For a graph that nobody looks at any more, and that no gradient is taken through.
    """
    graph = gm.graph
    output = graph.output_node()
    results = set(output.all_input_nodes)
    for node in list(graph.nodes):
        operand = node.args[0] if node.args else None
        if not isinstance(operand, fx.Node):
            continue
        if node.target is operand.target is aten.t.default:
            (same,) = operand.args
            assert isinstance(same, fx.Node)
            # A result stays a tensor of its own.
            if node in results and same not in results and same.op != "placeholder":
                output.replace_input_with(node, same)
                results = set(output.all_input_nodes)
            node.replace_all_uses_with(same, lambda user: user is not output)
        elif node.target in _VIEWS and operand.target in _VIEWS and operand not in results:
            node.update_arg(0, operand.args[0])
    graph.eliminate_dead_code()
    for node in graph.nodes:
        node.target = BINDINGS.get(node.target, node.target)
    gm.recompile()
    LazyGraph.force_recompile(gm)  # it runs now: threads share it
    return gm
