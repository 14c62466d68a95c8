"""The schedule of a kernel whose warps each hold some features, without measuring; those worth a look beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

from tttc.codegen.crowding import Crowd
from tttc.codegen.devices import H100
from tttc.codegen.feature_layouts import ROWS
from tttc.codegen.feature_loop import FeatureRenderer, feature_renderer
from tttc.codegen.forward_rules import is_recurrence
from tttc.codegen.loop import Loop, used
from tttc.codegen.schedule import Schedule
from tttc.codegen.sizes import (
    MOST_WARPS,
    THREADS,
    products,
    state_elements,
    tile_elements,
    tile_rows,
)

from tttc.ir.body import is_token
from tttc.ir.build import dims_of
from tttc.ir.errors import NotLowerable

log = logging.getLogger("tttc.schedule")

ROWS_OF_A_WARP = 32  # features, of a forward
FEW_TOKENS = 16  # of a mini-batch: with more, a program that is alone is better off with more warps
MOST_TOKENS = 32
MOST_PRODUCTS = 12  # of a turn of a loop: values of more of them do not fit beside the state
STATE = 160  # registers of a thread for the state, at most
TILE = 32  # registers of a thread for one tile of tokens, at most: several live at a time
MANY_WARPS = 4  # warps from which lanes pass on half of what they add up
REGISTERS = 256  # of a thread for the state and matrices, of a backward in one kernel, at most: few of them are spilled
FORWARD_REGISTERS = 300  # of other kernels: 128 features in four warps are fast with 297, of 32 tokens they have 321 and spill 8 kB
FULL_WARPS = 8  # whose registers a multiprocessor has, where each thread takes as many as it may
DEPTHS = (4, 3)  # mini-batches under way or read, the best first
RESERVED = 1024  # bytes of shared memory that each program takes beside its own


def _features(loop: Loop) -> int:
    """The largest dimension of features, all of which rows of tiles are."""
    dims = {d for n in used(loop) for d in dims_of(n) if not is_token(d)}
    return max((loop.sizes[d] for d in dims if d in loop.sizes), default=0)


def _warps(loop: Loop, crowd: Crowd, backward: bool) -> int:
    alone = crowd < Crowd.TWO and tile_rows(loop) > FEW_TOKENS
    rows = ROWS if backward or alone else ROWS_OF_A_WARP
    warps = max(_features(loop) // rows, 2 if crowd < Crowd.ONE else 1)
    while state_elements(loop) > STATE * THREADS * warps:
        warps *= 2
    return warps


def _laid_out(loop: Loop, schedule: Schedule) -> FeatureRenderer | None:
    """What renders the kernel, and knows what it takes; None where the loop has no such kernel."""
    try:
        renderer = feature_renderer(loop, schedule)
        renderer.lay_out()
    except NotLowerable as problem:
        log.info("%s: no kernel of features over warps: %s", loop.name, problem)
        return None
    return renderer


def _fitting(loop: Loop, schedule: Schedule, programs: int, registers: int) -> list[Schedule]:
    """The schedule with as many mini-batches under way as shared memory has rooms for; empty where it does not fit.

    ``programs``: that share a multiprocessor. ``registers``: of a thread, at most, where it may take all there are.
    """
    registers = registers * FULL_WARPS // max(schedule.num_warps, FULL_WARPS)
    for depth in DEPTHS:
        ahead = f"tokens are copied {depth - 1} mini-batches ahead: memory takes longer than one"
        reasons = (*schedule.reasons, ("num_stages", ahead))
        deep = replace(schedule, num_stages=depth, reasons=reasons)
        laid_out = _laid_out(loop, deep)
        if laid_out is None or laid_out.registers > registers:
            return []
        if (
            programs * (laid_out.shared_memory + RESERVED) <= H100.shared
        ):  # as every device of Gluon kernels has
            return [deep]
    return []


def feature_schedules(loop: Loop, crowd: Crowd, backward: bool) -> list[Schedule]:
    """Where each warp holds some features of every value; empty where the loop has no such kernel or is better without.

    On an H200 (benchmarks/results/2026-11-28-h200-features.json for backwards and shuffles; microseconds, against plain
    Triton): TTT-Linear with 64 features in two warps takes 262 at B16 T2048 (340)
    and 652 at B8 T8192 (1010), in four 467 and 916; with 128 features in four warps 336 (696) and 945 (1378), in eight
    559 and 1107. Of 32 tokens a program that is alone on its multiprocessor takes 934 in four warps (B4 T16384, plain
    Triton 1388) and 1330 in two, where several share one 356 and 303; values made late and given up early then gain 5
    to 13 %. Fewer shuffles are slower in two warps (822 for 734, B8 T8192), faster in four (934 for
    1021 of 32 tokens) and, at one shape that was timed, for 32
    tokens in two (471 for 540, B16 T2048), which rules leave to a search.
    Of 64 tokens plain Triton is faster (453 for 517).

    Forward and backward of TTT-Linear take 1261 with the backward in one such kernel (plain Triton 1549, B16 T2048), with
    128 features and half as many heads 2541 (3079), with 32 features 750 (1447); of 32 tokens and 32 features 741 (1058),
    but 2589 (2010) with 64 features: what does not fit is spilled. Where the device is not full the kernel takes as long
    with any number of programs and three kernels take longer with each: 1955 and 1995 at 64 programs, 1953 and 2623 at
    128 (T8192). Values made late are 1 to 4 % faster than other orders, in one kernel or three.
    """
    at_once = not backward or is_recurrence(loop)
    many = tile_rows(loop) > MOST_TOKENS or (at_once and products(loop) > MOST_PRODUCTS)
    if loop.parallel or not loop.tokens or many:
        return []
    warps = _warps(loop, crowd, backward)
    if tile_elements(loop) > TILE * THREADS * warps:
        return []
    if not at_once:
        programs = max(FULL_WARPS // warps, 1) if crowd == Crowd.TWO else 1
        return _fitting(loop, _schedule(loop, warps, crowd, backward), programs, REGISTERS)
    for n in (warps, 2 * warps) if 2 * warps <= MOST_WARPS else (warps,):
        # One program: with as many under way as fit beside others they were not timed.
        if found := _fitting(loop, _schedule(loop, n, crowd, backward), 1, FORWARD_REGISTERS):
            return found
    return []


def _schedule(loop: Loop, warps: int, crowd: Crowd, backward: bool) -> Schedule:
    """The schedule of so many warps, but for how many mini-batches are under way."""
    reasons = [
        (
            "renderer",
            "few tokens and a state that few warps hold: each has some features of every value, so that products follow "
            "each other in registers",
        )
    ]  # fmt: skip
    tall = tile_rows(loop) > FEW_TOKENS
    few = warps >= MANY_WARPS or backward
    if few:
        reasons.append(
            ("few_shuffles", "many sums: warps wait for the unit that passes numbers from lane to lane")
        )  # fmt: skip
    if not backward:
        reasons.append(
            ("nan", "where the state is not finite at the end, everything is computed once more with care")
        )  # fmt: skip
    if crowd < Crowd.ONE and not backward:
        reasons.append(
            ("segments", "some multiprocessors have no program: states come first, then segments beside each other")
        )  # fmt: skip
    return Schedule(
        num_warps=warps, feature_major=True, renderer="features", few_shuffles=few,
        order="least_live" if backward or tall else "products_first", nan="ignored" if backward else "again",
        segments=not backward, repeat_vectors=False, reasons=tuple(reasons),
    )  # fmt: skip


def feature_candidates(loop: Loop, first: Schedule) -> Iterator[Schedule]:
    """Schedules of such kernels that differ from one in one choice."""
    made = [
        *(replace(first, num_warps=n) for n in (first.num_warps // 2, 2 * first.num_warps) if n),
        *(replace(first, order=x) for x in ("products_first", "on_demand", "least_live")),
        replace(first, num_stages=3),
        replace(first, few_shuffles=not first.few_shuffles),
    ]
    return (x for x in made if x != first and _laid_out(loop, x) is not None)
