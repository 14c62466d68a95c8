"""When two pieces of a graph are the same program."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tttc.ir.index_maps import as_expr, shape_of
from tttc.ir.node_values import is_size, value_of

_numbers: dict[Any, int] = {}
_count = itertools.count()


def _number(key: Any) -> int:
    """The same number for equal keys, in the whole process: short to compare, and to hash."""
    return _numbers.setdefault(key, next(_count))


class Structures:
    """Keys of pieces of one graph, which stays as it is meanwhile: each node is looked at once."""

    def __init__(self) -> None:
        self._kinds: dict[fx.Node, int] = {}
        self._operations: dict[fx.Node, tuple[int, list[fx.Node]]] = {}

    def key(self, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Any:
        """A key that is equal for nodes that compute the same thing from inputs of the same kind."""
        place: dict[fx.Node, int] = {}
        out: list[int] = []
        for node in nodes:
            operation, operands = self._operation(node)
            # The operation says how many operands follow: a place for each that was met, else its kind.
            out.append(operation)
            for operand in operands:
                if operand in place:
                    out.append(place[operand])
                else:
                    place[operand] = len(place)
                    out.append(~self._kind(operand))
            place[node] = len(place)
        return tuple(out), tuple(place[n] for n in outputs)

    def _kind(self, node: fx.Node) -> int:
        if node not in self._kinds:
            self._kinds[node] = _number(_kind(node))
        return self._kinds[node]

    def _operation(self, node: fx.Node) -> tuple[int, list[fx.Node]]:
        """A number for all of a node but its operands, and these, each as often as it is there."""
        if node not in self._operations:
            operands: list[fx.Node] = []
            args = _plain(node.args, operands)
            kwargs = tuple((k, _plain(v, operands)) for k, v in sorted(node.kwargs.items()))
            self._operations[node] = _number((node.target, args, kwargs, _kind(node))), operands
        return self._operations[node]


def _kind(node: fx.Node) -> Any:
    value = value_of(node)
    if value is None:
        return as_expr(node) if is_size(node) else None
    strides = tuple(as_expr(s) for s in value.stride())
    return shape_of(value), strides, value.dtype, value.device


def _plain(arg: Any, operands: list[fx.Node]) -> Any:
    if isinstance(arg, fx.Node):
        operands.append(arg)
        return fx.Node
    if isinstance(arg, torch.SymInt):
        return as_expr(arg)
    if isinstance(arg, (list, tuple)):
        return tuple(_plain(a, operands) for a in arg)
    # 1 == True == 1.0, and these are not the same program.
    return type(arg).__name__, str(arg)
