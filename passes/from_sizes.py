"""Values that follow from sizes alone (positions, tables of angles, masks), made once for each size."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection

from torch import fx
from tttc.passes.merge_equal import repeatable, storages, writes

from tttc.ir.index_maps import VIEWS, numel, shape_of
from tttc.ir.node_values import is_size, value_of
from tttc.ir.nominal import nominal
from tttc.ir.region import outlined
from tttc.ir.remembered import Remembered
from tttc.ir.row_nodes import is_known
from tttc.ir.row_operators import COMPUTE, CONSTANTS, FREE, POINTWISE, RANGES, SLOW
from tttc.ir.structure import Structures

MOST = (
    1 << 20
)  # elements of a value that is worth remembering, with 1024 for every size that is not known
LONGEST = 16  # operations that are made again wherever their result is read


def from_sizes(graph: fx.Graph) -> set[fx.Node]:
    """The tensors of a graph that are the same whenever its sizes are."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or value_of(node) is None or not repeatable(node):
            continue
        # Somebody else's operator may well return something else tomorrow.
        if getattr(node.target, "namespace", None) not in ("aten", "prims"):
            continue
        if all(n in found or is_size(n) for n in node.all_input_nodes):
            found.add(node)
    return found


def is_small(node: fx.Node) -> bool:
    """Whether a tensor is worth remembering."""
    return nominal(numel(shape_of(node.meta["val"]))) <= MOST


def made_anywhere(graph: fx.Graph) -> set[fx.Node]:
    """Those of them that a kernel makes where it reads them: a few additions, say, of a range."""
    lengths: dict[fx.Node, int] = {}
    for node in from_sizes(graph):
        lengths[node] = 0
    for node in graph.nodes:
        if node in lengths:
            lengths[node] = 1 + sum(lengths.get(n, 0) for n in node.all_input_nodes)
            plain = node.target in VIEWS or (node.target in POINTWISE and node.target not in SLOW)
            if node.target in CONSTANTS or node.target in RANGES:
                lengths[node] = 1
            elif not plain:
                lengths[node] = LONGEST + 1
    return {n for n, length in lengths.items() if length <= LONGEST and is_known(n)}


def remember(gm: fx.GraphModule, given_out: Collection[fx.Node], kept: bool = True) -> None:
    """Put the values that follow from sizes alone in the place of the operations that make them, in place.

    ::

        p = arange(T) % 16; a = p[:, None] * w             cos, sin = remembered(T)
        y = x * cos(a) + z * sin(a)                        y = x * cos + z * sin

    What kernels make as they go (a range, a constant) stays as it is, and so does what is larger than it is worth, or
    lies in memory that is given out.

    Args:
        gm: an ATen graph.
        given_out: results of the graph that belong to whoever calls it.
        kept: False to make them anew at each call.
    """
    graph = gm.graph
    alone = from_sizes(graph)
    if not alone or any(writes(n) for n in graph.nodes):
        return
    theirs = {s for n in given_out for s in storages(n)}

    def is_worth(node: fx.Node) -> bool:
        return is_small(node) and theirs.isdisjoint(storages(node))

    reads: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    stack = [n for n in graph.nodes if n not in alone]
    for reader in stack:
        for node in reader.all_input_nodes:
            reads[node].append(reader)
    wanted: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in alone and is_worth(node):
            slow = not is_known(node) or node.target in SLOW
            if slow or not all(map(_fuses, reads[node])):
                wanted.add(node)
                continue
        stack.extend(n for n in node.all_input_nodes if n in alone)
    devices = [n.meta["val"].device for n in wanted]
    if devices:
        device = max(devices, key=lambda d: (d.type == "cuda", devices.count(d)))
        _outline(gm, sorted(n for n in wanted if n.meta["val"].device == device), kept)


def _fuses(node: fx.Node) -> bool:
    return node.target in COMPUTE | FREE and is_known(node)


def _outline(gm: fx.GraphModule, wanted: list[fx.Node], kept: bool) -> None:
    """A call of a graph of their own in the place of nodes; nothing where a size that it takes is made too late."""
    within: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        # Sums and products of sizes come along.
        if node not in within and (not is_size(node) or all(map(is_size, node.all_input_nodes))):
            within.add(node)
            stack.extend(node.all_input_nodes)
    nodes = sorted(n for n in within if n.op == "call_function")
    read = [m for n in nodes for m in n.all_input_nodes if m not in within or m.op == "placeholder"]
    sizes = list(dict.fromkeys(read))
    graph = gm.graph
    last = max([*sizes, *graph.find_nodes(op="placeholder")], default=None)
    if last is not None and any(user < last for n in wanted for user in n.users):
        return
    at = next(iter(graph.nodes)) if last is None else last.next
    region = outlined(gm, nodes, sizes, wanted)
    key = Structures().key(nodes, wanted), tuple(map(sizes.index, read))
    made = Remembered(region, key, wanted[0].meta["val"].device, kept)
    gm.add_submodule("remembered", made)
    with graph.inserting_before(at):
        call = graph.call_module("remembered", tuple(sizes))
        call.meta["val"] = tuple(n.meta["val"] for n in wanted)
        for i, node in enumerate(wanted):
            pick = graph.call_function(operator.getitem, (call, i))
            pick.meta = dict(node.meta)
            node.replace_all_uses_with(pick)
    graph.eliminate_dead_code()
