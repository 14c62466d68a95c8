"""A layered layout of a graph: every edge points down, few cross, and nodes stand near what they belong to.

Source: Sugiyama, Tagawa, Toda: Methods for visual understanding of hierarchical system structures (IEEE SMC 11,
1981): layers, dummies on long edges, orders by barycentres; here with least-squares positions.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import networkx as nx

GAP = 14.0  # between nodes of a layer
LAYER_GAP = 26.0
DUMMY = 8.0  # width kept free for an edge that passes a layer
SWEEPS = 16
STIFF = 8.0  # how straight long edges are kept


@dataclass
class Layout:
    """Centres of nodes, the points of each edge from top to bottom, and the size of it all."""

    centre: dict[Hashable, tuple[float, float]]
    edges: dict[tuple[Hashable, Hashable], list[tuple[float, float]]]
    width: float
    height: float


class _Dummy(NamedTuple):
    """Where an edge passes a layer."""

    above: Hashable
    below: Hashable
    layer: int


def layered(
    sizes: Mapping[Hashable, tuple[float, float]], edges: Sequence[tuple[Hashable, Hashable]]
) -> Layout:
    """Places for nodes of given widths and heights.

    >>> made = layered({"a": (40, 20), "b": (40, 20)}, [("a", "b")])
    >>> made.centre["a"][1] < made.centre["b"][1]
    True
    """
    graph = nx.DiGraph()
    graph.add_nodes_from(sizes)
    graph.add_edges_from(edges)
    layer = layers(graph)
    widths = {n: w for n, (w, _) in sizes.items()}
    chains: dict[tuple[Hashable, Hashable], list[Any]] = {}
    routed = nx.DiGraph()
    routed.add_nodes_from(sizes)
    for a, b in graph.edges:
        chain = [a, *(_Dummy(a, b, i) for i in range(layer[a] + 1, layer[b])), b]
        for dummy in chain[1:-1]:
            layer[dummy], widths[dummy] = dummy.layer, DUMMY
        chains[a, b] = chain
        nx.add_path(routed, chain)
    rows: list[list[Hashable]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    for node in nx.lexicographical_topological_sort(routed, key=lambda n: layer[n]):
        rows[layer[node]].append(node)
    _order(rows, routed)
    x = _positions(rows, routed, widths)
    tops: list[float] = []
    y = 0.0
    for row in rows:
        tops.append(y)
        y += max((sizes[n][1] for n in row if n in sizes), default=0.0) + LAYER_GAP
    height = {
        i: max((sizes[n][1] for n in row if n in sizes), default=0.0) for i, row in enumerate(rows)
    }
    left = min((x[n] - widths[n] / 2 for n in x), default=0.0)
    right = max((x[n] + widths[n] / 2 for n in x), default=0.0)
    centre = {n: (x[n] - left, tops[layer[n]] + height[layer[n]] / 2) for n in sizes}
    lines = {}
    for (a, b), chain in chains.items():
        points = [(centre[a][0], centre[a][1] + sizes[a][1] / 2)]
        for dummy in chain[1:-1]:
            top = tops[layer[dummy]]
            points += [(x[dummy] - left, top), (x[dummy] - left, top + height[layer[dummy]])]
        points.append((centre[b][0], centre[b][1] - sizes[b][1] / 2))
        lines[a, b] = points
    return Layout(centre, lines, right - left, max(y - LAYER_GAP, 0.0))


def layers(graph: nx.DiGraph) -> dict[Hashable, int]:
    """Each node below all it reads; those that make lines fewer or shorter there are moved down to their readers."""
    layer = {n: i for i, row in enumerate(nx.topological_generations(graph)) for n in row}
    for node in reversed(list(nx.topological_sort(graph))):
        below = [layer[x] for x in graph.successors(node)]
        above = [x for x in graph.predecessors(node) if graph.in_degree(x)]
        if below and len(above) <= len(below):
            layer[node] = min(below) - 1
    return layer


def _order(rows: list[list[Hashable]], graph: nx.DiGraph) -> None:
    """Sort each row by the mean place of its neighbours in the row before, down and up again and again."""
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        order = range(1, len(rows)) if down else range(len(rows) - 2, -1, -1)
        for i in order:
            fixed = {n: k for k, n in enumerate(rows[i - 1 if down else i + 1])}
            mine = {n: k for k, n in enumerate(rows[i])}

            def mean(
                n: Hashable, fixed: dict = fixed, mine: dict = mine, down: bool = down
            ) -> float:
                near = graph.predecessors(n) if down else graph.successors(n)
                places = [fixed[m] for m in near if m in fixed]
                return sum(places) / len(places) if places else float(mine[n])

            rows[i].sort(key=mean)


def _positions(
    rows: list[list[Hashable]], graph: nx.DiGraph, widths: Mapping[Hashable, float]
) -> dict[Hashable, float]:
    """Centres along each row, near the mean of the neighbours' and in order, by least squares."""
    x: dict[Hashable, float] = {}
    for row in rows:
        at = 0.0
        for n in row:
            x[n] = at + widths[n] / 2
            at += widths[n] + GAP
    for sweep in range(SWEEPS):
        for row in rows if sweep % 2 == 0 else rows[::-1]:
            wanted = []
            for n in row:
                near = {m: _stiffness(n, m) for m in nx.all_neighbors(graph, n)}
                total = sum(near.values())
                wanted.append(sum(w * x[m] for m, w in near.items()) / total if near else x[n])
            # With the room that nodes need taken off, "in order and apart" is "not decreasing".
            offsets, at = [], 0.0
            for k, n in enumerate(row):
                at += (widths[row[k - 1]] + widths[n]) / 2 + GAP if k else 0.0
                offsets.append(at)
            weights = [STIFF if isinstance(n, _Dummy) else 1.0 for n in row]
            fitted = _not_decreasing([w - o for w, o in zip(wanted, offsets, strict=True)], weights)
            for n, place, offset in zip(row, fitted, offsets, strict=True):
                x[n] = place + offset
    return x


def _stiffness(a: Hashable, b: Hashable) -> float:
    """How much the ends of an edge want to stand above each other: most inside a long edge."""
    inside = isinstance(a, _Dummy) + isinstance(b, _Dummy)
    return (1.0, 2.0, STIFF)[inside]


def _not_decreasing(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest sequence that does not decrease (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, wa, na), (b, wb, nb) = pools[-2:]
            pools[-2:] = [((a * wa + b * wb) / (wa + wb), wa + wb, na + nb)]
    return [mean for mean, _, length in pools for _ in range(length)]
