"""Fuse the memory-bound operations of the model graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import sympy
from torch import fx
from tttc.passes.decompositions import decompositions
from tttc.passes.partition import Partition

from tttc.ir.index_maps import as_expr, shape_of
from tttc.ir.lazy_graph import LazyGraph
from tttc.ir.node_values import is_size, value_of
from tttc.ir.region import FusedRegion, outlined
from tttc.ir.row_nodes import is_known
from tttc.ir.row_operators import COMPUTE
from tttc.ir.structure import Structures

__all__ = ["FusionReport", "decompositions", "fuse"]


@dataclass(frozen=True)
class FusionReport:
    """Bytes through device memory by the memory-bound operations, as expressions in the sizes of the graph."""

    regions: int
    bytes_before: sympy.Expr
    bytes_after: sympy.Expr

    def at(self, **sizes: int) -> tuple[int, int]:
        """Bytes before and after for these values of the size symbols."""
        values = {sympy.Symbol(k): v for k, v in sizes.items()}

        def number(expr: sympy.Expr) -> int:
            return int(expr.subs({s: values[sympy.Symbol(s.name)] for s in expr.free_symbols}))

        return number(self.bytes_before), number(self.bytes_after)


def fuse(gm: fx.GraphModule) -> fx.GraphModule:
    """Outline memory-bound operations into regions that read their inputs once and keep the rest on chip.

    ::

        before                                  after
        a = mm(x, w1)                           a = mm(x, w1)
        b = mm(x, w3)                           b = mm(x, w3)
        s = sigmoid(a)                          h = fused_0(a, b)
        t = mul(a, s)                               # def fused_0(a, b):
        h = mul(t, b)                               #     return a * sigmoid(a) * b
        y = mm(h, w2)                           y = mm(h, w2)

    A region is convex (no path leaves it and comes back, so that it can run in one go), has one row space (see
    :mod:`tttc.ir.row_space`), and grows by the merge that saves most bytes. Views are copied into the regions
    that read through them. Equal regions are one module, called more than once. Values are exactly those of ``gm``:
    the same operators in another order.

    ``gm`` is left as it is; the result's ``meta["fusion"]`` is a :class:`FusionReport`. The Python of the result is made when
    it is first called or asked for.
    """
    partition = Partition(gm.graph)
    partition.run()
    memory = partition.memory
    place = {n: i for i, n in enumerate(memory.kept)}
    sizes = {as_expr(n): n for n in memory.kept if is_size(n) and as_expr(n).is_Symbol}

    def rank(group: int) -> tuple[bool, int]:  # the graph's order where dependences leave a choice
        first = min(partition.members[group], key=place.__getitem__)
        return first.op != "placeholder", place[first]

    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    modules: dict[str, Any] = {}

    def new(node: fx.Node) -> fx.Node:
        if node not in env:  # a view that stands alone is made where it is first asked for
            env[node] = graph.node_copy(node, new)
        return env[node]

    structures = Structures()
    names: dict[Any, str] = {}  # of regions, by what they compute
    regions = 0
    before: list[sympy.Expr] = []
    after: list[sympy.Expr] = []
    for group in nx.lexicographical_topological_sort(partition.order, key=rank):
        members = partition.members[group]
        single = next(iter(members))
        nodes = memory.closure(members)
        # One operation alone is as good as a kernel, but for what it would have made for it.
        if len(members) == 1 and (group not in partition.fusable or memory.reads_memory(nodes)):
            if single.op in ("get_attr", "call_module"):
                modules[single.target] = operator.attrgetter(single.target)(gm)
            if single.target in COMPUTE and is_known(single):
                before.append(memory.traffic(members))
                after.append(before[-1])
            new(single)
            continue
        outputs = memory.outputs(members)
        if not outputs:
            continue  # nobody reads what it computes
        inputs = _inputs(nodes, sizes)
        order = {n: i for i, n in enumerate(inputs)}
        # Operands in the order of the nodes, arguments in the region's: both must agree.
        used = tuple(order[a] for n in nodes for a in n.all_input_nodes if a in order)
        key = (structures.key(nodes, outputs), used, len(inputs))
        if key not in names:
            names[key] = f"fused_{len(modules)}"
            moved = sympy.expand(sympy.Add(*(memory.traffic({n}) for n in members)))
            module = outlined(gm, nodes, inputs, outputs)
            modules[names[key]] = FusedRegion(module, moved, memory.traffic(members))
        region = modules[names[key]]
        before.append(region.bytes_before)
        after.append(region.bytes_after)
        regions += 1
        call = graph.call_module(names[key], tuple(new(n) for n in inputs))
        _replace(graph, call, outputs, env)
    result = LazyGraph(modules, graph, class_name=type(gm).__name__)  # not run as it is
    graph.lint()
    report = FusionReport(regions, *(sympy.expand(sympy.Add(*x)) for x in (before, after)))
    result.meta = {**gm.meta, "fusion": report}
    return result


def _replace(
    graph: fx.Graph, call: fx.Node, outputs: list[fx.Node], env: dict[fx.Node, fx.Node]
) -> None:
    """Let the results of a call stand for the nodes it computes."""
    if len(outputs) == 1:
        call.meta = dict(outputs[0].meta)
        env[outputs[0]] = call
        return
    call.meta["val"] = tuple(n.meta["val"] for n in outputs)
    for i, node in enumerate(outputs):
        env[node] = graph.call_function(operator.getitem, (call, i))
        env[node].meta = dict(node.meta)


def _inputs(nodes: list[fx.Node], sizes: dict[sympy.Expr, fx.Node]) -> list[fx.Node]:
    """What a region reads; sizes that no tensor shows on its own (a view of B*T rows as B, T) come along."""
    inside = set(nodes)
    inputs = list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside))
    shown = {as_expr(n) for n in inputs if is_size(n)}
    tensors = [value_of(n) for n in (*inputs, *nodes)]
    shapes = [shape_of(t) for t in tensors if t is not None]
    for node in inputs:
        value = value_of(node)
        shown.update(shape_of(value) if value is not None else ())
    for symbol in sorted({s for shape in shapes for n in shape for s in n.free_symbols}, key=str):
        if symbol not in shown and symbol in sizes:
            inputs.append(sizes[symbol])
    return inputs
