"""The order in which a kernel computes its values: the one that keeps least on chip at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import fx

from tttc.ir import ops
from tttc.ir.depth import depths, makes_wait


def products_first(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes with the products of arguments alone first: they run while the long chain of the state starts."""
    depth = depths(nodes)
    return sorted(nodes, key=lambda n: depth[n] > 1)


def on_demand(
    nodes: Sequence[fx.Node],
    results: Sequence[fx.Node],
    small: Callable[[fx.Node], bool],
    after: Mapping[fx.Node, set[fx.Node]],
    freeing: bool = False,
) -> list[fx.Node]:
    """The nodes with each value made right before it is read: of two operands, the one of the longer chain first.

    What is small, and what is a result, is made as soon as it can be: it frees what it is made of. Where ``freeing``, so
    is an elementwise value that takes less than what only it still reads.

    Args:
        nodes: operators in a valid order.
        results: those wanted, in the order in which they are asked for.
        small: whether a value takes next to nothing on chip.
        after: nodes that must come after others.
    """
    members, depth = set(nodes), depths(nodes)
    position = {n: i for i, n in enumerate(nodes)}
    needs = {n: {x for x in (*n.all_input_nodes, *after.get(n, ())) if x in members} for n in nodes}
    readers: dict[fx.Node, list[fx.Node]] = {n: [] for n in nodes}
    for n in nodes:
        for x in needs[n]:
            readers[x].append(n)
    eager = {n for n in nodes if n in set(results) or small(n)}
    done: dict[fx.Node, None] = {}
    groups = {last: set(g) for last, g in _groups(nodes, members).items()} if freeing else {}
    inputs = {
        last: [x for x in members if x not in group and any(u in group for u in readers[x])]
        for last, group in groups.items()
    }

    def frees(last: fx.Node) -> bool:
        """Whether values that nobody else will read are more than what is made of them."""
        group = groups[last]
        gone = [
            x for x in inputs[last]
            if not small(x) and all(u in group or u in done or u not in members for u in x.users)
        ]  # fmt: skip
        return len(gone) > 1 and all(needs[n] <= done.keys() | group for n in group)

    def make(node: fx.Node) -> None:
        done[node] = None
        for reader in readers[node]:
            if reader in eager and reader not in done and needs[reader] <= done.keys():
                make(reader)
        for last, group in groups.items():
            if last not in done and not small(last) and frees(last):
                for n in nodes:
                    if n in group and n not in done:
                        make(n)

    for result in results:
        stack = [result] if result in members else []
        while stack:
            node = stack[-1]
            missing = [x for x in needs[node] if x not in done]
            if node in done or not missing:
                stack.pop()
                if node not in done:
                    make(node)
                continue
            stack.append(max(missing, key=lambda x: (depth[x], -position[x])))
    return list(done)


def _groups(nodes: Sequence[fx.Node], members: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Elementwise values that only one other of the same depth reads are made with it: groups by their last node.

    The depth of a value counts the products and sums on the way to it.
    """
    depth = depths(nodes)
    leader: dict[fx.Node, fx.Node] = {}
    for node in reversed(nodes):
        users = [u for u in node.users if u in members]
        joins = len(users) == 1 and not makes_wait(node) and depth[users[0]] == depth[node]
        leader[node] = leader[users[0]] if joins and not makes_wait(users[0]) else node
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        groups.setdefault(leader[node], []).append(node)
    return groups


def least_live(
    nodes: Sequence[fx.Node],
    size: Callable[[fx.Node], int],
    held: set[fx.Node],
    after: Mapping[fx.Node, set[fx.Node]],
) -> list[fx.Node]:
    """The nodes in an order that greedily keeps the live values small.

    Args:
        nodes: operators in a valid order.
        size: elements of a value on chip.
        held: values that stay live to the end (results).
        after: nodes that must come after others: a state is not made anew while the old one is still read.
    """
    members = set(nodes)
    groups = _groups(nodes, members)
    position = {node: i for i, node in enumerate(nodes)}
    pending = dict(groups)
    done: set[fx.Node] = set()
    order: list[fx.Node] = []
    while pending:
        best: tuple[int, int] | None = None
        chosen: fx.Node | None = None
        for last, group in pending.items():
            inside = set(group)
            inputs = {x for n in group for x in n.all_input_nodes if x not in inside}
            awaited = inputs.union(*(after.get(n, set()) for n in group)) - inside
            if any(x in members and x not in done for x in awaited):
                continue
            freed = sum(
                size(x)
                for x in inputs
                if x not in held
                and all(u in done or u in inside or u not in members for u in x.users)
            )
            key = (size(last) - freed, position[group[0]])
            if best is None or key < best:
                best, chosen = key, last
        assert chosen is not None
        group = pending.pop(chosen)
        order += group
        done |= set(group)
    return order


def most_live(nodes: Sequence[fx.Node], size: Callable[[fx.Node], int]) -> int:
    """The most that values take at a time, of nodes computed in this order; what is only renamed is one value."""

    def renamed(node: fx.Node) -> fx.Node:
        while node.target is ops.rename:
            (node,) = node.all_input_nodes
        return node

    last: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        last |= {renamed(x): i for x in node.all_input_nodes} | {renamed(node): i}
    ends: dict[int, int] = {}
    live = most = 0
    for i, node in enumerate(nodes):
        if renamed(node) is node:
            live += size(node)
            ends[last[node]] = ends.get(last[node], 0) + size(node)
        most = max(most, live)
        live -= ends.pop(i, 0)
    return most
