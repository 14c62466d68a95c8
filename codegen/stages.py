"""Stages: a loop in up to three kernels, so that only what the state waits for runs one mini-batch after another.

Before: one kernel, mini-batch after mini-batch::

    x = f(tokens, saved);  state = g(state, x);  y = h(state, x)

After, with three stages; only the second runs one mini-batch after another::

    before:      x            stored for every mini-batch
    recurrence:  state        from x; stored for every mini-batch
    outputs:     y            from x and the stored states

With two stages the recurrence computes ``x`` itself. What a later stage does not load it computes again: a minimum
cut of the graph decides, by bytes through device memory against operations.

Source: rematerialisation as a minimum cut, as in the min-cut partitioner of AOTAutograd (PyTorch).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import networkx
from torch import fx
from tttc.codegen.loop import Loop, Sink, Source, used
from tttc.codegen.solves import solved_before_states

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, spec_of
from tttc.ir.build import ancestors, dims_of
from tttc.ir.cost import element_count
from tttc.ir.spec import parse

ITEM = 2  # bytes of a number that passes through memory
FLOPS_PER_BYTE = 32  # of matrix products: what computing again is worth
SHUFFLES_PER_BYTE = 0.25  # of sums within a tile, which make threads wait for each other
ELEMENTS_PER_BYTE = 2  # of elementwise functions


@dataclass
class _Costs:
    """Bytes of values, and what it costs to compute them again, in bytes."""

    sizes: dict[str, int]

    def elements(self, node: fx.Node) -> int:
        """The numbers in a value."""
        return element_count(dims_of(node), self.sizes)

    def again(self, node: fx.Node) -> float:
        """What computing a value from its operands is worth."""
        if node.op != "call_function" or node.target is ops.rename:
            return 0
        labels = parse(spec_of(node)).labels
        volume = element_count(labels, self.sizes)
        if node.target in (ops.contraction, ops.masked_contraction) and len(labels) > 2:
            return 2 * volume / FLOPS_PER_BYTE
        if (
            node.target is ops.triangular_solve
        ):  # an inverse by products of pairs of tokens, and one more
            pairs = element_count((TOKEN, EARLIER), self.sizes)
            doublings = 2 * self.sizes[TOKEN].bit_length()
            return 2 * (doublings * pairs * self.sizes[TOKEN] + volume) / FLOPS_PER_BYTE
        if len(labels) > len(dims_of(node)):
            return volume / SHUFFLES_PER_BYTE
        return volume / ELEMENTS_PER_BYTE


def _descendants(loop: Loop, of: Iterable[fx.Node]) -> set[fx.Node]:
    found = set(of)
    for node in loop.graph.nodes:
        if node.op == "call_function" and any(x in found for x in node.all_input_nodes):
            found.add(node)
    return found


def _loaded(
    loop: Loop, targets: set[fx.Node], made: set[fx.Node], stored: set[fx.Node], costs: _Costs
) -> tuple[set[fx.Node], set[fx.Node]]:
    """What a stage that makes ``targets`` loads of what earlier stages ``made``, and what it computes itself.

    The minimum cut between what there is and the targets; arguments of the loop cost what loading them does, as
    do values that are ``stored`` already for another stage.
    """
    graph = networkx.DiGraph()
    inside = ancestors(targets)
    fixed = inside - _descendants(
        loop, [n for n in inside if n in loop.sources and _varies(loop, n)]
    )
    for node in inside:
        enter, leave = (node, 0), (node, 1)
        if node in fixed:
            graph.add_edge(enter, leave)  # computed where it is used, at the start of a kernel
            continue
        source = loop.sources.get(node)
        if source is not None:
            # A state is stored by an earlier stage, other arguments by who calls.
            passes = 2 if source.kind == "state" else 1
            graph.add_edge("there", leave, capacity=passes * costs.elements(node) * ITEM)
            continue
        graph.add_edge("there", enter, capacity=costs.again(node))
        if node in made:
            passes = 1 if node in stored else 2
            graph.add_edge(enter, leave, capacity=passes * costs.elements(node) * ITEM)
        else:
            graph.add_edge(enter, leave)
        for x in node.all_input_nodes:
            graph.add_edge((x, 1), enter)
    for node in targets:
        graph.add_edge((node, 1), "wanted")
    if "there" not in graph or not any(graph.successors("there")):
        return set(), inside
    _, (near, _) = networkx.minimum_cut(graph, "there", "wanted")
    loads = {
        n for n in inside
        if n not in loop.sources and n not in fixed and (n, 0) in near and (n, 1) not in near
    }  # fmt: skip
    computed: set[fx.Node] = set()
    stack = [n for n in targets if n not in loads]
    while stack:
        node = stack.pop()
        if node not in computed:
            computed.add(node)
            stack += [x for x in node.all_input_nodes if x not in loads]
    return loads, computed


def _varies(loop: Loop, node: fx.Node) -> bool:
    return loop.sources[node].kind not in ("shared", "constant")


def _stage(
    loop: Loop,
    suffix: str,
    loads: set[fx.Node],
    sinks: list[tuple[fx.Node, Sink]],
    names: dict[fx.Node, str],
    saved_states: bool,
    **changes: object,
) -> Loop:
    """A loop of its own around a part of the graph."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    sources: dict[fx.Node, Source] = {}
    needed: set[fx.Node] = set()
    stack = [n for n, _ in sinks]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            if node not in loads:
                stack += node.all_input_nodes
    for node in loop.graph.nodes:
        if node not in needed or node in mapping:
            continue
        if node.op == "placeholder" or node in loads:
            new = graph.placeholder(names.get(node, str(node.target)))
            source = loop.sources.get(node)
            if source is None:
                source = Source("value", names[node])
            elif source.kind == "state" and saved_states:
                source = Source("saved", source.name)
            sources[new] = source
        else:
            new = graph.node_copy(node, lambda x: mapping[x])
        new.meta = {"dims": dims_of(node)}
        mapping[node] = new
    if not saved_states:  # a state that is renewed without being read is carried all the same
        for node, source in loop.sources.items():
            if source.kind == "state" and node not in mapping:
                mapping[node] = graph.placeholder(str(node.target))
                mapping[node].meta = {"dims": dims_of(node)}
                sources[mapping[node]] = source
    graph.output(tuple(mapping[n] for n, _ in sinks))
    made = replace(
        loop,
        name=f"{loop.name}_{suffix}",
        graph=graph,
        sources=sources,
        sinks=[(mapping[n], sink) for n, sink in sinks],
        save=(),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def stages(loop: Loop, count: int) -> list[Loop]:
    """The loop as ``count`` kernels (1, 2 or 3), in the order they run.

    The recurrence comes next to last; it saves the states that the last one reads. Values that pass from one
    stage to another are ``value_0``, ``value_1``, ... of both.
    """
    if count == 3:
        loop = solved_before_states(loop)
    state_sinks = [(n, s) for n, s in loop.sinks if s.kind == "state"]
    other_sinks = [(n, s) for n, s in loop.sinks if s.kind != "state"]
    if count == 1 or not state_sinks or not other_sinks:
        return [loop]
    sizes = {**loop.sizes, TOKEN: loop.mini_batch_size, EARLIER: loop.mini_batch_size}
    dims = {d for n in used(loop) for d in dims_of(n)}
    costs = _Costs(sizes | {d: loop.mini_batch_size for d in dims if d not in sizes})
    on_state = _descendants(loop, [n for n, s in loop.sources.items() if s.kind == "state"])
    states = {n for n, _ in state_sinks}
    critical = {n for n in ancestors(states) if n.op == "call_function"}
    early: set[fx.Node] = set()
    if count == 3:
        early, _ = _loaded(loop, states, critical - on_state, set(), costs)
    before = {n for n in ancestors(early) if n.op == "call_function"}
    in_recurrence = critical
    if early:
        _, in_recurrence = _loaded(loop, states, early, set(), costs)
        in_recurrence = {n for n in in_recurrence if n.op == "call_function"}
    targets = {n for n, _ in other_sinks}
    late, _ = _loaded(loop, targets, before | in_recurrence, early, costs)
    kept = sorted(early | late, key=list(loop.graph.nodes).index)
    names = {node: f"value_{i}" for i, node in enumerate(kept)}

    def stored(nodes: Iterable[fx.Node]) -> list[tuple[fx.Node, Sink]]:
        return [(n, Sink("value", names[n])) for n in sorted(nodes, key=kept.index)]

    last = _stage(loop, "outputs", late, other_sinks, names, True, parallel=True, store_state=False)
    save = tuple(
        s.name for s in last.sources.values() if s.kind == "saved" and s.name in loop.states
    )
    made = []
    if early:
        made.append(_stage(loop, "before", set(), stored(before & (early | late)), names, True,
                           parallel=True, store_state=False))  # fmt: skip
    made.append(_stage(loop, "recurrence", early, [*state_sinks, *stored(late - before)], names, False,
                       save=tuple(dict.fromkeys((*loop.save, *save)))))  # fmt: skip
    return [*made, last]
