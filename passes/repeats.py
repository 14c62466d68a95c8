"""Find the blocks that repeat in a captured graph."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tttc.ir.index_maps import as_expr

SAVED = 64  # nodes that must be repetitions, for a block to be worth it
PERIODS = 8  # lengths of a block that are tried


@dataclass(frozen=True)
class Repeat:
    """Parts of a graph that are the same program, and what each of them reads from outside.

    ``results`` are the places in a block of the values that some block is asked for from outside of it.
    """

    blocks: list[list[fx.Node]]
    operands: list[list[fx.Node]]
    results: list[int]


def repeats(graph: fx.Graph, label: Callable[[fx.Node], str]) -> list[Repeat]:
    """Blocks of a graph of TorchDynamo that are equal node by node: the layers of a deep model.

    ::

        a = linear(x, w0); b = add(x, a)        blocks (a, b) and (c, d),
        c = linear(b, w1); d = add(b, c)        of operands (x, w0) and (b, w1), and result 1

    Equal means the same operators, constants, shapes, strides, dtypes, devices and needs for gradients, and operands
    used in the same places. Nothing is looked up by name: a loop over layers, however written, is a row of operators
    with a period. Where in the period a block begins is chosen so that few values pass from block to block.

    Args:
        graph: with values under ``meta["example_value"]``; left as it is.
        label: a name that an operator is told and that may differ between equal blocks.

    A graph that says how what follows is to be run (autocast, whether gradients are needed) has no blocks.
    """
    nodes = [n for n in graph.nodes if n.op in ("call_function", "call_method", "call_module")]
    if any("example_value" not in n.meta for n in nodes):
        return []
    signatures = _Signatures(label)
    marks = [signatures.of(n) for n in nodes]
    crossing = _crossing(nodes)
    found: list[Repeat] = []
    pieces = [(0, len(nodes))]
    while pieces:
        low, high = pieces.pop()
        run = _longest(marks, low, high)
        if run is None:
            continue
        start, end, period = run
        pieces += [(low, start), (end, high)]
        # The last cut with the fewest values, among equals the one with the most blocks before it.
        first = min(
            range(start, start + period),
            key=lambda at: (crossing[min(at + period, end)], -((end - at) // period), at),
        )
        blocks = [nodes[at : at + period] for at in range(first, end - period + 1, period)]
        found += _equal(blocks)
    return sorted(found, key=lambda r: r.blocks[0][0])


def _longest(marks: Sequence[int], low: int, high: int) -> tuple[int, int, int] | None:
    """Start, end and period of the stretch that saves most."""
    last: dict[int, int] = {}
    gaps: Counter[int] = Counter()
    for at in range(low, high):
        if marks[at] in last:
            gaps[at - last[marks[at]]] += 1
        last[marks[at]] = at
    best, saved = None, SAVED - 1
    for period in sorted(gaps, key=lambda p: -p * gaps[p])[:PERIODS]:
        start = low
        for at in range(low, high - period + 1):
            if at < high - period and marks[at] == marks[at + period]:
                continue
            whole = (at - start) // period * period
            if whole > saved:
                best, saved = (start, at + period, period), whole
            start = at + 1
    return best


def _crossing(nodes: Sequence[fx.Node]) -> list[int]:
    """How many values made before each place are used from there on."""
    place = {n: i for i, n in enumerate(nodes)}
    change = [0] * (len(nodes) + 1)
    for i, node in enumerate(nodes):
        used = [place.get(u, len(nodes)) for u in node.users]
        if used:
            change[i + 1] += 1
            if max(used) < len(nodes):
                change[max(used) + 1] -= 1
    total, out = 0, []
    for step in change:
        total += step
        out.append(total)
    return out


def _equal(blocks: list[list[fx.Node]]) -> list[Repeat]:
    """Those among blocks of equal operators whose operands are used in the same places."""
    groups: dict[Any, list[tuple[list[fx.Node], list[fx.Node]]]] = defaultdict(list)
    for block in blocks:
        inside = {n: i for i, n in enumerate(block)}
        operands: dict[fx.Node, int] = {}
        key = tuple(
            inside[a] if a in inside else ~operands.setdefault(a, len(operands))
            for n in block
            for a in _read((n.args, n.kwargs))
        )
        groups[key].append((block, list(operands)))
    out = []
    for members in groups.values():
        results = sorted(
            {
                i
                for block, _ in members
                for inside in [set(block)]
                for i, n in enumerate(block)
                if not inside.issuperset(n.users)
            }
        )
        repeat = Repeat([b for b, _ in members], [o for _, o in members], results)
        if (len(members) - 1) * len(blocks[0]) >= SAVED and _can_be_called(repeat):
            out.append(repeat)
    return out


def _can_be_called(repeat: Repeat) -> bool:
    """Whether tensors and sizes come in, and nothing but tensors comes out."""
    results = [repeat.blocks[0][i].meta["example_value"] for i in repeat.results]
    operands = [n.meta.get("example_value") for n in repeat.operands[0]]
    return all(isinstance(x, torch.Tensor) for x in results) and all(
        isinstance(x, (torch.Tensor, torch.SymInt)) for x in operands
    )


def _read(args: Any) -> Iterator[fx.Node]:
    """The nodes among arguments, each as often as it is there."""
    if isinstance(args, fx.Node):
        yield args
    elif isinstance(args, (tuple, list)):
        for a in args:
            yield from _read(a)
    elif isinstance(args, dict):
        for a in args.values():
            yield from _read(a)
    elif isinstance(args, slice):
        yield from _read((args.start, args.stop, args.step))


_PLAIN = (int, float, complex, bool, str, type(None), torch.dtype, torch.device, type(Ellipsis))


class _Signatures:
    """Numbers that are equal for nodes that do the same to values of the same kind."""

    def __init__(self, label: Callable[[fx.Node], str]) -> None:
        self.label = label
        self.numbers: dict[Any, int] = {}
        self.kinds: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> int:
        label = self.label(node)

        def plain(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                return "node", self.kind(arg)
            if isinstance(arg, (tuple, list)):
                return (type(arg).__name__, *map(plain, arg))
            if isinstance(arg, dict):
                return tuple((k, plain(v)) for k, v in arg.items())
            if isinstance(arg, slice):
                return "slice", plain(arg.start), plain(arg.stop), plain(arg.step)
            if isinstance(arg, str) and label and arg == label:
                return "label"
            # 1 == True == 1.0, and these are not the same program.
            return (type(arg).__name__, repr(arg)) if isinstance(arg, _PLAIN) else ("is", id(arg))

        key = node.op, node.target, plain(node.args), plain(node.kwargs), self.kind(node)
        return self.numbers.setdefault(key, len(self.numbers))

    def kind(self, node: fx.Node) -> Any:
        if node not in self.kinds:
            self.kinds[node] = self._kind(node.meta.get("example_value", node))
        return self.kinds[node]

    def _kind(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            sizes = tuple(map(as_expr, value.shape)), tuple(map(as_expr, value.stride()))
            return type(value), *sizes, value.dtype, value.device, value.requires_grad
        if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)):
            return type(value), value.node.expr
        if isinstance(value, (tuple, list)):
            return tuple(map(self._kind, value))
        return (type(value), repr(value)) if isinstance(value, _PLAIN) else id(value)
