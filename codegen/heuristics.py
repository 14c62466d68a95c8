"""The schedule a kernel gets without any measuring: a few rules, from what was measured on an NVIDIA H200.

The measurements are in benchmarks/results; benchmarks/sweep_schedules.py repeats them. Each choice comes with the
reason for it (:attr:`Schedule.reasons`), which ``tttc.explain`` shows.
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
    """The schedule of a loop, with its reasons; ``many``: there are at least two programs for each multiprocessor."""
    elements = state_elements(loop)
    warps = 2 if many else 4
    few = (
        "there are at least two programs for each multiprocessor: they fill it, few warps each"
        if many
        else "there are fewer than two programs for each multiprocessor: each must be fast alone"
    )
    while warps < MOST_WARPS and elements > STATE_REGISTERS * THREADS * warps:
        warps *= 2
    fits = elements <= STATE_REGISTERS * THREADS * warps
    taken = -(-elements // (THREADS * warps))
    state = (
        f"the state is {elements} numbers, {taken} registers of each thread; up to {STATE_REGISTERS} leave room "
        "for tiles and operands"
        if fits
        else f"the state is {elements} numbers, {taken} registers of each thread and more than the {STATE_REGISTERS} "
        f"that are good; with more than {MOST_WARPS} warps products of 64 rows would be made more than once"
    )
    reasons = [("num_warps", f"{few}; {state}")]
    products = (
        "order",
        "products of tokens and state come before whatever waits for a sum, so that they run while the long "
        "chain of the state starts",
    )
    vectors = (
        "repeat_vectors",
        "vector states stay vectors: a row for every token takes registers",
    )
    branch = (
        "nan",
        "a branch that is hardly ever taken costs few warps less than a second product beside each causal one",
    )
    if fits:
        nan = "branch" if warps == 2 else "product"
        check = (
            branch if warps == 2 else ("nan", "a small product beside each causal one costs least")
        )
        return Schedule(
            num_warps=warps,
            order="products_first",
            repeat_vectors=False,
            nan=nan,
            reasons=(*reasons, products, vectors, check),
        )
    # The state takes more registers than are good: whatever else lives shortly, lives shortly.
    reasons += [
        (
            "late_loads",
            "the state takes most registers: tokens are loaded where they are first needed",
        ),
        vectors,
        (
            "nan",
            "a second product beside each causal one would take registers that the state needs",
        ),
    ]
    common = {"num_warps": warps, "late_loads": True, "repeat_vectors": False, "nan": "branch"}
    alone = (
        "num_stages",
        "tiles of mini-batches to come would take registers that the state needs",
    )
    least = ("order", "the state takes most registers: values are made late and given up early")
    rows = tile_rows(loop)
    if rows >= 64:
        turned = (
            "feature_major",
            f"tiles have {rows} tokens: with features as rows a product of {warps} warps keeps its operands once",
        )
        reasons += [turned, alone, least]
        return Schedule(
            feature_major=True, num_stages=1, order="least_live", reasons=tuple(reasons), **common
        )  # type: ignore[arg-type]
    if loop.once:
        reasons += [("num_stages", "there is one mini-batch: nothing to load ahead"), least]
        return Schedule(num_stages=1, order="least_live", reasons=tuple(reasons), **common)  # type: ignore[arg-type]
    return Schedule(order="products_first", reasons=(*reasons, products), **common)  # type: ignore[arg-type]


def default_backward_schedule(loop: Loop, many: bool) -> Schedule:
    """The schedule of the loop of a VJP, or of one of its stages.

    What is not finite makes the loss so: it is not traced token by token through cotangents.
    """
    chosen = default_schedule(loop, many)
    ignored = ("nan", "what is not finite makes the loss so: it is not traced through cotangents")
    reasons = (*(r for r in chosen.reasons if r[0] != "nan"), ignored)
    return replace(chosen, nan="ignored", reasons=reasons)
