"""The schedule of a kernel whose warps each hold some features, without measuring; those worth a look beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

from tttc.codegen.feature_layouts import ROWS
from tttc.codegen.feature_loop import feature_renderer
from tttc.codegen.loop import Loop, used
from tttc.codegen.schedule import Schedule
from tttc.codegen.sizes import THREADS, products, state_elements, tile_elements, tile_rows

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
MANY = 4  # warps from which lanes pass sums on through shared memory


def _features(loop: Loop) -> int:
    """The largest dimension of features, all of which rows of tiles are."""
    dims = {d for n in used(loop) for d in dims_of(n) if not is_token(d)}
    return max((loop.sizes[d] for d in dims if d in loop.sizes), default=0)


def _warps(loop: Loop, crowd: int, backward: bool) -> int:
    alone = crowd < 2 and tile_rows(loop) > FEW_TOKENS
    rows = ROWS if backward or alone else ROWS_OF_A_WARP
    warps = max(_features(loop) // rows, 2 if crowd == 0 else 1)
    while state_elements(loop) > STATE * THREADS * warps:
        warps *= 2
    return warps


def _lowerable(loop: Loop, schedule: Schedule) -> bool:
    try:
        feature_renderer(loop, schedule).render()
    except NotLowerable as problem:
        log.info("%s: no kernel of features over warps: %s", loop.name, problem)
        return False
    return True


def feature_schedules(loop: Loop, crowd: int, backward: bool) -> list[Schedule]:
    """Where each warp holds some features of every value; empty where the loop has no such kernel or is better without.

    On an H200 (microseconds, against plain Triton): TTT-Linear with 64 features in two warps takes 262 at B16 T2048 (340)
    and 652 at B8 T8192 (1010), in four 467 and 916; with 128 features in four warps 336 (696) and 945 (1378), in eight
    559 and 1107. Of 32 tokens a program that is alone on its multiprocessor takes 941 in four warps (B4 T16384, plain
    Triton 1388) and 1330 in two, where several share one 356 and 303; values made late and given up early then gain 5
    to 13 %. Sums through shared memory are slower in two warps (704 for 652), faster in four (941 for 1056). Of 64 tokens
    plain Triton is faster (453 for 517). The recurrence of a backward takes 233 in four warps and 410 in two (265), a
    backward in one kernel 1250 (1205).
    """
    many = tile_rows(loop) > MOST_TOKENS or products(loop) > MOST_PRODUCTS
    if loop.parallel or not loop.tokens or many or (backward and crowd > 0):
        return []
    warps = _warps(loop, crowd, backward)
    if tile_elements(loop) > TILE * THREADS * warps:
        return []
    reasons = [
        (
            "renderer",
            "few tokens and a state that few warps hold: each has some features of every value, so that products follow "
            "each other in registers",
        ),
        ("num_stages", "tokens are copied three mini-batches ahead: memory takes longer than one"),
    ]  # fmt: skip
    few = warps >= MANY and not backward
    order = "least_live" if tile_rows(loop) > FEW_TOKENS else "products_first"
    if few:
        reasons.append(
            ("few_shuffles", "many warps wait for the unit that passes numbers from lane to lane")
        )
    if not backward:
        reasons.append(
            ("nan", "where the state is not finite at the end, everything is computed once more with care")
        )  # fmt: skip
    if crowd == 0 and not backward:
        reasons.append(
            ("segments", "some multiprocessors have no program: states come first, then segments beside each other")
        )  # fmt: skip
    schedule = Schedule(
        num_warps=warps, num_stages=4, feature_major=True, renderer="features", few_shuffles=few,
        order="on_demand" if backward else order, nan="ignored" if backward else "again",
        segments=not backward, repeat_vectors=False, reasons=tuple(reasons),
    )  # fmt: skip
    return [schedule] if _lowerable(loop, schedule) else []


def feature_candidates(loop: Loop, first: Schedule) -> Iterator[Schedule]:
    """Schedules of such kernels that differ from one in one choice."""
    made = [
        *(replace(first, num_warps=n) for n in (first.num_warps // 2, 2 * first.num_warps) if n),
        *(replace(first, order=x) for x in ("products_first", "on_demand", "least_live")),
        replace(first, num_stages=3),
        replace(first, few_shuffles=not first.few_shuffles),
    ]
    return (x for x in made if x != first and _lowerable(loop, x))
