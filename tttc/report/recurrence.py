"""What the next state waits for, and what runs beside it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from tttc.ir import ops
from tttc.ir.cost import flops, size_table
from tttc.ir.program import Program
from tttc.passes.backward import Backward
from tttc.passes.prune_state import live_states
from tttc.passes.split import Part, split
from tttc.report.graphs import KNOWN, operation_of
from tttc.report.records import PartReport, RecurrenceReport

PARTS = ("invariant", "before", "recurrence", "outputs")
MOVES = (ops.rename, ops.last, ops.broadcast)


def recurrence_of(program: Program, names: Mapping[str, str]) -> RecurrenceReport:
    """The parts of the body that runs: a mini-batch, or a token where tokens run one after another."""
    body = program.full or program.token
    outputs = len(body.results) - body.states
    # States that only come out at the end (a running sum, say) are beside the recurrence.
    live = live_states(body, () if outputs else range(body.states), range(outputs))
    made = split(body, live)
    sizes = size_table(body, program.unit)
    parts = [_part(name, getattr(made, name), sizes) for name in PARTS]
    said = [names.get(f"carry_{i}", f"carry_{i}") for i in sorted(live)]
    return RecurrenceReport(_unit(program), said, parts)


def backward_recurrence(
    program: Program, made: Backward, names: Mapping[str, str]
) -> RecurrenceReport:
    """The same of the VJP of that body: what the cotangents of the state before wait for."""
    body = made.body
    known = ("token", "goutput", "anchor", "carry")
    parts_of = split(body, range(body.states), ("gstate",), known)
    sizes = size_table(body, program.unit)
    parts = [_part(name, getattr(parts_of, name), sizes) for name in PARTS]
    said = [names.get(name, name) for name in made.wanted[: body.states]]
    return RecurrenceReport(_unit(program), list(dict.fromkeys(said)), parts, reverse=True)


def _unit(program: Program) -> str:
    if program.sequential:
        return "token"
    return "mini-batch" if program.chunk_size is None else "chunk"


def _part(name: str, part: Part, sizes: Mapping[object, int]) -> PartReport:
    nodes = [n for n in part.gm.graph.nodes if n.op == "call_function" and n.target not in MOVES]
    products = [n for n in nodes if operation_of(n)[0] == "contraction"]
    total = sum(float(flops(n).subs(sizes)) for n in nodes if _known(n))
    chain = _longest(part.gm.graph)
    along = [operation_of(n) for n in chain]
    return PartReport(
        name,
        len(nodes),
        len(products),
        total,
        len(chain),
        sum(kind == "contraction" for kind, _, _ in along),
        [f"{said}: {detail}" for _, said, detail in along],
    )


def _known(node: fx.Node) -> bool:
    return ops.OPERATORS.get(node.target) in KNOWN  # type: ignore[call-overload]


def _longest(graph: fx.Graph) -> list[fx.Node]:
    """The longest chain of operators that compute, in contractions first."""
    best: dict[fx.Node, tuple[int, int]] = {}
    before: dict[fx.Node, fx.Node | None] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        previous = max(node.all_input_nodes, key=lambda x: best[x], default=None)
        products, length = best[previous] if previous is not None else (0, 0)
        counts = node.op == "call_function" and node.target not in MOVES
        is_product = counts and operation_of(node)[0] == "contraction"
        best[node] = (products + int(is_product), length + int(counts))
        before[node] = previous
    chain: list[fx.Node] = []
    now = max(best, key=lambda x: best[x], default=None)
    while now is not None:
        if now.op == "call_function" and now.target not in MOVES:
            chain.append(now)
        now = before[now]
    return chain[::-1]
