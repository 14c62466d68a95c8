"""A block of a captured graph through AOTAutograd, by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from functorch.compile import make_boxed_func
from torch import fx, nn
from torch._functorch.aot_autograd import OutputType
from torch._guards import TracingContext, detect_fake_mode, tracing

from tttc import _recorder
from tttc.aot import cut, through_autograd
from tttc.ir.index_maps import as_expr, shape_of
from tttc.ir.row_operators import FREE
from tttc.passes.decompositions import decompositions
from tttc.runtime.blocks import Block, Program


def traced_block(
    gm: fx.GraphModule, nodes: list[fx.Node], operands: list[fx.Node], results: list[int]
) -> Block:
    """A block traced, differentiated, and cut into forward and backward as the model would be.

    Args:
        gm: the captured graph.
        nodes: those of the block, in order.
        operands: what they read from outside.
        results: places in ``nodes`` of what is read from them outside.

    Raises:
        Exception: whatever AOTAutograd says of a block that can't stand by itself.
    """
    values = [n.meta["example_value"] for n in operands]
    forward, backward = _through_autograd(_module(gm, nodes, operands, results), values)
    block = _Cut(forward, backward, len(results), layers_of_scans(nodes)).block
    if backward is not None:
        block.differentiable = [_needs_gradient(nodes[i].meta["example_value"]) for i in results]
        if sum(block.differentiable) != len(block.gradients):
            raise NotImplementedError("gradients are asked for of other results than need them")
    return block


def _through_autograd(
    module: fx.GraphModule, values: list[Any]
) -> tuple[fx.Graph, fx.Graph | None]:
    """The graphs that AOTAutograd makes of a module, as it makes those of a model; no backward where none is needed."""
    graphs: list[fx.Graph] = []

    def partition(joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        parts = cut(joint, inputs, **options)
        graphs.extend(part.graph for part in parts)
        return parts

    def compiler(gm: fx.GraphModule, inputs: Any) -> Any:
        if not graphs:
            graphs.append(gm.graph)
        _check_stands_alone(TracingContext.get().fw_metadata)
        return make_boxed_func(gm.forward)

    # A context of its own: what AOTAutograd finds out about a block is not about the model.
    with tracing(TracingContext(detect_fake_mode(values))):
        through_autograd(
            module,
            [_leaf(v) for v in values],
            fw_compiler=compiler,
            bw_compiler=lambda gm, inputs: make_boxed_func(gm.forward),
            decompositions=decompositions(),
            partition_fn=partition,
        )
    forward, *backward = graphs
    return forward, backward[0] if backward else None


def _check_stands_alone(metadata: Any) -> None:
    """Raise where AOTAutograd does more around a graph than to call it."""
    if any(x.mutates_data or x.mutates_metadata for x in metadata.input_info):
        raise NotImplementedError("it writes into what it is given")
    if any(x.output_type is not OutputType.non_alias for x in metadata.output_info):
        raise NotImplementedError("it returns a view")
    if metadata.tokens:
        raise NotImplementedError("it has effects")


def layers_of_scans(nodes: Sequence[fx.Node]) -> list[str]:
    """The names of the layers of the scans among nodes."""
    return [_recorder.layer_of(n) for n in nodes if n.target is torch.ops.tttc.fused_scan.default]


def _module(
    gm: fx.GraphModule, nodes: list[fx.Node], operands: list[fx.Node], results: list[int]
) -> fx.GraphModule:
    """A block as a module that takes its operands."""
    graph = fx.Graph()
    env = {n: graph.placeholder(n.name) for n in operands}
    for n in operands:
        env[n].meta = dict(n.meta)
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[nodes[i]] for i in results))
    return fx.GraphModule(gm, graph)


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _leaf(value: Any) -> Any:
    """An argument as AOTAutograd sees those of a model: nothing it was computed from."""
    if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter):
        return value
    with torch.no_grad():
        return value.detach().requires_grad_(value.requires_grad)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.SymInt)


class _Cut:
    """The graphs of AOTAutograd's partition as programs.

    The forward returns each tensor once and none that it was given; sizes that it would save are made again, and
    what costs nothing to make of the arguments (a transposed weight): each tensor of each block takes time to trace.
    """

    def __init__(
        self, forward: fx.Graph, backward: fx.Graph | None, results: int, labels: list[str]
    ) -> None:
        self.forward = forward
        placeholders = forward.find_nodes(op="placeholder")
        self.sizes = [n for n in placeholders if _is_size(n)]
        self.tensors = [n for n in placeholders if not _is_size(n)]
        outputs: Any = forward.output_node().args[0]
        saved = [n for n in outputs[results:] if not _is_size(n) and not self._is_free(n)]
        made = outputs[:results]
        self.kept = list(dict.fromkeys(n for n in saved if n not in made))
        self.made = [*made, *self.kept]
        graph = fx.Graph()
        env = _placeholders(graph, [*self.sizes, *self.tensors])
        self.block = Block(_program(forward, graph, env, self.made, labels, len(self.kept)))
        if backward is not None:
            self._cut_backward(backward, labels)

    def _is_free(self, node: fx.Node) -> bool:
        """Whether a tensor is an argument, or views and constants alone make it of arguments."""
        if node in self.tensors or _is_size(node):
            return True
        return node.target in FREE and all(self._is_free(x) for x in node.all_input_nodes)

    def _read(self, node: fx.Node) -> list[fx.Node]:
        """The tensors to keep for a saved one."""
        if node in self.made or node in self.tensors:
            return [node]
        return [t for x in node.all_input_nodes if not _is_size(x) for t in self._read(x)]

    def _cut_backward(self, backward: fx.Graph, labels: list[str]) -> None:
        block = self.block
        named = {n.name: n for n in self.forward.nodes}
        placeholders = backward.find_nodes(op="placeholder")
        tangents = [n for n in placeholders if n.name.startswith("tangents")]
        block.gradients = [n.meta["val"] for n in tangents]
        saved = {n: named[n.name] for n in placeholders if n not in tangents}
        tensors = [n for n in saved.values() if not _is_size(n)]
        read = dict.fromkeys(t for n in tensors for t in self._read(n))
        others = [n for n in read if n not in self.kept]
        block.saved = [
            (True, self.tensors.index(n)) if n in self.tensors else (False, self.made.index(n))
            for n in others
        ]
        given = [*others, *self.kept, *tangents]
        graph = fx.Graph()
        env = _placeholders(graph, [*self.sizes, *given])
        known = {n: env[n] for n in given}

        def again(node: fx.Node) -> fx.Node:
            if node in env:
                return env[node]
            if node.target is torch.ops.aten.sym_size.int:
                env[node] = _size_of_some(graph, known, as_expr(node))
            elif _is_size(node) or node.target in FREE:
                env[node] = graph.node_copy(node, again)
            else:
                raise NotImplementedError(f"a size that is saved is computed from {node.target}")
            return env[node]

        env |= {n: again(of) for n, of in saved.items()}
        outputs: Any = backward.output_node().args[0]
        of_tensors = [
            g
            for g, n in zip(outputs, self.forward.find_nodes(op="placeholder"), strict=True)
            if not _is_size(n)
        ]
        block.wanted = [g is not None for g in of_tensors]
        made = [g for g in of_tensors if g is not None]
        block.backward = _program(backward, graph, env, made, labels)


def _size_of_some(graph: fx.Graph, tensors: dict[fx.Node, fx.Node], size: sympy.Expr) -> fx.Node:
    """A size, from a tensor that has it."""
    for node, at in tensors.items():
        for d, n in enumerate(shape_of(node.meta["val"])):
            if n == size:
                made = graph.call_function(torch.ops.aten.sym_size.int, (at, d))
                made.meta["val"] = node.meta["val"].shape[d]
                return made
    raise NotImplementedError(f"no tensor that is saved has the size {size}")


def _placeholders(graph: fx.Graph, nodes: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    env = {}
    for node in nodes:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    return env


def _program(
    source: fx.Graph,
    graph: fx.Graph,
    env: dict[fx.Node, fx.Node],
    results: Sequence[fx.Node],
    labels: list[str],
    kept: int = 0,
) -> Program:
    """The operations of ``source`` that lead to results, in ``graph``, which has the placeholders."""
    for node in source.nodes:
        if node.op == "get_attr":
            raise NotImplementedError("it holds a constant tensor")
        if node.op == "call_function":
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[n] for n in results))
    graph.eliminate_dead_code()
    return Program(graph, labels, kept)
