"""What a node of a graph stands for, and what it is called with."""

from __future__ import annotations

import torch
from torch import fx


def value_of(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor of a node, or None where it stands for anything else."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def is_size(node: fx.Node) -> bool:
    """Whether a node holds a size (an int of the graph) and not a tensor."""
    return isinstance(node.meta.get("val"), (int, torch.SymInt)) and not isinstance(
        node.meta["val"], bool
    )


def operand_of(node: fx.Node) -> fx.Node:
    """The tensor that an operation of one tensor reads: its first argument."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand


def axis_of(node: fx.Node, position: int, rank: int) -> int:
    """The dimension, counted from the first, that is said at a place among the arguments; the first where none is."""
    axis = node.args[position] if len(node.args) > position else 0
    assert isinstance(axis, int)
    return axis % rank
