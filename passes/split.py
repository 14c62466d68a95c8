"""Split: what the state of the next mini-batch waits for, and what can run beside it.

Before: one body, mini-batch after mini-batch::

    g = ...(anchor, k, v);  W = anchor - ...(k, g);  z = ...(anchor, q, k, g)

After: four graphs; only the third runs one mini-batch after another::

    invariant:   of parameters alone, once
    before:      of tokens and parameters, all mini-batches at once
    recurrence:  g, W         from anchor
    outputs:     z            from the anchors and what the recurrence left, all mini-batches at once

Source: the split of the state's critical path from the queries (DESIGN of chunked linear attention,
arXiv 2312.06635, section 3.3, for any body).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from tttc.ir.body import Body, role
from tttc.ir.build import ancestors, dims_of


@dataclass
class Part:
    """One of the graphs: what it takes and gives, by the names of the body's nodes."""

    gm: fx.GraphModule
    inputs: list[str]
    results: list[str]
    run: Any = None  # the graph as a backend bound it


@dataclass
class Split:
    """A body in four parts; values pass between them by name."""

    invariant: Part
    before: Part
    recurrence: Part
    outputs: Part
    states: dict[int, str]  # the nodes of the new states
    emitted: list[str]  # the nodes of the outputs


def _part(body: Body, members: set[fx.Node], results: list[fx.Node]) -> Part:
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    inputs: list[str] = []
    nodes = [n for n in body.gm.graph.nodes if n in members]
    for node in nodes:
        for x in node.all_input_nodes:
            if x not in members and x not in mapping:
                mapping[x] = graph.placeholder(x.name)
                mapping[x].meta["dims"] = dims_of(x)
                inputs.append(x.name)
    for x in results:
        if x not in members and x not in mapping:
            mapping[x] = graph.placeholder(x.name)
            mapping[x].meta["dims"] = dims_of(x)
            inputs.append(x.name)
    for node in nodes:
        mapping[node] = graph.node_copy(node, lambda x: mapping[x])
    graph.output(tuple(mapping[x] for x in results))
    return Part(fx.GraphModule({}, graph), inputs, [x.name for x in results])


def split(
    body: Body,
    live: Iterable[int],
    carried_kinds: tuple[str, ...] = ("anchor", "carry"),
    token_kinds: tuple[str, ...] = ("token",),
) -> Split:
    """The parts of a body; of its states only the ``live`` ones are made.

    ``carried_kinds`` are the arguments that one mini-batch hands to the next, ``token_kinds`` those that differ
    from mini-batch to mini-batch beside them.
    """
    live = set(live)
    nodes = set(body.nodes)
    carried = {n for n in body.placeholders if role(n)[0] in carried_kinds}
    tokens = {n for n in body.placeholders if role(n)[0] in token_kinds}
    on_state, on_tokens = set(carried), set(tokens)
    for node in body.gm.graph.nodes:
        if node.op == "call_function":
            if any(x in on_state for x in node.all_input_nodes):
                on_state.add(node)
            if any(x in on_tokens for x in node.all_input_nodes):
                on_tokens.add(node)
    states = [body.results[i] for i in sorted(live)]
    emitted = body.results[body.states :]
    critical = ancestors(states) & nodes
    invariant = nodes - on_state - on_tokens
    recurrence = (critical & on_state) - invariant
    before = critical - on_state - invariant
    outputs = (ancestors(emitted) & nodes) - recurrence - before - invariant

    def leaving(members: set[fx.Node]) -> list[fx.Node]:
        final = {*states, *emitted}
        return [
            n for n in body.gm.graph.nodes
            if n in members and (n in final or any(u not in members and u.op != "output" for u in n.users))
        ]  # fmt: skip

    ends = list(dict.fromkeys(states))
    between = [n for n in leaving(recurrence) if n not in ends]
    return Split(
        _part(body, invariant, leaving(invariant)),
        _part(body, before, leaving(before)),
        _part(body, recurrence, [*ends, *between]),
        _part(body, outputs, list(dict.fromkeys(emitted))),
        {i: n.name for i, n in zip(sorted(live), states, strict=True)},
        [n.name for n in emitted],
    )
