"""Fused graphs as source text: a graph that only has to run needs no nodes."""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.fx import graph_module

from tttc.codegen.rowwise_launch import Launch, shared_kernel
from tttc.ir.region import FusedRegion
from tttc.ir.remembered import Remembered
from tttc.runtime.fused_scan_backward import scan_arguments
from tttc.warm.recording import NotKept, current


@dataclass
class Source:
    """A graph as it is written.

    Attributes:
        text: a function ``forward``.
        names: its globals.
        regions: graphs that it calls, each with its kernel (name, source, launch options, place of the first tensor).
        remembered: graphs of sizes alone that it calls, each with where its tensors lie and whether they are kept.
        steps: the keys of scans in it, with their mini-batch sizes and devices.
    """

    text: str
    names: dict[str, Any]
    regions: dict[str, tuple[Source, tuple[Any, ...] | None]]
    remembered: dict[str, tuple[Source, torch.device, bool]]
    steps: dict[str, set[tuple[int, torch.device]]]


# Of the operators in a captured graph those whose meaning is a version's of PyTorch, or this package's.
_OURS = ("aten", "prims", "prim", "tttc")


def keep_captured(gm: fx.GraphModule) -> None:
    """Look at a graph as TorchDynamo captured it: what it calls has to be the same in every process."""
    recording = current()
    if recording is None:
        return
    recording.captured += 1
    for inner in gm.modules():
        for node in inner.graph.nodes if isinstance(inner, fx.GraphModule) else ():
            if node.op == "get_attr" or (node.op == "call_function" and not _is_known(node.target)):
                recording.refuse(f"it calls {node.target}")
    if any(True for _ in gm.parameters()) or any(True for _ in gm.buffers()):
        recording.refuse("its graph holds tensors")


def _is_known(target: Any) -> bool:
    """Whether a function is PyTorch's or Python's, and not somebody's that may change."""
    if isinstance(target, torch._ops.HigherOrderOperator):
        return False
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(target).partition(".")[0] in _OURS
    module = getattr(target, "__module__", None)
    if module is None:  # PyTorch's own builtins say no module
        return getattr(torch, target.__name__, None) == target
    return module.partition(".")[0] in ("torch", "_operator", "builtins", "math")


def keep_graph(direction: str, gm: fx.GraphModule) -> None:
    """Record a fused graph, where its frame is recorded."""
    recording = current()
    if recording is not None:
        with recording.kept():
            recording.graphs[direction] = written(gm)


def written(gm: fx.GraphModule) -> Source:
    """A graph after fusion and :func:`tttc.codegen.rowwise_launch.lower_regions`, as text.

    Raises:
        NotKept: where it holds tensors, or something that is no region.
    """
    regions: dict[str, tuple[Source, tuple[Any, ...] | None]] = {}
    remembered: dict[str, tuple[Source, torch.device, bool]] = {}
    steps: dict[str, set[tuple[int, torch.device]]] = {}
    for node in gm.graph.nodes:
        places = scan_arguments(node)
        if node.op == "get_attr":
            raise NotKept("a graph holds a tensor")
        called = gm.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(called, Remembered):
            inner = written(called.graph_module)
            remembered[node.target] = inner, called.device, called.kept
        elif called is not None and node.target not in regions:
            regions[node.target] = _written_region(called)
        elif places is not None:
            key, size = (node.args[places[x]] for x in ("key", "mini_batch_size"))
            steps.setdefault(key, set()).add((size, node.meta["val"][0].device))
    code = gm.graph.python_code("self")
    return Source(code.src, dict(code.globals), regions, remembered, steps)


def _written_region(region: nn.Module) -> tuple[Source, tuple[Any, ...] | None]:
    if not isinstance(region, FusedRegion):
        raise NotKept(f"a graph calls a {type(region).__name__}")
    launch = region.launch
    kernel = None
    if isinstance(launch, Launch):
        made = launch.kernel
        kernel = (made.name, made.source, dict(made.config), launch.first_tensor)
    return written(region.graph_module), kernel


def read(source: Source, steps: dict[str, str]) -> Callable[..., Any]:
    """The graph as a function.

    Args:
        steps: the keys that scans have in this process.
    """

    def renewed(found: re.Match[str]) -> str:
        return repr(steps[found[0][1:-1]])

    keys = "|".join(re.escape(repr(key)) for key in source.steps)
    text = re.sub(keys, renewed, source.text) if keys else source.text
    names = dict(source.names)
    graph_module._exec_with_source(text, names)
    graph = nn.Module()
    for name, (inner, kernel) in source.regions.items():
        region = FusedRegion(read(inner, steps), sympy.Integer(0), sympy.Integer(0))  # type: ignore[arg-type]
        if kernel is not None:
            region.launch = Launch(shared_kernel(*kernel[:3]), kernel[3])
        graph.add_module(name, region)
    for name, (inner, device, kept) in source.remembered.items():
        made = Remembered(read(inner, steps), inner.text, device, kept)
        graph.add_module(name, made)
    return types.MethodType(names["forward"], graph)
