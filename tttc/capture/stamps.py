"""What newer versions of PyTorch do for regions, for 2.11: what was traced of one block is stamped out for others.

There TorchDynamo traces a region (``nested_compile_region``) each time it is called, 0.24 s for a layer of a language model,
and then finds that it has had the same graph before. Here a block that is like one traced before, and is given a tensor
like that one was, becomes a call of that graph on its own parameters, with the guards of the first
(:func:`tttc.capture.same_blocks.guarded`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.variables import TensorVariable, UserFunctionVariable
from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew
from torch._dynamo.variables.builder import VariableBuilder
from torch._guards import Source
from torch._subclasses.fake_tensor import FakeTensor

from tttc.capture.same_blocks import Pairs, alike, by_another_name, guarded, is_from, mover

hops: Any = importlib.import_module("torch._dynamo.variables.higher_order_ops")
WORK = torch.__version__.startswith("2.11.")  # on whose inside this depends
_original: Any = hops.InvokeSubgraphHigherOrderVariable._call_function if WORK else None
_run: Any = None  # what calls blocks, while stamps are wanted


def switch(on: bool, run: Callable[..., Any]) -> None:
    """Stamp blocks that ``run(block, x)`` calls, or leave PyTorch as it was."""
    global _run
    if not WORK:
        return
    _run = run if on else None
    hops.InvokeSubgraphHigherOrderVariable._call_function = _call if on else _original


@dataclass
class _Traced:
    """What was traced of a block.

    Attributes:
        body: the name of its graph.
        block: where it comes from.
        given: its argument, without values.
        state: what else may decide what is traced.
        operands: of the call: "x" for the argument, where a tensor of the block comes from, or a node that every call has.
        results: of the graph, without values; the last is the block's.
    """

    body: str
    block: Source
    given: torch.Tensor
    state: Any
    operands: list[str | Source | fx.Node]
    results: tuple[torch.Tensor, ...]


def _call(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    """In the place of PyTorch's: stamps a block, or has it traced, and remembers that."""
    function = args[0]
    if not isinstance(function, UserFunctionVariable) or function.get_function() is not _run:
        return _original(self, tx, args, kwargs)
    block, x = (a.realize() for a in args[1:3])
    made_here = isinstance(x, TensorVariable) and x.source is None  # and no weight of a block
    inside = tx.output.current_tracer.parent is not None  # of another region, or a checkpoint
    if kwargs or block.source is None or not made_here or inside or touched(tx):
        return _original(self, tx, args, kwargs)
    known: list[_Traced] = vars(tx.output).setdefault("tttc_stamps", [])
    for traced in known:
        made = _stamped(tx, traced, block.source, x)
        if made is not None:
            return made
    result = _original(self, tx, args, kwargs)
    if not touched(tx):
        new = _traced(tx, block.source, x, result)
        known += [] if new is None else [new]
    return result


def touched(tx: Any) -> bool:
    """Whether something that was there before has been written to: what is looked up may be of then or of now."""
    effects, new = tx.output.side_effects, (AttributeMutationNew, ValueMutationNew)
    return any(
        not isinstance(v.mutation_type, new) and effects.is_modified(v)
        for v in effects.id_to_variable.values()
        if v.mutation_type is not None
    )


def _traced(tx: Any, block: Source, x: Any, result: Any) -> _Traced | None:
    """What to remember of a block that was traced; None where another call can't be made of it."""
    node: Any = result.as_proxy().node if isinstance(result, TensorVariable) else None
    call: Any = node.args[0] if node is not None and len(node.args) == 2 else None
    if getattr(call, "target", None) is not torch._higher_order_ops.invoke_subgraph:
        return None
    if any(_holds_tensors(inner) for inner in tx.output.nn_modules[call.args[1]].modules()):
        return None  # weights that are no operands
    operands: list[str | Source | fx.Node] = []
    for operand in call.args[2:]:
        argument = operand.meta.get("grapharg")
        source = None if argument is None else argument.source
        if operand is x.as_proxy().node:
            operands.append("x")
        elif source is not None and is_from(source, block):
            operands.append(source)
        else:
            operands.append(operand)
    # After what the block returns comes what else was made in it, which nobody outside reads.
    results = tuple(call.meta["example_value"][: node.args[1] + 1])
    if not all(type(y) is FakeTensor for y in results):
        return None
    return _Traced(call.args[1], block, _example(x), _state(), operands, results)


def _holds_tensors(graph: Any) -> bool:
    """Whether a graph reads tensors that are its own."""
    nodes = graph.graph.find_nodes(op="get_attr") if isinstance(graph, fx.GraphModule) else ()
    return any(isinstance(attrgetter(n.target)(graph), torch.Tensor) for n in nodes)


def _example(x: Any) -> torch.Tensor:
    found: torch.Tensor = x.as_proxy().node.meta["example_value"]
    return found


def _state() -> Any:
    here = torch.accelerator.current_accelerator()
    devices = {"cpu", "cuda"} | (set() if here is None else {here.type})
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in sorted(devices)],
    )


def _kind(x: torch.Tensor) -> Any:
    """What is traced may depend on; sizes by what they stand for, so that none is guarded on."""
    sizes = [n.node.expr if isinstance(n, torch.SymInt) else n for n in (*x.shape, *x.stride())]
    plain = (type(x), x.dtype, x.device, x.layout)
    return sizes, plain, x.requires_grad, x.is_leaf, x.is_inference()


def _stamped(tx: Any, traced: _Traced, block: Source, x: Any) -> Any:
    """A call of what was traced, for another block; None where that is not the same program."""
    if _kind(_example(x)) != _kind(traced.given) or _state() != traced.state:
        return None
    roots = {"L": tx.output.root_tx.f_locals, "G": tx.output.root_tx.f_globals}
    found: dict[Source, Any] = {}

    def value(source: Source) -> Any:
        return source.get_value(roots, {}, found)

    same = Pairs()
    if not isinstance(value(block), nn.Module):
        return None
    if not alike(value(traced.block), value(block), same):
        return None
    nodes = [o for o in traced.operands if isinstance(o, fx.Node)]
    elsewhere = [n.meta["grapharg"].source for n in nodes if "grapharg" in n.meta]
    if by_another_name(tx, elsewhere, traced.block, same, value):
        return None
    changed = [] if block == traced.block else [(traced.block, block)]
    of_block: set[Source | None] = {
        source for source in traced.operands if isinstance(source, Source)
    }
    if not guarded(tx, traced, changed, of_block, value):
        return None
    move, operands = mover(traced.block, block), []
    for operand in traced.operands:
        if isinstance(operand, fx.Node):
            operands.append(fx.Proxy(operand, tx.output.current_tracer))
        elif isinstance(operand, Source):
            source = move(operand)
            operands.append(VariableBuilder(tx, source)(value(source)).as_proxy())
        else:
            operands.append(x.as_proxy())
    with tx.fake_mode:
        results = tuple(y.clone() for y in traced.results)
    if list(map(_kind, results)) != list(map(_kind, traced.results)):
        return None
    arguments = (hops.make_attr(tx, traced.body), traced.body, *operands)
    made = hops.add_call_function(
        tx, torch._higher_order_ops.invoke_subgraph, arguments, {}, results
    )
    return made.items[-1]
