"""The schedule a kernel gets without any measuring: a few rules, from what was measured on an NVIDIA H200.

The measurements are in benchmarks/results; benchmarks/sweep_schedules.py repeats them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from tttc.codegen.loop import Loop, used
from tttc.codegen.schedule import Schedule

from tttc.ir.build import dims_of
from tttc.ir.cost import element_count

THREADS = 32  # of a warp
STATE_REGISTERS = (
    80  # of a thread, at most, where warps can be added: tiles and operands need the others
)
MOST_WARPS = 8  # with 16, matrix products of 64 rows are made more than once


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; those of an H200 where it is no GPU (a kernel is only looked at)."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def state_elements(loop: Loop) -> int:
    """Numbers of the state that one program keeps in registers: those it makes, and those it starts from."""
    wanted = used(loop)
    made = {sink.name for _, sink in loop.sinks if sink.kind == "state"}
    counted = {
        source.name: element_count(dims_of(node), loop.sizes)
        for node, source in loop.sources.items()
        if source.kind == "state" and (source.name in made or node in wanted)
    }
    return sum(counted.values())


def tile_rows(loop: Loop) -> int:
    """Tokens that one turn of the loop handles: of a mini-batch, or of a token that is a tile."""
    if loop.tokens:
        return loop.mini_batch_size
    kept = {
        d for node, source in loop.sources.items() if source.kind != "token" for d in dims_of(node)
    }
    own = [
        loop.sizes[d]
        for node, source in loop.sources.items()
        if source.kind == "token"
        for d in dims_of(node)
        if d not in kept
    ]
    return max(own, default=1)


def default_schedule(loop: Loop, many: bool) -> Schedule:
    """The schedule of a loop; ``many``: there are at least two programs for each multiprocessor."""
    elements = state_elements(loop)
    warps = 2 if many else 4
    while warps < MOST_WARPS and elements > STATE_REGISTERS * THREADS * warps:
        warps *= 2
    if elements <= STATE_REGISTERS * THREADS * warps:
        nan = "branch" if warps == 2 else "product"
        return Schedule(num_warps=warps, order="products_first", repeat_vectors=False, nan=nan)
    # The state takes more registers than are good: whatever else lives shortly, lives shortly.
    common = {"num_warps": warps, "late_loads": True, "repeat_vectors": False, "nan": "branch"}
    if tile_rows(loop) >= 64:
        return Schedule(feature_major=True, num_stages=1, order="least_live", **common)  # type: ignore[arg-type]
    if loop.once:
        return Schedule(num_stages=1, order="least_live", **common)  # type: ignore[arg-type]
    return Schedule(order="products_first", **common)  # type: ignore[arg-type]


def default_backward_schedule(loop: Loop, many: bool) -> Schedule:
    """The schedule of the loop of a VJP, or of one of its stages.

    What is not finite makes the loss so: it is not traced token by token through cotangents.
    """
    return replace(default_schedule(loop, many), nan="ignored")
