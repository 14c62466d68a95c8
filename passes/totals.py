"""Sums over all rows, as a gradient of a vector is: with what rounds them, so that a kernel can take them along."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

from tttc.ir.index_maps import VIEWS, numel, shape_of
from tttc.ir.node_values import value_of
from tttc.ir.row_operators import CASTS
from tttc.ir.row_planner import MAX_COLUMNS
from tttc.ir.total import total

aten = torch.ops.aten


def totals(gm: fx.GraphModule) -> None:
    """Write a sum over all dimensions but the last, and the cast of its result, as one ``total``, in place.

    ::

        s = sum(x, [0, 1], keepdim=True)         t = total(x, bfloat16)
        v = view(s, [768])
        t = to_copy(v, dtype=bfloat16)
    """
    graph = gm.graph
    for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        x: Any = node.args[0]
        if not _is_total(node, x):
            continue
        last = _rounded(node)
        value = last.meta["val"]
        mode: Any = detect_fake_mode(value)
        with graph.inserting_before(node):
            made = graph.call_function(total, (x, value.dtype))
            with mode:
                made.meta["val"] = total(x.meta["val"], value.dtype)
            if value.dim() != 1:
                made = graph.call_function(aten.view.default, (made, list(value.shape)))
                made.meta = dict(last.meta)
        last.replace_all_uses_with(made)
        while last is not node:
            operand: Any = last.args[0]
            graph.erase_node(last)
            last = operand
        graph.erase_node(node)


def _is_total(node: fx.Node, x: fx.Node) -> bool:
    value = value_of(x)
    dims: Any = node.args[1] if len(node.args) > 1 else None
    if (
        value is None
        or value.dim() < 2
        or not dims
        or node.kwargs
        or detect_fake_mode(value) is None
    ):
        return False
    columns = shape_of(value)[-1]
    return (
        value.dtype.is_floating_point
        and sorted(d % value.dim() for d in dims) == list(range(value.dim() - 1))
        and bool(columns.is_Integer)
        and 1 < columns <= MAX_COLUMNS
    )


def _rounded(node: fx.Node) -> fx.Node:
    """The cast of a sum's result to fewer bits, as far as nothing else reads what is between; else the sum."""
    at, size = node, numel(shape_of(node.meta["val"]))
    while len(at.users) == 1:
        (user,) = at.users
        value = value_of(user)
        if user.target in CASTS and value is not None and value.dtype.is_floating_point:
            narrow = value.dtype.itemsize < node.meta["val"].dtype.itemsize
            static = all(isinstance(n, int) for n in value.shape)
            same = value.device == node.meta["val"].device and value.is_contiguous()
            return user if narrow and static and same else node
        if user.target not in VIEWS or value is None or numel(shape_of(value)) != size:
            return node
        at = user
    return node
