"""Constants: what a program makes from nothing, a causal mask say, is worked out where it is captured.

Before::

    ones = aten.ones([4, 4])
    tril = ...  # an arange, a comparison, a where
    mul = aten.mul(scores, tril)

After::

    mul = aten.mul(scores, self._known_0)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten
LARGEST = 1 << 22  # numbers: a mask for pairs of 2048 tokens
# The same everywhere: numbers to whoever reads the graph, and better left as such.
_UNIFORM = {
    aten.full, aten.zeros, aten.ones, aten.empty, aten.scalar_tensor, aten.full_like, aten.zeros_like,
    aten.ones_like, aten.new_full, aten.new_zeros, aten.new_ones, aten.expand,
}  # fmt: skip


def fold_constants(gm: fx.GraphModule) -> None:
    """Work out, in place, what depends on no argument. Its ``get_attr`` nodes have ``meta["known"]``."""
    known: dict[fx.Node, Any] = {}
    uniform: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            x = getattr(gm, str(node.target), None)
            if isinstance(x, torch.Tensor) and not isinstance(x, (FakeTensor, torch.nn.Parameter)):
                known[node] = x
                if str(node.target) in vars(
                    gm
                ):  # a buffer takes part where a graph changes its dtype
                    delattr(gm, str(node.target))
                    gm.register_buffer(str(node.target), x, persistent=False)
        elif node.op == "call_function" and _foldable(node, known):
            known[node] = _evaluated(node, known)
            packet = node.target.overloadpacket  # type: ignore[union-attr]
            if packet in _UNIFORM and all(x in uniform for x in node.all_input_nodes):
                uniform.add(node)
    made = 0
    for node in list(gm.graph.nodes):
        if node not in known or node.op == "get_attr" or node in uniform:
            continue
        if all(u in known and u not in uniform for u in node.users):
            continue
        name = f"_known_{made}"
        made += 1
        gm.register_buffer(name, known[node], persistent=False)
        with gm.graph.inserting_before(node):
            new = gm.graph.get_attr(name)
        new.meta = {**node.meta, "known": True}
        node.replace_all_uses_with(new)
    if made:
        gm.graph.eliminate_dead_code()
        gm.recompile()


def _foldable(node: fx.Node, known: dict[fx.Node, Any]) -> bool:
    target, value = node.target, node.meta.get("val")
    return (
        isinstance(target, torch._ops.OpOverload)
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
        and isinstance(value, torch.Tensor)
        and value.numel() <= LARGEST
        and all(x in known for x in node.all_input_nodes)
    )


def _evaluated(node: fx.Node, known: dict[fx.Node, Any]) -> torch.Tensor:
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
    kwargs = {
        k: torch.device("cpu") if k == "device" else v
        for k, v in kwargs.items()
        if k != "pin_memory"
    }
    with _disable_current_modes(), torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]
