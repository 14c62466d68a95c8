"""Sums into few places that are known beforehand: one masked sum for each, not a sort of all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from tttc.passes.from_sizes import from_sizes

from tttc.ir.index_maps import shape_of
from tttc.ir.node_values import value_of

aten = torch.ops.aten
FEW = 64


def few_places(gm: fx.GraphModule) -> None:
    """Write accumulations into a vector of few elements as sums, where the places follow from sizes alone, in place.

    ::

        y = index_put(x, [place], v, accumulate=True)     here = arange(n)[:, None] == place
                                                          y = x + where(here, v, 0).sum(1)

    Which is what the gradient of a lookup is: of a learnt number for each place in a mini-batch, say.
    """
    alone: set[fx.Node] | None = None
    for node in gm.graph.find_nodes(op="call_function", target=aten.index_put.default):
        if alone is None:
            alone = from_sizes(gm.graph)
        base, places, values, accumulate = (*node.args, False)[:4]
        if accumulate is not True or not isinstance(places, (list, tuple)) or len(places) != 1:
            continue
        (place,) = places
        tensors = [value_of(n) for n in (base, place, values) if isinstance(n, fx.Node)]
        if (
            place not in alone
            or len(tensors) != 3
            or any(t is None or t.dim() != 1 for t in tensors)
        ):
            continue
        (few,) = shape_of(base.meta["val"])  # type: ignore[union-attr]
        same = shape_of(place.meta["val"]) == shape_of(values.meta["val"])  # type: ignore[union-attr]
        if place.meta["val"].dtype != torch.int64 or not few.is_Integer or few > FEW or not same:
            continue
        node.replace_all_uses_with(_sum(gm.graph, node, base, place, values, int(few)))
        gm.graph.erase_node(node)


def _sum(graph: fx.Graph, node: fx.Node, base: Any, place: Any, values: Any, few: int) -> fx.Node:
    def add(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = graph.call_function(target, args, kwargs)
        plain = fx.map_arg(args, lambda n: n.meta["val"])
        with mode:
            made.meta["val"] = target(*plain, **kwargs)
        return made

    mode: Any = detect_fake_mode(base.meta["val"])
    options = {"device": base.meta["val"].device}
    with graph.inserting_before(node):
        numbers = add(aten.arange.default, few, dtype=torch.int64, **options)
        # A place may be counted from the end.
        wrapped = add(aten.remainder.Scalar, place, few)
        here = add(aten.eq.Tensor, add(aten.unsqueeze.default, numbers, 1), wrapped)
        zero = add(aten.full.default, [], 0, dtype=base.meta["val"].dtype, **options)
        chosen = add(aten.where.self, here, values, zero)
        total = add(aten.sum.dim_IntList, chosen, [1])
        return add(aten.add.Tensor, base, total)
