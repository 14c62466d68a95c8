"""The schedules of a forward's kernels where the state leaves registers to tiles, without measuring.

From 38 shapes on an H200 (benchmarks/results/2026-11-28-h200-picked.json).
"""

from __future__ import annotations

from dataclasses import replace

from tttc.codegen.crowding import Crowd
from tttc.codegen.loop import Loop
from tttc.codegen.schedule import Schedule
from tttc.codegen.sizes import (
    MOST_WARPS,
    THREADS,
    fits,
    matrix_elements,
    product_features,
    products,
    state_elements,
    tile_elements,
    tile_rows,
    wide_tile,
)
from tttc.codegen.solves import has_solves
from tttc.codegen.staging import TILES, Split

from tttc.ir import ops

MANY_PRODUCTS = 12  # of a turn of a loop: more need the registers of more warps
# Beside a triangular system, in one warp, whose lanes pass on what several warps pass through shared memory, or two of
# numbers of 32 bits, which take three times the products. On an H200 what gated DeltaNet does before its states (B8 H16
# T4096) took 205 us in one warp, 280 in two and 423 in four (benchmarks/results/2026-11-29-h200-solves.json).
FEW_PRODUCTS = 8
SOLVED = 64  # registers of a thread for one tile beside a system, at most: of 128 features it spills 1.8 kB in one warp
UNIT_ROWS = 16  # of a matrix unit's tile
NUMBERS_A_WARP = 256  # of a tile, at least, where warps are free: two tiles of a matrix unit
HELD = 136  # registers of a thread for the state and the tiles that live beside it
# Mini-batches that a program of a parallel kernel handles at most: one that loads nothing ahead, one of few tokens, and
# one that copies many ahead into shared memory.
SHORT, GROUP, LONG = 4, 8, 16
SHARED_ROWS = 64  # from which a product reads its operands from shared memory (wgmma)
ROOM = 40  # registers of a thread for the state, at most, where tokens are copied ahead into shared memory
WIDE_TILE = 32  # registers of a thread for one tile: of larger ones few may wait
MATRIX_REGISTERS = 128  # of a thread, about, that matrices of a parallel kernel may take

ORDER = (
    "order",
    "products of tokens and state come before whatever waits for a sum, so that they run while the long chain of the "
    "state starts",
)
LEAST = ("order", "values are made late and given up early: little is kept on chip")


def is_recurrence(loop: Loop) -> bool:
    """Whether a loop makes states alone, and what other kernels read."""
    return not loop.parallel and not any(sink.kind == "token" for _, sink in loop.sinks)


def turned(loop: Loop) -> bool:
    """Whether products of features have more rows for warps to share than those of tokens."""
    rows = tile_rows(loop)
    return rows >= SHARED_ROWS and product_features(loop) > rows


def _care(loop: Loop, warps: int, hopper: bool) -> tuple[str, tuple[str, str]]:
    """What keeps values that are not finite from tokens that do not see them."""
    if not any(n.target is ops.masked_contraction for n in loop.graph.nodes):
        return "product", ("nan", "no product is causal")
    # Of many tokens elsewhere it was not measured; Triton 3.7 compiles no such loop for sm_100.
    many = (
        hopper
        and tile_rows(loop) >= SHARED_ROWS
        and tile_elements(loop) <= WIDE_TILE * THREADS * warps
    )
    if warps <= 2 or many:
        return "branch", (
            "nan",
            "a branch that is hardly ever taken costs few warps, or many tokens, less than a second product beside each "
            "causal one",
        )
    return "product", ("nan", "a small product beside each causal one costs least")


def _warps(loop: Loop, crowd: Crowd) -> int:
    """Warps that hold a state and its tiles, and more where that leaves the device idle."""
    rows, heavy = tile_rows(loop), products(loop) > MANY_PRODUCTS
    if rows == 1:
        warps = 2 if crowd == Crowd.TWO and not heavy else 4
    elif crowd == Crowd.TWO and not heavy:
        warps = 1
    else:
        padded = wide_tile(loop) * max(UNIT_ROWS // rows, 1)
        warps = 4 if heavy else min(max(padded // NUMBERS_A_WARP, 1), 4)
    while not fits(loop, warps):
        warps *= 2
    held = state_elements(loop) + TILES * max(tile_elements(loop), wide_tile(loop))
    while rows > 1 and warps < MOST_WARPS and held > HELD * THREADS * warps:
        warps *= 2
    return warps


def forward_schedules(loop: Loop, crowd: Crowd, hopper: bool) -> list[Schedule]:
    """Of a loop with a state that leaves registers to tiles, and what runs where that takes too much shared memory.

    ``hopper``: on such a GPU.
    """
    best = _sequential(loop, crowd, hopper)
    if best.num_stages == 1 or tile_rows(loop) < SHARED_ROWS:
        return [best]
    kept = tuple(r for r in best.reasons if r[0] not in ("order", "late_loads", "num_stages"))
    alone = replace(best, num_stages=1, late_loads=True, order="least_live", reasons=(*kept, LEAST))
    return [best, alone]


def _sequential(loop: Loop, crowd: Crowd, hopper: bool) -> Schedule:
    rows, turn = tile_rows(loop), turned(loop)
    warps = MOST_WARPS if turn else _warps(loop, crowd)
    state, tile = (
        -(-x // (THREADS * warps)) for x in (state_elements(loop), max(tile_elements(loop), wide_tile(loop)))
    )  # fmt: skip
    full = "they fill the device" if crowd == Crowd.TWO else "each must be fast alone"
    nan, care = _care(loop, warps, hopper)
    reasons = [
        (
            "num_warps",
            f"{crowd}: {full}; the state takes {state} "
            f"registers of each thread, a tile of tokens up to {tile}, and {products(loop)} products share the others",
        ),
        care,
    ]
    if turn:
        reasons.append(
            ("feature_major", f"features as rows: all {warps} warps have rows of their own")
        )
    if is_recurrence(loop):
        reasons.append(LEAST)
        if rows < SHARED_ROWS:
            reasons.append(
                ("prefetch", "every load is on the way to the next state: it is made a turn before")
            )
            return Schedule(
                num_warps=warps, num_stages=1, prefetch=True, order="least_live", nan=nan,
                reasons=tuple(reasons),
            )  # fmt: skip
        roomy = state <= ROOM
        reasons.append(
            ("num_stages", "products read tokens from shared memory, where they are copied ahead" if roomy
             else "state and operands leave no room for tokens of the next turn")
        )  # fmt: skip
        return Schedule(
            feature_major=turn, num_warps=warps, num_stages=3 if roomy else 1, order="least_live", nan=nan,
            reasons=tuple(reasons),
        )  # fmt: skip
    wide = WIDE_TILE * THREADS * warps
    if hopper and rows >= SHARED_ROWS and tile_elements(loop) <= wide <= wide_tile(loop):
        reasons.append(
            (
                "late_loads",
                "tiles take most registers: tokens are loaded where they are first needed",
            )
        )
        return Schedule(
            feature_major=turn, num_warps=warps, num_stages=2, late_loads=True, nan=nan,
            reasons=tuple(reasons),
        )  # fmt: skip
    pairs = tile_elements(loop) > WIDE_TILE * THREADS * warps  # of tokens, more than features
    return Schedule(
        feature_major=turn, num_warps=warps, order="least_live" if pairs else "products_first", nan=nan,
        reasons=(*reasons, LEAST if pairs else ORDER),
    )  # fmt: skip


def parallel_schedule(loop: Loop, split: Split, halves: bool) -> list[Schedule]:
    """Of a kernel whose mini-batches are independent, and what runs where that takes too much shared memory.

    ``halves``: tokens of 16 bits on a Hopper GPU.
    """
    rows, turn = max(tile_rows(loop), UNIT_ROWS), turned(loop)
    heavy, matrices = products(loop) > MANY_PRODUCTS, matrix_elements(loop)
    solves = has_solves(loop)
    if turn:
        warps = min(product_features(loop) // UNIT_ROWS, MOST_WARPS)
    elif rows >= SHARED_ROWS and not solves:
        warps = min(rows // UNIT_ROWS, MOST_WARPS)
    else:  # matrices come into registers
        warps = min((2 if heavy else 1) * rows // UNIT_ROWS, 4)
        if solves:
            few = 1 if halves and tile_elements(loop) <= SOLVED * THREADS else 2
            warps = 4 if products(loop) > FEW_PRODUCTS else few
        while warps < MOST_WARPS and matrices > MATRIX_REGISTERS * THREADS * warps:
            warps *= 2
    # Matrices that take more leave no room to load ahead, and a program no reason to handle many mini-batches.
    full = matrices > MATRIX_REGISTERS * THREADS * (
        warps if rows >= SHARED_ROWS else MOST_WARPS // 2
    )
    group = split.group(warps, SHORT if full else LONG if rows >= SHARED_ROWS else GROUP)
    nan, care = "branch", (
        "nan", "a branch that is hardly ever taken costs less than a second product beside each causal one",
    )  # fmt: skip
    reasons = [
        ("num_warps", f"{products(loop)} products of {rows} tokens: {warps} warps hold their tiles, many programs run"),
        ("group", f"a program loads parameters once for {group} mini-batches: every multiprocessor still has programs"),
        care,
    ]  # fmt: skip
    if turn:
        reasons.append(
            ("feature_major", f"features as rows: all {warps} warps have rows of their own")
        )
    least = Schedule(
        feature_major=turn, num_warps=warps, num_stages=1, late_loads=True, order="least_live", nan=nan,
        group=group, reasons=(*reasons, LEAST),
    )  # fmt: skip
    if full or (solves and warps == 1):  # one warp has no registers for more than it needs
        return [least]
    late = rows < SHARED_ROWS or tile_elements(loop) > WIDE_TILE * THREADS * warps
    ahead = Schedule(
        feature_major=turn, num_warps=warps, num_stages=2 if late else 3, late_loads=late,
        order="products_first", nan=nan, group=group, reasons=(*reasons, ORDER),
    )  # fmt: skip
    return [ahead, least]
