"""What waits on chip for a reader after another matrix product, and what is computed again there.

Between two products a kernel has registers for a few large values only. One that is read again later is kept in
shared memory, or computed again from others that are: a minimum cut decides, by what storing and reading takes against
what computing does.

Source: rematerialisation as a minimum cut, as in the min-cut partitioner of AOTAutograd (PyTorch).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import networkx
from torch import fx

from tttc.ir import ops

KEPT = 1.0  # storing a value and reading it again
THERE = 0.1  # reading what is in shared memory anyway
SIMPLE = 0.25  # computing a sum or a product of two values
FUNCTION = 1.5  # computing anything else
SIMPLE_FUNCTIONS = ("add", "sub", "mul", "neg")


def kept_and_repeated(
    sequence: Sequence[fx.Node],
    is_product: Callable[[fx.Node], bool],
    is_large: Callable[[fx.Node], bool],
    is_there: Callable[[fx.Node], bool],
) -> tuple[set[fx.Node], set[fx.Node]]:
    """The values that are kept in shared memory, and those that are computed again where they are read.

    Args:
        sequence: the operators in the order in which they are computed.
        is_product: whether an operator makes a matrix product; no register holds a large value across it.
        is_large: whether a value is too large for that.
        is_there: whether a large value is in shared memory anyway.
    """
    segment: dict[fx.Node, int] = {}
    now = 0
    for node in sequence:
        now += is_product(node)
        segment[node] = now
    graph = networkx.DiGraph()
    late: set[fx.Node] = set()
    for node in sequence:
        for x in node.all_input_nodes:
            # What a product makes is there after it; its operands are read before it.
            if is_large(x) and not is_product(node) and segment.get(x, -1) < segment[node]:
                late.add(x)
    seen: set[fx.Node] = set()
    stack = [x for x in late]
    for x in late:
        graph.add_edge((x, 1), "wanted")
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        graph.add_edge((node, 0), (node, 1), capacity=THERE if is_there(node) else KEPT)
        if node.target is not ops.elementwise or is_product(node) or node not in segment:
            graph.add_edge("there", (node, 0))
            continue
        simple = node.args[0] in SIMPLE_FUNCTIONS
        graph.add_edge("there", (node, 0), capacity=SIMPLE if simple else FUNCTION)
        for x in node.all_input_nodes:
            if is_large(x):
                graph.add_edge((x, 1), (node, 0))
                stack.append(x)
    if not late:
        return set(), set()
    _, (near, _) = networkx.minimum_cut(graph, "there", "wanted")
    kept = {n for n in seen if (n, 0) in near and (n, 1) not in near}
    needed: set[fx.Node] = set()
    stack = [x for x in late]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            if node not in kept:
                stack += [x for x in node.all_input_nodes if is_large(x)]
    return needed & kept, needed - kept
