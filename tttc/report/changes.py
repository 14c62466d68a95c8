"""What a pass changed: the nodes of two graphs matched with each other.

Before (two graphs, whose nodes have nothing but their structure in common)::

    a = mul(x, y); b = sum(a)              a = mul(x, y); c = product(a, z); b = sum(c)

After: ``c`` is new; ``a`` and ``b`` are kept, though ``b`` reads something else now.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

from tttc.report.records import ARGUMENT_KINDS, GraphReport, NodeReport


def compare(before: GraphReport, after: GraphReport, name: str) -> GraphReport:
    """``after`` with the change of every node against ``before``, the stage called ``name``."""
    match = _Matcher(before.nodes, after.nodes).run()
    old = {n.name: n for n in before.nodes}
    nodes = []
    for node in after.nodes:
        change = ""
        if node.kind in ARGUMENT_KINDS:
            change = "" if node.name in match else "new"
        elif node.kind != "result":
            partner = old.get(match.get(node.name, ""))
            same = partner is not None and partner.detail == node.detail
            change = "new" if partner is None else "" if same else "changed"
        nodes.append(replace(node, change=change))
    kept = set(match.values())
    removed = [
        f"{n.operation}, {n.detail}" if n.detail else n.operation
        for n in before.operators
        if n.name not in kept
    ]
    removed += [
        f"argument {n.operation}"
        for n in before.nodes
        if n.kind in ARGUMENT_KINDS and n.name not in kept
    ]
    return GraphReport(nodes, removed, name)


class _Matcher:
    """Matches nodes from the arguments down, from the results up, then along edges to what is matched."""

    def __init__(self, before: list[NodeReport], after: list[NodeReport]) -> None:
        self.before, self.after = before, after
        self.match: dict[str, str] = {}  # after -> before
        self.taken: set[str] = set()
        self.users = [_users(before), _users(after)]

    def run(self) -> dict[str, str]:
        for node in self.after:
            same = [x for x in self.before if (x.kind, x.name) == (node.kind, node.name)]
            if same and (node.kind in ARGUMENT_KINDS or node.kind == "result"):
                self._pair(node, same[0])
        for exact in (True, False):
            self._by_key(lambda nodes, e=exact: _from_inputs(nodes, e))  # type: ignore[misc]
            self._by_key(lambda nodes, e=exact: _from_users(nodes, e))  # type: ignore[misc]
            while self._along_edges(exact):
                pass
        return self.match

    def _pair(self, new: NodeReport, old: NodeReport) -> None:
        self.match[new.name] = old.name
        self.taken.add(old.name)

    def _by_key(self, keys: Callable[[list[NodeReport]], dict[str, Hashable]]) -> None:
        places: dict[Hashable, list[NodeReport]] = {}
        found = keys(self.before)
        for node in self.before:
            if node.name not in self.taken:
                places.setdefault(found[node.name], []).append(node)
        found = keys(self.after)
        for node in self.after:
            if node.name not in self.match and places.get(found[node.name]):
                self._pair(node, places[found[node.name]].pop(0))

    def _along_edges(self, exact: bool) -> bool:
        """Match nodes of the same operation that share matched neighbours; the best of them first."""
        old_users, new_users = self.users
        by_operation: dict[Hashable, list[NodeReport]] = {}
        for node in self.before:
            if node.name not in self.taken:
                by_operation.setdefault(_local(node, exact), []).append(node)
        best: list[tuple[int, int, int, NodeReport, NodeReport]] = []
        for i, new in enumerate(self.after):
            if new.name in self.match:
                continue
            above = {self.match[x] for x in new.inputs if x in self.match}
            below = {self.match[x] for x in new_users.get(new.name, ()) if x in self.match}
            for j, old in enumerate(by_operation.get(_local(new, exact), ())):
                shared = len(above & set(old.inputs)) + len(
                    below & set(old_users.get(old.name, ()))
                )
                if shared:
                    best.append((-shared, i, j, new, old))
        for _, _, _, new, old in sorted(best, key=lambda x: x[:3]):
            if new.name not in self.match and old.name not in self.taken:
                self._pair(new, old)
        return bool(best)


def _local(node: NodeReport, exact: bool) -> Hashable:
    """What a node does by itself; not exact: on whatever dimensions."""
    if exact:
        return node.kind, node.operation, node.detail
    # Sums over other dimensions, and by pairs of tokens, are still sums.
    return node.kind, node.operation.split(" over ")[0], len(node.inputs)


def _users(nodes: list[NodeReport]) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for node in nodes:
        for x in node.inputs:
            table.setdefault(x, []).append(node.name)
    return table


def _from_inputs(nodes: list[NodeReport], exact: bool) -> dict[str, Hashable]:
    """Keys that are equal for nodes that are made in the same way."""
    key: dict[str, Hashable] = {}
    for node in nodes:
        argument = node.name if node.kind in (*ARGUMENT_KINDS, "result") else ""
        made = (_local(node, exact), argument, tuple(key.get(x) for x in node.inputs))
        key[node.name] = hash(made)
    return key


def _from_users(nodes: list[NodeReport], exact: bool) -> dict[str, Hashable]:
    """Keys that are equal for nodes of which the same is made."""
    users = _users(nodes)
    key: dict[str, Hashable] = {}
    for node in reversed(nodes):
        argument = node.name if node.kind in (*ARGUMENT_KINDS, "result") else ""
        used = tuple(sorted(hash(key.get(x)) for x in users.get(node.name, ())))
        key[node.name] = hash((_local(node, exact), argument, used))
    return key
