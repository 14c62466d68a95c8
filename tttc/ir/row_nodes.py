"""Which nodes of a graph can be evaluated row by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tttc.ir.index_maps import VIEWS, IndexVariable, shape_of
from tttc.ir.lookups import looked_up
from tttc.ir.node_values import is_size, value_of
from tttc.ir.row_operators import COMPUTE, DTYPES, FREE, LOOKUPS

aten = torch.ops.aten


def is_known(node: fx.Node) -> bool:
    """Whether a node is an operation that can be evaluated in a row space, by its operator and operands alone."""
    if node.op != "call_function" or node.target not in COMPUTE | FREE:
        return False
    value = value_of(node)
    if value is None or value.dtype not in DTYPES or value.layout is not torch.strided:
        return False
    for operand in node.all_input_nodes:
        tensor = value_of(operand)
        if tensor is None and not is_size(operand):
            return False
        if tensor is not None and (tensor.dtype not in DTYPES or tensor.device != value.device):
            return False
    if node.target in LOOKUPS:
        index = tuple(IndexVariable(f"i{d}", n) for d, n in enumerate(shape_of(value)))
        return looked_up(node, index) is not None
    allowed: dict[Any, set[str]] = {
        # Layout and device are those of the operand (above); any order in memory can be written.
        aten._to_copy.default: {"dtype", "layout", "device", "memory_format"},
        aten.add.Tensor: {"alpha"},
        aten.sub.Tensor: {"alpha"},
        aten.clone.default: {"memory_format"},
        aten.sum.dim_IntList: {"dtype"},
        aten.mean.dim: {"dtype"},
    }
    if node.target in FREE and node.target not in VIEWS:
        return True
    return set(node.kwargs) <= allowed.get(node.target, set())
