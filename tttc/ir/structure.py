"""When two pieces of a graph are the same program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tttc.ir.index_maps import as_expr, shape_of
from tttc.ir.row_space import is_size, value_of


def structure(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Any:
    """A key that is equal for nodes that compute the same thing from inputs of the same kind."""
    number: dict[fx.Node, int] = {}

    def kind(node: fx.Node) -> Any:
        value = value_of(node)
        if value is None:
            return as_expr(node) if is_size(node) else None
        strides = tuple(as_expr(s) for s in value.stride())
        return shape_of(value), strides, value.dtype, value.device

    def plain(arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            if arg not in number:
                number[arg] = len(number)
                return number[arg], kind(arg)
            return number[arg]
        if isinstance(arg, torch.SymInt):
            return as_expr(arg)
        if isinstance(arg, (list, tuple)):
            return tuple(plain(a) for a in arg)
        # 1 == True == 1.0, and these are not the same program.
        return type(arg).__name__, str(arg)

    out = []
    for node in nodes:
        args = plain(node.args)
        kwargs = tuple((k, plain(v)) for k, v in sorted(node.kwargs.items()))
        number[node] = len(number)
        out.append((node.target, args, kwargs, kind(node)))
    return tuple(out), tuple(number[n] for n in outputs)
