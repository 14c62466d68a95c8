"""Phases: a step whose token is a tall tile of rows, as kernels over a few rows at a time and kernels for the state.

A chunk of 2048 tokens is no tile that a multiprocessor can hold, but its rows meet only in sums over all of them.
Before: one graph for the whole tile, rows ``m``::

    H = contraction("m i, i j -> m j", k, W)
    G = contraction("m i, m j -> i j", k, f(H))
    new_W = g(W, G)
    z = contraction("m i, i j -> m j", q, W)

After, phase by phase, the first in parallel over pieces of the tile::

    rows:   G = sum over pieces of "t i, t j -> i j" of k and f(k W);   z
    state:  new_W = g(W, G)

Rows that a later phase needs again are computed again from the tokens, never stored: nothing as tall as the tile passes
through memory but the arguments and the results.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import networkx
from torch import fx
from tttc.codegen.loop import Loop, Sink, Source, used

from tttc.ir import ops
from tttc.ir.body import TOKEN, operands_of, spec_of
from tttc.ir.build import Builder, dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.spec import parse

TALLEST = 64  # rows of a tile that one program holds
PIECE = 64  # rows of a taller one that are handled at a time,
FEW = 32  # or fewer, where more tiles than usual are alive
MANY_PRODUCTS = 12


@dataclass(frozen=True)
class Phases:
    """A step in phases.

    Attributes:
        loops: in the order they run. Those with ``tokens`` go over pieces of the rows, tensors ``[B, H, rows, ...]``; the
            others once over tensors ``[B, H, ...]``. What they make for each other and for the caller are ``made_k``.
        rows: of a tile.
        results: the tensor of each sink that is no tile of rows.
    """

    loops: tuple[Loop, ...]
    rows: int
    results: dict[Sink, str]


def tensor_of(source: Source) -> str:
    """The name of a source's tensor."""
    return f"saved_{source.name}" if source.kind == "saved" else source.name


def row_dims(loop: Loop) -> frozenset[str]:
    """The dimensions of a tile's rows, which are too many for one program; else empty.

    Tokens alone have them, and what the step makes of nothing for each row (a decay by place, say).
    """
    if loop.tokens:
        return frozenset()
    tokens = {n for n, s in loop.sources.items() if s.kind == "token"}
    by_row = tokens | {n for n, s in loop.sources.items() if s.kind == "constant"}
    kept = {d for n in loop.sources if n not in by_row for d in dims_of(n)}
    tall = {d for n in tokens for d in dims_of(n) if d not in kept and loop.sizes[d] > TALLEST}
    for node in loop.graph.nodes:
        if node.target is ops.rename:
            pairs = zip(dims_of(node.args[1]), dims_of(node), strict=True)
            tall |= {new for old, new in pairs if old in tall}
    return frozenset(tall)


class _Splitter:
    """One run of :func:`phases`."""

    def __init__(self, loop: Loop, rows: frozenset[str]) -> None:
        self.loop, self.rows = loop, rows
        self.nodes = [n for n in loop.graph.nodes if n in used(loop)]
        self.place = {n: i for i, n in enumerate(self.nodes)}
        self.phase: dict[fx.Node, int] = {}
        self.tensors = {n: tensor_of(s) for n, s in loop.sources.items()}
        for node in self.nodes:
            self.check(node)
            self.phase[node] = self.phase_of(node)

    def tall(self, node: fx.Node) -> bool:
        """Whether a value has rows."""
        return bool(self.rows & set(dims_of(node)))

    def total(self, node: fx.Node) -> bool:
        """Whether a value is a sum over rows."""
        return not self.tall(node) and any(self.tall(x) for x in node.all_input_nodes)

    def check(self, node: fx.Node) -> None:
        """Refuse what needs more than one piece of the rows at a time, but for sums."""
        if node.op != "call_function":
            return
        if node.target is not ops.rename and len(self.rows & set(parse(spec_of(node)).labels)) > 1:
            raise NotLowerable("rows of a tile of tokens meet each other")
        if self.total(node) and node.target is not ops.contraction:
            raise NotLowerable("rows of a tile of tokens meet in something else than a sum")

    def phase_of(self, node: fx.Node) -> int:
        """Even: made piece of rows by piece of rows; odd: made once. Everything as early as can be."""
        by_rows = self.tall(node) or self.total(node)
        found = 0 if by_rows else -1
        for x in node.all_input_nodes:
            p = self.phase[x]
            if self.total(x):
                found = max(found, p + 2 if by_rows else p + 1)
            elif self.tall(x) == by_rows:
                found = max(found, p)
            else:
                found = max(found, p + 1)
        return found

    def run(self) -> Phases:
        loops: list[Loop] = []
        wanted = {n for n, _ in self.loop.sinks}
        if any(n.op == "placeholder" and self.tall(n) for n in wanted):
            raise NotLowerable("a tile of tokens is a result as it is")
        for phase in range(-1, max(self.phase.values()) + 1):
            members = [n for n in self.nodes if self.phase[n] == phase and n.op == "call_function"]
            if phase % 2:
                targets = [
                    n for n in members
                    if n in wanted or any(self.phase.get(u, phase) != phase for u in n.users)
                ]  # fmt: skip
            else:
                targets = [n for n in members if self.total(n) or n in wanted]
            for group in self.apart(targets, phase):
                loops.append(self.part(f"{self.loop.name}_{len(loops)}", group, phase))
        sizes = {self.loop.sizes[d] for d in self.rows if d in self.loop.sizes}
        if len(sizes) != 1:
            raise NotLowerable("tiles of tokens have different numbers of rows")
        results = {
            sink: self.tensors[n] for n, sink in self.loop.sinks if not self.tall(n)
        }  # fmt: skip
        return Phases(tuple(loops), sizes.pop(), results)

    def computed(self, targets: Iterable[fx.Node], phase: int) -> set[fx.Node]:
        """What a kernel that makes ``targets`` computes: rows again from the tokens, the rest is there."""
        found: set[fx.Node] = set()
        stack = list(targets)
        while stack:
            node = stack.pop()
            if node in found or node.op != "call_function":
                continue
            found.add(node)
            stack += [
                x for x in node.all_input_nodes
                if (self.tall(x) if phase % 2 == 0 else self.phase[x] == phase and not self.total(x))
            ]  # fmt: skip
        return found

    def apart(self, targets: list[fx.Node], phase: int) -> list[list[fx.Node]]:
        """Groups of targets that have nothing to compute in common: a kernel each."""
        graph = networkx.Graph()
        for node in targets:
            graph.add_edge(node, node)
            for x in self.computed([node], phase) - {node}:
                graph.add_edge(node, x)
        groups = [
            [n for n in targets if n in part] for part in networkx.connected_components(graph)
        ]
        return sorted(groups, key=lambda g: self.place[g[0]])

    def part(self, name: str, targets: list[fx.Node], phase: int) -> Loop:
        """The loop that makes some values of a phase."""
        graph = fx.Graph()
        builder = Builder(graph)
        env: dict[fx.Node, fx.Node] = {}
        sources: dict[fx.Node, Source] = {}
        by_rows = phase % 2 == 0
        inside = self.computed(targets, phase)
        inputs = {x for n in inside for x in n.all_input_nodes} - inside
        names = {d: TOKEN for d in self.rows}

        def dims(node: fx.Node) -> tuple[str, ...]:
            return tuple(names.get(d, d) for d in dims_of(node))

        for node in sorted(inputs | inside, key=self.place.__getitem__):
            if node in inside:
                operands = [env[x] if isinstance(x, fx.Node) else x for x in operands_of(node)]
                if node.target is ops.rename and dims_of(operands[0]) == dims(node):
                    env[node] = operands[0]
                else:
                    env[node] = builder.copy(node, operands, dims(node))
                continue
            env[node] = graph.placeholder(self.tensors[node])
            env[node].meta = {"dims": dims(node)}
            given = self.loop.sources.get(node)
            fixed = (
                given is not None and given.kind in ("shared", "constant") and not self.tall(node)
            )
            kind = given.kind if fixed and given else ("token" if self.tall(node) or not by_rows else "held")  # fmt: skip
            sources[env[node]] = Source(kind, self.tensors[node])
        sinks = []
        for node in targets:
            if self.tall(node):
                sinks += [(env[node], s) for n, s in self.loop.sinks if n is node]
                continue
            self.tensors[node] = f"made_{self.place[node]}"
            sinks.append((env[node], Sink("sum" if by_rows else "token", self.tensors[node])))
        graph.output(tuple(n for n, _ in sinks))
        piece = FEW if sum(n.target is ops.contraction for n in inside) > MANY_PRODUCTS else PIECE
        return replace(
            self.loop, name=name, graph=graph, sources=sources, sinks=sinks, tokens=by_rows, parallel=by_rows,
            mini_batch_size=piece if by_rows else 1, save=(), store_state=False, reverse=False, refresh=None,
        )  # fmt: skip


def phases(loop: Loop) -> Phases | None:
    """The phases of a loop over tiles of tokens that are too tall for one program; None where they are not.

    Raises:
        NotLowerable: where the rows of a tile meet otherwise than in sums.
    """
    rows = row_dims(loop)
    return _Splitter(loop, rows).run() if rows else None


def outputs_alone(made: Phases) -> tuple[Loop, ...]:
    """The loops that the tiles of rows need: where nobody asks for the state after the last chunk."""
    needed: set[str] = set()
    kept = []
    for loop in reversed(made.loops):
        if any((s.kind == "token" and loop.tokens) or s.name in needed for _, s in loop.sinks):
            kept.append(loop)
            needed |= {s.name for s in loop.sources.values()}
    return tuple(reversed(kept))
