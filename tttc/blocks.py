"""Blocks that repeat in a model are traced and differentiated once.

::

    captured            outlined, for AOTAutograd       put back, for fusion
    24 equal layers     24 calls of one operator        24 equal layers: the ATen graph
                                                        of one, 24 times
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tttc import _recorder
from tttc.ir.copies import another
from tttc.passes.repeats import Repeat, repeats
from tttc.runtime.blocks import Block, Program
from tttc.runtime.fused_scan_backward import scan_arguments
from tttc.traced_block import layers_of_scans, traced_block

log = logging.getLogger("tttc.capture")


def outline(gm: fx.GraphModule) -> dict[str, Program]:
    """Put one call of ``tttc::block`` in the place of each block that repeats in a captured graph, in place.

    Returns the programs behind these calls, for :func:`put_back`. What AOTAutograd refuses to trace by itself (a
    block that writes into its operands, or returns a view of one) stays as it is.
    """
    programs: dict[str, Program] = {}
    now: dict[fx.Node, fx.Node] = {}  # what stands for the results of blocks that are calls
    for repeat in repeats(gm.graph, _recorder.layer_of):
        count, size = len(repeat.blocks), len(repeat.blocks[0])
        first = [now.get(n, n) for n in repeat.operands[0]]
        try:
            block = traced_block(gm, repeat.blocks[0], first, repeat.results)
        except Exception as error:  # whatever PyTorch raises: traced as a whole, the graph takes it or says it again
            log.info("%d blocks of %d nodes stay as they are: %s", count, size, error)
            continue
        log.info("%d blocks of %d nodes are traced once", count, size)
        for program in (block.forward, block.backward):
            if program is not None:
                programs[program.key] = program
        _replace(gm.graph, block, repeat, now)
    if programs:
        gm.recompile()
    return programs


def _replace(graph: fx.Graph, block: Block, repeat: Repeat, now: dict[fx.Node, fx.Node]) -> None:
    """One call in the place of each block."""

    def run_block(tensors: Any, sizes: Any, labels: Any) -> Any:
        return block(tensors, sizes, labels)

    for number, (nodes, operands) in enumerate(zip(repeat.blocks, repeat.operands, strict=True)):
        given = [now.get(n, n) for n in operands]
        sizes = [n for n in given if isinstance(n.meta["example_value"], torch.SymInt)]
        tensors = [n for n in given if n not in sizes]
        with graph.inserting_after(nodes[-1]):
            at = call = graph.call_function(run_block, (tensors, sizes, _labels(nodes, number)))
        call.meta = {k: v for k, v in nodes[-1].meta.items() if k != "example_value"}
        for i, place in enumerate(repeat.results):
            with graph.inserting_after(at):
                at = graph.call_function(operator.getitem, (call, i))
            at.meta = dict(nodes[place].meta)
            now[nodes[place]] = at
            nodes[place].replace_all_uses_with(at)
        for node in reversed(nodes):
            graph.erase_node(node)


def _labels(nodes: Sequence[fx.Node], number: int) -> str:
    """The layers of the scans among nodes, one a line; and a number, since a block of random numbers is no other's equal."""
    return "\n".join([*layers_of_scans(nodes), str(number)])


def hand_out(joint: fx.GraphModule, programs: dict[str, Program]) -> None:
    """In AOTAutograd's graph of a forward and its backward, what blocks keep for their backwards, tensor by tensor."""
    for call in joint.graph.find_nodes(op="call_function", target=torch.ops.tttc.block.default):
        program = programs[call.args[2]]
        for stands in [u for u in call.users if program.kept and u.args[1] == program.shown]:
            made = []
            with joint.graph.inserting_before(stands):
                for place in range(program.shown, len(program.results)):
                    pick = joint.graph.call_function(operator.getitem, (call, place))
                    pick.meta = {k: v for k, v in stands.meta.items() if k != "tensor_meta"}
                    pick.meta["val"] = program.results[place].meta["val"]
                    made.append(pick)
            for user in list(stands.users):  # the backwards
                tensors: Any = user.args[0]
                given = [x for t in tensors for x in (made if t is stands else [t])]
                user.args = (given, *user.args[1:])
            joint.graph.erase_node(stands)


def put_back(gm: fx.GraphModule, programs: dict[str, Program]) -> None:
    """Put the nodes of their programs in the place of the calls of ``tttc::block`` in an ATen graph, in place.

    Of ``gm`` the graph alone: nobody runs it, and making its code takes long.
    """
    calls = gm.graph.find_nodes(op="call_function", target=torch.ops.tttc.block.default)
    for call in calls:
        tensors, sizes, key, labels = call.args
        program = programs[key]
        told = dict(zip(program.labels, labels.split("\n"), strict=False))
        env: dict[fx.Node, Any] = {}
        given = iter([*sizes, *tensors])
        with gm.graph.inserting_before(call):
            for node in program.graph.nodes:
                if node.op == "placeholder":
                    env[node] = next(given)
                elif node.op != "output":
                    env[node] = another(gm.graph, node, env.__getitem__)
                    _tell(env[node], told)
        for pick in list(call.users):
            pick.replace_all_uses_with(env[program.results[pick.args[1]]])
            gm.graph.erase_node(pick)
        gm.graph.erase_node(call)
    if calls:
        gm.graph.eliminate_dead_code()


def _tell(node: fx.Node, told: dict[str, str]) -> None:
    """Tell a scan which layer it is in."""
    places = scan_arguments(node)
    if places is not None and places["layer"] < len(node.args):
        layer: Any = node.args[places["layer"]]
        node.update_arg(places["layer"], told.get(layer, layer))
