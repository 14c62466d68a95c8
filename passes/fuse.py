"""Fuse the memory-bound operations of the model graph."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import sympy
import torch
from torch import fx

from tttc.ir.index_maps import VIEWS, as_expr, numel, shape_of
from tttc.ir.region import FusedRegion
from tttc.ir.row_space import COMPUTE, FREE, is_known, is_size, nominal, row_space, value_of

MAX_NODES = 128
MAX_TENSORS = 32  # arguments of one kernel


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
    that read through them. Values are exactly those of ``gm``: the same operators in another order.

    ``gm`` is left as it is; the result's ``meta["fusion"]`` is a :class:`FusionReport`.
    """
    groups = _Partition(gm.graph).merged()
    return _outline(gm, groups)


class _Memory:
    """Which node reads what, and how many bytes that is."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.free = {n for n in self.nodes if n.target in FREE and is_known(n)}
        self.kept = [n for n in self.nodes if n not in self.free]
        self.sources = {n: list(self._sources(n)) for n in self.kept}
        self.consumers: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        for node, sources in self.sources.items():
            for source, _ in sources:
                self.consumers[source].add(node)

    def _sources(self, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Pairs of a node that is kept in memory and the view of it that ``node`` reads."""
        for operand in node.all_input_nodes:
            stack = [operand]
            while stack:
                at = stack.pop()
                if at in self.free:
                    stack.extend(at.all_input_nodes)
                else:
                    yield at, operand

    def closure(self, members: Iterable[fx.Node]) -> list[fx.Node]:
        """The members with the views and constants they read through, in order."""
        inside = set(members)
        stack = list(inside)
        while stack:
            for operand in stack.pop().all_input_nodes:
                if operand in self.free and operand not in inside:
                    inside.add(operand)
                    stack.append(operand)
        return sorted(inside)

    def inputs(self, members: set[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
        """Tensors read from outside, and through which views."""
        read: dict[fx.Node, set[fx.Node]] = {}
        for node in members:
            for source, view in self.sources[node]:
                if source not in members and value_of(source) is not None:
                    read.setdefault(source, set()).add(view)
        return read

    def outputs(self, members: set[fx.Node]) -> list[fx.Node]:
        """Members that are read from outside."""
        return sorted(n for n in members if not self.consumers[n] <= members)

    def traffic(self, members: set[fx.Node]) -> sympy.Expr:
        """Bytes read and written by members that run as one."""
        total = sympy.Add(*(_bytes(n) for n in self.outputs(members)))
        for source, views in self.inputs(members).items():
            seen = sympy.Add(*(_bytes(v) for v in views if v.target in {*VIEWS} or v is source))
            whole = _bytes(source)
            total += seen if nominal(seen) < nominal(whole) else whole
        return sympy.expand(total)


def _bytes(node: fx.Node) -> sympy.Expr:
    value = value_of(node)
    assert value is not None
    return numel(shape_of(value)) * value.element_size()


class _Partition:
    """Groups of nodes, merged greedily while no cycle arises between them."""

    _legal: dict[Any, bool]

    def __init__(self, graph: fx.Graph) -> None:
        self.memory = _Memory(graph)
        self._legal = {}
        kept = self.memory.kept
        self.bit = {n: 1 << i for i, n in enumerate(kept)}
        self.group_of: dict[fx.Node, int] = {n: i for i, n in enumerate(kept)}
        self.members: dict[int, set[fx.Node]] = {i: {n} for i, n in enumerate(kept)}
        self.mask = {i: self.bit[n] for i, n in enumerate(kept)}
        self.order = nx.DiGraph()  # of groups: an edge where one must run before the other
        self.order.add_nodes_from(self.members)
        for node in kept:
            for source, _ in self.memory.sources[node]:
                self.order.add_edge(self.group_of[source], self.group_of[node])
        self._order_mutations(kept)
        self.below: dict[int, int] = {}  # bits of the nodes that a group leads to
        for i in reversed(range(len(kept))):
            reach = 0
            for s in self.order.successors(i):
                reach |= self.mask[s] | self.below[s]
            self.below[i] = reach
        self.fusable = {
            i for i, n in enumerate(kept) if n.target in COMPUTE and is_known(n) and self.legal({n})
        }
        self.traffic = {i: self.cost(self.members[i]) for i in self.fusable}

    def _order_mutations(self, kept: list[fx.Node]) -> None:
        """A node that writes into its operands stays where it is among all others."""
        for i, node in enumerate(kept):
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable:
                self.order.add_edges_from((j, i) for j in range(i))
                self.order.add_edges_from((i, j) for j in range(i + 1, len(kept)))

    def cost(self, members: set[fx.Node]) -> int:
        return nominal(self.memory.traffic(members))

    def legal(self, members: set[fx.Node]) -> bool:
        """Whether the members have a row space; asked once for equal structures (equal layers, say)."""
        nodes = self.memory.closure(members)
        outputs = self.memory.outputs(members) or sorted(members)[-1:]
        key = structure(nodes, outputs)
        if key not in self._legal:
            self._legal[key] = row_space(nodes, outputs) is not None
        return self._legal[key]

    def merged(self) -> dict[int, set[fx.Node]]:
        """The groups once no merge saves any more; single nodes are groups too."""
        queue: list[tuple[int, int, int]] = []

        def offer(a: int, b: int) -> None:
            both = self.members[a] | self.members[b]
            saved = self.traffic[a] + self.traffic[b] - self.cost(both)
            if saved > 0:
                heapq.heappush(queue, (-saved, min(a, b), max(a, b)))

        for a in sorted(self.fusable):
            for b in self.neighbours(a):
                if a < b:
                    offer(a, b)
        fresh = len(self.memory.kept)
        while queue:
            _, a, b = heapq.heappop(queue)
            if a not in self.fusable or b not in self.fusable or not self.may_merge(a, b):
                continue
            self.merge(a, b, fresh)
            for other in self.neighbours(fresh):
                offer(fresh, other)
            fresh += 1
        return self.members

    def neighbours(self, group: int) -> list[int]:
        """Fusable groups that produce for this one, read from it, or read what it reads."""
        near: set[int] = set()
        for node in self.members[group]:
            near.update(self.group_of[c] for c in self.memory.consumers[node])
            for source, _ in self.memory.sources[node]:
                near.add(self.group_of[source])
                near.update(self.group_of[c] for c in self.memory.consumers[source])
        near.discard(group)
        return sorted(near & self.fusable)

    def may_merge(self, a: int, b: int) -> bool:
        if self.below[b] & self.mask[a]:
            a, b = b, a
        if any(s != b and self.below[s] & self.mask[b] for s in self.order.successors(a)):
            return False  # a path from a to b through something outside both
        both = self.members[a] | self.members[b]
        tensors = len(self.memory.inputs(both)) + len(self.memory.outputs(both))
        if len(both) > MAX_NODES or tensors > MAX_TENSORS or not self._one_device(both):
            return False
        return self.legal(both)

    def _one_device(self, members: set[fx.Node]) -> bool:
        return len({n.meta["val"].device for n in members}) == 1

    def merge(self, a: int, b: int, into: int) -> None:
        before = {*self.order.predecessors(a), *self.order.predecessors(b)} - {a, b}
        after = {*self.order.successors(a), *self.order.successors(b)} - {a, b}
        self.members[into] = self.members.pop(a) | self.members.pop(b)
        self.mask[into] = self.mask.pop(a) | self.mask.pop(b)
        self.below[into] = (self.below.pop(a) | self.below.pop(b)) & ~self.mask[into]
        self.fusable -= {a, b}
        self.fusable.add(into)
        self.traffic[into] = self.cost(self.members[into])
        for node in self.members[into]:
            self.group_of[node] = into
        self.order.remove_nodes_from([a, b])
        self.order.add_node(into)
        self.order.add_edges_from((p, into) for p in before)
        self.order.add_edges_from((into, s) for s in after)
        for group, reach in self.below.items():
            if group != into and reach & self.mask[into]:
                self.below[group] = reach | self.mask[into] | self.below[into]


def structure(nodes: list[fx.Node], outputs: list[fx.Node]) -> Any:
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


def _outline(gm: fx.GraphModule, groups: dict[int, set[fx.Node]]) -> fx.GraphModule:
    memory = _Memory(gm.graph)
    sizes = {as_expr(n): n for n in memory.kept if is_size(n) and as_expr(n).is_Symbol}
    group_of = {n: g for g, members in groups.items() for n in members}
    order = nx.DiGraph()
    order.add_nodes_from(groups)
    for node in memory.kept:
        for source, _ in memory.sources[node]:
            order.add_edge(group_of[source], group_of[node])
    order.remove_edges_from(nx.selfloop_edges(order))
    position = {n: i for i, n in enumerate(memory.kept)}
    barriers = [n for n in memory.kept if _mutates(n)]
    for barrier in barriers:
        for node in memory.kept:
            if position[node] < position[barrier]:
                order.add_edge(group_of[node], group_of[barrier])
            elif node is not barrier:
                order.add_edge(group_of[barrier], group_of[node])
    rank = {g: (_place(members), min(position[n] for n in members)) for g, members in groups.items()}

    result = fx.GraphModule(gm, fx.Graph())
    env: dict[fx.Node, fx.Node] = {}

    def new(node: fx.Node) -> fx.Node:
        if node not in env:  # a view that stands alone: made where it is first asked for
            env[node] = result.graph.node_copy(node, new)
        return env[node]

    before = after = sympy.Integer(0)
    count = 0
    for group in nx.lexicographical_topological_sort(order, key=rank.__getitem__):
        members = groups[group]
        known = {n for n in members if n.target in COMPUTE and is_known(n)}
        for node in known:
            before += memory.traffic({node})
        after += memory.traffic(members) if known else 0
        if len(members) == 1:
            new(next(iter(members)))
            continue
        region, inputs, outputs = _region(gm, memory, members, sizes)
        name = f"fused_{count}"
        count += 1
        result.add_submodule(name, region)
        call = result.graph.call_module(name, tuple(new(n) for n in inputs))
        call.meta["val"] = outputs[0].meta["val"]
        env[outputs[0]] = call
        if len(outputs) > 1:
            call.meta["val"] = tuple(n.meta["val"] for n in outputs)
            for i, node in enumerate(outputs):
                env[node] = result.graph.call_function(_getitem, (call, i))
                env[node].meta = dict(node.meta)
    result.graph.lint()
    result.recompile()
    result.meta = {**gm.meta, "fusion": FusionReport(count, sympy.expand(before), sympy.expand(after))}
    return result


def _region(
    gm: fx.GraphModule,
    memory: _Memory,
    members: set[fx.Node],
    sizes: dict[sympy.Expr, fx.Node],
) -> tuple[FusedRegion, list[fx.Node], list[fx.Node]]:
    nodes = memory.closure(members)
    inside = set(nodes)
    outputs = memory.outputs(members)
    inputs = list(
        dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside)
    )
    # Sizes that no tensor shows on its own (a view of B*T rows as B, T) come along as arguments.
    shown = {as_expr(n) for n in inputs if is_size(n)}
    tensors = [value_of(n) for n in (*inputs, *nodes)]
    shapes = [shape_of(t) for t in tensors if t is not None]
    for node in inputs:
        value = value_of(node)
        shown.update(shape_of(value) if value is not None else ())
    for symbol in sorted({s for shape in shapes for n in shape for s in n.free_symbols}, key=str):
        if symbol not in shown and symbol in sizes:
            inputs.append(sizes[symbol])
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = {"val": node.meta["val"]}
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    results = tuple(env[n] for n in outputs)
    graph.output(results[0] if len(results) == 1 else results)
    module = fx.GraphModule(gm, graph, class_name="Region")
    before = sympy.Add(*(memory.traffic({n}) for n in members))
    return FusedRegion(module, sympy.expand(before), memory.traffic(members)), inputs, outputs
