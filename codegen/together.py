"""Sums made together: threads wait for each other once for several sums, not once for each.

Before::

    a = tl.sum(x, 1)
    b = tl.sum(y, 1)

After (:func:`function` writes them)::

    a, b = sums_2(x, y, 1, FAST)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

from torch import fx

from tttc.ir.depth import depths, makes_wait

MOST = 4  # sums at once: what they add up is on chip together

Group = tuple[fx.Node, ...]


def groups_of(
    nodes: Sequence[fx.Node], kind: Callable[[fx.Node], Hashable | None]
) -> dict[fx.Node, Group]:
    """Which sums are made together, by sum; ``kind``: what sums must have in common, None for what is none.

    A sum waits for others until something that makes threads wait needs it: nothing comes later for it.
    """
    depth, latest = depths(nodes), _latest(nodes)
    found = [n for n in nodes if kind(n) is not None]
    at: dict[tuple[Hashable, int], list[fx.Node]] = {}
    for node in found:
        if depth[node] == latest[node]:
            at.setdefault((kind(node), depth[node]), []).append(node)
    for node in found:
        if depth[node] != latest[node]:
            levels = sorted(
                d for (k, d) in at if k == kind(node) and depth[node] <= d <= latest[node]
            )
            at.setdefault((kind(node), levels[0] if levels else depth[node]), []).append(node)
    made: dict[fx.Node, Group] = {}
    for members in at.values():
        for i in range(0, len(members), MOST):
            if len(group := tuple(members[i : i + MOST])) > 1:
                made |= dict.fromkeys(group, group)
    return made


def _latest(nodes: Sequence[fx.Node]) -> dict[fx.Node, float]:
    """By node, how many products and sums may lie on the way to it before what needs it has to wait longer."""
    depth = depths(nodes)
    latest: dict[fx.Node, float] = {}
    members = set(nodes)
    for node in reversed(nodes):
        users = [u for u in node.users if u in members]
        latest[node] = min(
            (depth[u] - 1 if makes_wait(u) else latest[u] for u in users), default=math.inf
        )
    return latest


def in_order(nodes: Sequence[fx.Node], groups: dict[fx.Node, Group]) -> list[fx.Node | Group]:
    """The nodes with each group where its last member was; what needs one of its members comes after it."""
    members = set(nodes)
    order: list[fx.Node | Group] = []
    done: set[fx.Node] = set()
    seen: dict[Group, int] = {}
    waiting: list[fx.Node] = []

    def ready(node: fx.Node) -> bool:
        return all(x in done for x in node.all_input_nodes if x in members)

    def visit(node: fx.Node) -> bool:
        if not ready(node):
            return False
        group = groups.get(node)
        if group is None:
            order.append(node)
            done.add(node)
            return True
        seen[group] = seen.get(group, 0) + 1
        if seen[group] == len(group):
            order.append(group)
            done.update(group)
        return True

    for node in nodes:
        waiting.append(node)
        while True:
            left = [n for n in waiting if not visit(n)]
            if len(left) == len(waiting):
                break
            waiting = left
    assert not waiting, "sums made together wait for each other"
    return order


def function(count: int) -> str:
    """The source of the function that makes so many sums.

    On NVIDIA devices one reduction of several tensors; elsewhere, the interpreter included, one sum after another.
    """
    xs = [f"x{i}" for i in range(count)]
    a, b = ([f"{name}{i}" for i in range(count)] for name in "ab")
    added = ", ".join(f"{x} + {y}" for x, y in zip(a, b, strict=True))
    return f"""@triton.jit
def added_{count}({", ".join([*a, *b])}):
    return {added}


@triton.jit
def sums_{count}({", ".join(xs)}, AXIS: tl.constexpr, FAST: tl.constexpr):
    if FAST:
        return tl.reduce(({", ".join(xs)}), AXIS, added_{count})
    else:
        return {", ".join(f"tl.sum({x}, AXIS)" for x in xs)}


"""
