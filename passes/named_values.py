"""Values whose axes have names, and which of two gives way where names clash."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import fx
from tttc.passes.labels import Label

Axis = tuple[
    Label, ...
]  # the labels an ATen axis is made of: none for size 1, several where axes were merged


class Value:
    """An ATen value: a node of the IR graph (or a number) and what its axes are called."""

    __slots__ = ("axes", "node")

    def __init__(self, node: fx.Node | float | int | bool, axes: Sequence[Axis]) -> None:
        self.node = node
        self.axes = tuple(axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(x.size for x in axis) for axis in self.axes)


class Clash(Exception):
    """Two axes that must stay apart would get one name: ``labels`` of the operand ``culprit`` need new ones."""

    def __init__(self, culprit: int, labels: Iterable[Label]) -> None:
        self.culprit = culprit
        self.labels = frozenset(x.root for x in labels)


def rank_of(value: Value) -> int:
    return sum(map(bool, value.axes))


def culprit(values: Sequence[Value], first: int, second: int) -> int:
    """Which of two operands is renamed: that with fewer axes, so that states keep theirs; else an argument.

    Renaming an argument keeps what is computed from it under one name.
    """
    one, two = rank_of(values[first]), rank_of(values[second])
    if one != two:
        return first if one < two else second
    return first if _is_argument(values[first]) else second


def repeated_in(labels: Sequence[Label]) -> list[Label]:
    return [x for i, x in enumerate(labels) if x in labels[:i]]


def _is_argument(value: Value) -> bool:
    return isinstance(value.node, fx.Node) and value.node.op == "placeholder"
