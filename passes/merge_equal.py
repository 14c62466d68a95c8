"""Equal operations of an ATen graph, once."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef


def merge_equal(graph: fx.Graph) -> bool:
    """Let the first of equal operations on equal operands stand for the others, in place.

    ::

        a = transpose(w); b = mm(x, a)          a = transpose(w); b = mm(x, a)
        c = transpose(w); d = mm(y, c)          d = mm(y, a)

    Results keep a tensor of their own each, and what draws random numbers draws again.

    Returns whether it did: where something is written into, equal operations may differ, and the graph stays as it is.
    """
    if any(writes(n) for n in graph.nodes):
        return False
    given_out = {s for n in graph.output_node().all_input_nodes for s in storages(n)}
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if not repeatable(node) or not given_out.isdisjoint(storages(node)):
            continue
        same = first.setdefault(
            (node.target, _plain(node.args), _plain(tuple(node.kwargs.items()))), node
        )
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    return True


def writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def repeatable(node: fx.Node) -> bool:
    """Whether a node computes the same each time: an operator that neither draws random numbers nor leaves memory
    as it found it, a pick, a sum of sizes."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        tags = {torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape}
        return not tags & set(target.tags) and target.overloadpacket is not torch.ops.aten.empty
    return target is operator.getitem or getattr(target, "__module__", None) == "_operator"


def storages(node: fx.Node) -> Iterator[StorageWeakRef]:
    """The memory of a node's value, if it is a tensor with any."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        try:
            yield StorageWeakRef(value.untyped_storage())
        except NotImplementedError:  # a sparse one, say
            return


def _plain(arg: Any) -> Any:
    """Equal for equal arguments; 1 == True == 1.0, and these are not the same program."""
    if isinstance(arg, (tuple, list)):
        return (type(arg).__name__, *map(_plain, arg))
    if isinstance(arg, (fx.Node, torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return arg
    if isinstance(arg, (bool, int, float, complex, str, type(None))):
        return type(arg).__name__, repr(arg)
    return "is", id(arg)
