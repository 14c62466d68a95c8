"""One more copy of a node in a graph that has some."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

from torch import fx

_NUMBER = re.compile(r"_\d+$")


def another(graph: fx.Graph, node: fx.Node, operand: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """A copy as ``graph.node_copy`` makes it, but for its name, which is found at once.

    ``node_copy`` asks for the name of the original. Where that ends in a number and is taken, torch.fx tries all
    numbers from 1 on, for each copy.
    """
    args: Any = fx.map_arg(node.args, operand)
    kwargs: Any = fx.map_arg(node.kwargs, operand)
    name = _NUMBER.sub("", node.name)
    made = graph.create_node(node.op, node.target, args, kwargs, name, node.type)
    made.meta = copy.copy(node.meta)
    return made
