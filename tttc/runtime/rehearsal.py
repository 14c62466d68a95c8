"""The kernels of a graph compiled beside each other before it first runs.

A graph knows how its tensors will lie in memory. What it launches on tensors like these but without values tells which kernels
there will be, and what of their arguments is compiled in. Where that was guessed wrong, a launch compiles its kernel then.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import triton
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from tttc.codegen.rowwise_launch import Launch
from tttc.ir.region import FusedRegion
from tttc.runtime.fused_scan import fused_scan_launches
from tttc.runtime.fused_scan_backward import fused_scan_backward_launches, scan_arguments
from tttc.runtime.launch import compile_ahead

log = logging.getLogger("tttc.kernels")


def rehearse(gm: fx.GraphModule) -> None:
    """Begin to compile, in other threads, the kernels that a graph launches on a GPU."""
    seen: set[Any] = set()
    with _disable_current_modes(), torch.no_grad():
        for node in gm.graph.nodes:
            try:
                _rehearse(gm, node, seen)
            except Exception as error:  # compiled when it is launched, it says what is wrong
                log.info("%s is not compiled ahead: %s", node, error)


def _rehearse(gm: fx.GraphModule, node: fx.Node, seen: set[Any]) -> None:
    region = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    launch = region.launch if isinstance(region, FusedRegion) else None
    places = scan_arguments(node)
    if not isinstance(launch, Launch) and places is None:
        return
    values = [n.meta["val"] for n in node.all_input_nodes]
    device = next(x.device for x in values if isinstance(x, torch.Tensor))
    if not _is_compiled_for(device):
        return
    arguments: Any = fx.node.map_aggregate(node.args, _without_values)
    named = {places["layer"]} if places is not None else set()  # says nothing about kernels
    telling = tuple(x for i, x in enumerate(arguments) if i not in named)
    key = (node.target, repr(fx.node.map_aggregate(telling, _layout)))
    if key in seen:
        return
    seen.add(key)
    if isinstance(launch, Launch):
        launch.compile_ahead(arguments, device)
        return
    forward = node.target is torch.ops.tttc.fused_scan.default
    launches: Any = fused_scan_launches if forward else fused_scan_backward_launches
    for call in launches(*arguments, device=device):
        compile_ahead(call, device)


def _is_compiled_for(device: torch.device) -> bool:
    """Whether kernels for a device are compiled: the interpreter compiles nothing."""
    return device.type == "cuda" and not triton.knobs.runtime.interpret


def _without_values(x: Any) -> Any:
    """What a graph says of an argument, on no device; sizes that it does not know as those it was made for."""
    if isinstance(x, fx.Node):
        x = x.meta["val"]
    if isinstance(x, torch.SymInt):
        return int(x.node.hint)
    if not isinstance(x, torch.Tensor):
        return x
    shape, strides = ([_without_values(n) for n in ns] for ns in (x.shape, x.stride()))
    offset = _without_values(x.storage_offset())
    held = offset + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    memory = torch.empty(max(held, 0), dtype=x.dtype, device="meta")
    return memory.as_strided(shape, strides, offset)


def _layout(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.dtype, x.shape, x.stride(), x.storage_offset()
    return x
