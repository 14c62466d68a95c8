"""Partition the memory-bound nodes of a graph into groups that are worth a kernel each."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import networkx as nx
import sympy
import torch
from torch import fx
from tttc.passes.from_sizes import made_anywhere

from tttc.ir.index_maps import VIEWS, numel, shape_of
from tttc.ir.node_values import value_of
from tttc.ir.nominal import nominal
from tttc.ir.row_nodes import is_known
from tttc.ir.row_operators import COMPUTE, FREE
from tttc.ir.row_space import row_space
from tttc.ir.structure import Structures

MAX_NODES = 128
MAX_TENSORS = 32  # arguments of one kernel


class Memory:
    """Which node reads what, and how many bytes that is."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        free = {n for n in self.nodes if n.target in FREE and is_known(n)}
        self.computed = made_anywhere(graph) - free  # free as well, in a kernel
        self.free = free | self.computed
        self.kept = [n for n in self.nodes if n not in self.free]
        self.sources = {n: list(self._sources(n)) for n in self.kept}
        tensors = {n: t for n in self.nodes if (t := value_of(n)) is not None}
        self.bytes = {n: _bytes(t) for n, t in tensors.items()}
        self.nominal_bytes = {n: nominal(b) for n, b in self.bytes.items()}
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

    def reads_memory(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether all that nodes read is there, or there to look at, before they run."""
        return self.computed.isdisjoint(nodes)

    def inputs(self, members: set[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
        """Tensors read from outside, and through which views."""
        read: dict[fx.Node, set[fx.Node]] = {}
        for node in members:
            for source, view in self.sources[node]:
                if source in self.bytes and source not in members:
                    read.setdefault(source, set()).add(view)
        return read

    def outputs(self, members: set[fx.Node]) -> list[fx.Node]:
        """Members that are read from outside."""
        return sorted(n for n in members if not self.consumers[n] <= members)

    def traffic(self, members: set[fx.Node]) -> sympy.Expr:
        """Bytes read and written by members that run as one."""
        moved = self.outputs(members)
        for source, views in self.inputs(members).items():
            moved += self._parts(source, views)
        return sympy.expand(sum(self.bytes[n] for n in moved))

    def _parts(self, source: fx.Node, views: set[fx.Node]) -> list[fx.Node]:
        """What is read of a tensor that is read through views."""
        parts = [v for v in views if v is source or v.target in VIEWS]
        # A slice reads less than all of it, a broadcast or two overlapping slices no more.
        less = sum(self.nominal_bytes[v] for v in parts) < self.nominal_bytes[source]
        return parts if less else [source]

    def nominal_read(self, source: fx.Node, views: set[fx.Node]) -> int:
        """Bytes read of a tensor through views, at nominal sizes."""
        return sum(self.nominal_bytes[n] for n in self._parts(source, views))


def _bytes(value: torch.Tensor) -> sympy.Expr:
    return numel(shape_of(value)) * value.element_size()


class Border:
    """What a group of nodes reads from outside and is read of it there."""

    def __init__(self, memory: Memory, members: set[fx.Node]) -> None:
        self.memory = memory
        self.members = members
        self.inputs = memory.inputs(members)
        self.outputs = memory.outputs(members)
        self.read = {source: memory.nominal_read(source, v) for source, v in self.inputs.items()}

    def saved(self, other: Border) -> int:
        """Bytes, at nominal sizes, that the two move less as one: a look at what they share, not at all they do."""
        memory = self.memory
        saved = 0
        for one, two in ((self, other), (other, self)):
            for node in one.outputs:
                consumers = memory.consumers[node]
                if all(c in one.members or c in two.members for c in consumers):
                    saved += memory.nominal_bytes[node]
            for source, views in one.inputs.items():
                if source in two.members:
                    saved += one.read[source]
                elif one is self and source in two.inputs:
                    saved += one.read[source] + two.read[source]
                    saved -= memory.nominal_read(source, views | two.inputs[source])
        return saved


class Partition:
    """Groups of nodes, merged greedily while no cycle arises between them."""

    def __init__(self, graph: fx.Graph) -> None:
        self.memory = Memory(graph)
        self._legal: dict[Any, bool] = {}
        self._structures = Structures()
        kept = self.memory.kept
        self.bit = {n: 1 << i for i, n in enumerate(kept)}
        self.group_of: dict[fx.Node, int] = {n: i for i, n in enumerate(kept)}
        self.members: dict[int, set[fx.Node]] = {i: {n} for i, n in enumerate(kept)}
        self.mask = {i: self.bit[n] for i, n in enumerate(kept)}
        # Which groups must run just before each, and just after it.
        self.before: dict[int, set[int]] = {i: set() for i in self.members}
        self.after: dict[int, set[int]] = {i: set() for i in self.members}
        for node in kept:
            for source, _ in self.memory.sources[node]:
                self._order(self.group_of[source], self.group_of[node])
        self._order_mutations(kept)
        # Bits of nodes that a group leads to: some of each group that it leads to.
        self.below: dict[int, int] = {}
        for i in reversed(range(len(kept))):
            reach = 0
            for s in self.after[i]:
                reach |= self.mask[s] | self.below[s]
            self.below[i] = reach
        self.fusable = {
            i for i, n in enumerate(kept) if n.target in COMPUTE and is_known(n) and self.legal({n})
        }
        self.border = {i: Border(self.memory, self.members[i]) for i in self.fusable}

    def _order(self, first: int, then: int) -> None:
        self.after[first].add(then)
        self.before[then].add(first)

    @property
    def order(self) -> nx.DiGraph:
        """The groups: an edge where one must run before the other."""
        return nx.DiGraph(self.after)

    def _order_mutations(self, kept: list[fx.Node]) -> None:
        """A node that writes into its operands stays where it is among all others."""
        for i, node in enumerate(kept):
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable:
                for j in range(i):
                    self._order(j, i)
                for j in range(i + 1, len(kept)):
                    self._order(i, j)

    def legal(self, members: set[fx.Node]) -> bool:
        """Whether the members have a row space; asked once for equal structures (equal layers, say)."""
        nodes = self.memory.closure(members)
        outputs = self.memory.outputs(members) or sorted(members)[-1:]
        key = self._structures.key(nodes, outputs)
        if key not in self._legal:
            self._legal[key] = row_space(nodes, outputs) is not None
        return self._legal[key]

    def run(self) -> None:
        """Merge until nothing is saved any more."""
        queue: list[tuple[int, int, int]] = []

        def offer(a: int, b: int) -> None:
            saved = self.border[a].saved(self.border[b])
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

    def neighbours(self, group: int) -> list[int]:
        """Fusable groups that produce for this one, read from it, or read what it reads."""
        near: set[int] = set()
        for node in self.members[group]:
            near.update(self.group_of[c] for c in self.memory.consumers[node])
            for source, _ in self.memory.sources[node]:
                if source in self.memory.bytes:
                    near.add(self.group_of[source])
                    near.update(self.group_of[c] for c in self.memory.consumers[source])
        near.discard(group)
        return sorted(near & self.fusable)

    def may_merge(self, a: int, b: int) -> bool:
        if self.below[b] & self.mask[a]:
            a, b = b, a
        if any(s != b and self.below[s] & self.mask[b] for s in self.after[a]):
            return False  # a path from a to b through something outside both
        both = self.members[a] | self.members[b]
        tensors = len(self.memory.inputs(both)) + len(self.memory.outputs(both))
        if len(both) > MAX_NODES or tensors > MAX_TENSORS or not self._one_device(both):
            return False
        return self.legal(both)

    def _one_device(self, members: set[fx.Node]) -> bool:
        return len({n.meta["val"].device for n in members}) == 1

    def merge(self, a: int, b: int, into: int) -> None:
        before = (self.before.pop(a) | self.before.pop(b)) - {a, b}
        after = (self.after.pop(a) | self.after.pop(b)) - {a, b}
        self.members[into] = self.members.pop(a) | self.members.pop(b)
        self.mask[into] = self.mask.pop(a) | self.mask.pop(b)
        self.below[into] = (self.below.pop(a) | self.below.pop(b)) & ~self.mask[into]
        self.fusable -= {a, b}
        self.fusable.add(into)
        del self.border[a], self.border[b]
        self.border[into] = Border(self.memory, self.members[into])
        for node in self.members[into]:
            self.group_of[node] = into
        self.before[into], self.after[into] = before, after
        for group in before:
            self.after[group] -= {a, b}
            self.after[group].add(into)
        for group in after:
            self.before[group] -= {a, b}
            self.before[group].add(into)
        mask, reach = self.mask[into], self.below[into]
        stack = list(before)
        while stack:  # up to those that led to all of it already: so did what leads to them
            group = stack.pop()
            below = self.below[group]
            if reach & ~below or not mask & below:
                self.below[group] = below | reach | mask
                stack.extend(self.before[group])
