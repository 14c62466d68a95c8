"""The graphs of the model around the scans: sizes, names, and the part of a graph that lies around a scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from tttc.report.graphs import aten_graph
from tttc.report.records import GraphReport
from tttc.report.scans import SCANS

if TYPE_CHECKING:
    from tttc.report.explanation import Explanation

MOST = 60  # nodes of an excerpt


def model_graph(ex: Explanation, stage: str, around: str | None = None) -> GraphReport:
    """The graph of a stage of the model, or what lies around one scan of the step ``around``; empty where none is."""
    gm = ex.stages[stage]
    inputs = ex._inputs.get(stage)
    sizes = sizes_of(gm, inputs) if inputs is not None else {}
    names = parameter_names(gm, inputs or (), ex._parameters)
    only = None if around is None else _around_scan(gm, around)
    return aten_graph(gm, names, only=only, sizes=sizes)


def sizes_of(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[sympy.Expr, int]:
    """The values of the size symbols of a graph on these inputs."""
    table: dict[sympy.Expr, int] = {}

    def take(symbolic: Any, number: Any) -> None:
        if isinstance(symbolic, torch.SymInt) and isinstance(symbolic.node.expr, sympy.Symbol):
            table[symbolic.node.expr] = int(number)

    placeholders = (n for n in gm.graph.nodes if n.op == "placeholder")
    for node, value in zip(placeholders, inputs, strict=True):
        like = node.meta.get("val")
        take(like, value)
        if isinstance(like, torch.Tensor):
            for symbolic, number in zip(like.shape, value.shape, strict=True):
                take(symbolic, number)
    return table


def parameter_names(
    gm: fx.GraphModule, inputs: Sequence[Any], parameters: dict[int, str]
) -> dict[str, str]:
    """What the model calls the parameters among a graph's arguments; ``parameters`` has names by data pointer."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return {
        node.name: parameters[value.data_ptr()]
        for node, value in zip(placeholders, inputs, strict=False)
        if isinstance(value, torch.Tensor) and value.data_ptr() in parameters
    }


def _around_scan(gm: fx.GraphModule, key: str) -> set[fx.Node]:
    """The nodes between a scan of a step and the scans before and after it, nearest first, and what they read.

    Of several such scans the second, which is a layer like most; empty where there is none.
    """
    scans = [n for n in gm.graph.nodes if n.target in SCANS]
    mine = [n for n in scans if key in n.args or key in n.kwargs.values()]
    if not mine:
        return set()
    scan = mine[min(1, len(mine) - 1)]
    found = {scan}
    up, down = [scan], [scan]
    while (up or down) and len(found) < MOST:
        above = [x for n in up for x in n.all_input_nodes if x not in found]
        below = [x for n in down for x in n.users if x not in found and x.op != "output"]
        up = [x for x in dict.fromkeys(above) if x.op.startswith("call_") and x not in scans]
        down = [x for x in dict.fromkeys(below) if x not in scans]
        found |= {*up, *down}
    return found | {x for n in found for x in n.all_input_nodes if not x.op.startswith("call_")}
