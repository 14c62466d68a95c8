"""The schedule a kernel gets without any measuring: a few rules, from what was measured on an NVIDIA H200.

The measurements are in benchmarks/results; benchmarks/sweep_schedules.py repeats them. Each choice comes with the
reason for it (:attr:`Schedule.reasons`), which ``tttc.explain`` shows.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from tttc.codegen.crowding import Crowd
from tttc.codegen.feature_layouts import ROWS
from tttc.codegen.feature_rules import feature_schedules
from tttc.codegen.forward_rules import (
    FEW_PRODUCTS,
    MANY_PRODUCTS,
    MATRIX_REGISTERS,
    forward_schedules,
    is_recurrence,
    parallel_schedule,
)
from tttc.codegen.gluon_loop import gluon_renderer
from tttc.codegen.loop import Loop
from tttc.codegen.pieces import divided
from tttc.codegen.schedule import Schedule
from tttc.codegen.sizes import (
    MOST_WARPS,
    STATE_REGISTERS,
    THREADS,
    fits,
    matrix_elements,
    product_features,
    products,
    state_elements,
    tile_elements,
    tile_rows,
    value_elements,
)
from tttc.codegen.solves import has_solves
from tttc.codegen.staging import WHOLE, Split
from tttc.codegen.warp_loop import warp_renderer
from tttc.codegen.work import through_memory

from tttc.ir.errors import NotLowerable

log = logging.getLogger("tttc.schedule")

Reasons = tuple[tuple[str, str], ...]

TILE_REGISTERS = 32  # of a thread, at most, for one tile of tokens, where warps can be added: several live at a time
STATE_OF_WARPS = 160  # registers of a thread, at most, where warps share the state
GROUP = 8  # mini-batches a program of a parallel kernel handles
# Of Gluon kernels, the best first: those that load more than they store, and the others.
READING: tuple[dict[str, bool], ...] = ({"early": True}, {"early": True, "reload": True})
WRITING: tuple[dict[str, bool], ...] = ({"prefetch": True, "reload": True}, {"reload": True})
GROUP_OF_WARPGROUPS = 4  # as GROUP
WIDEST = 128  # rows of a tile of warpgroups


def backward_stages(loop: Loop, crowd: Crowd) -> tuple[int, str]:
    """How many kernels the loop of a VJP is made of, and why."""
    tiles = loop.tokens or tile_rows(loop) > 1
    if loop.once or loop.refresh or not tiles:
        return 1, "one mini-batch, or tokens one after another: nothing runs beside them"
    if not fits(loop, MOST_WARPS):
        return 3, "the state takes most registers: what does not need it is made by other kernels"
    if has_solves(loop):
        return (
            3,
            "triangular systems are solved before the state is known, for all mini-batches at once",
        )
    if crowd < Crowd.ONE:
        return (
            3,
            "some multiprocessors have no program: what the state does not wait for runs in parallel",
        )
    return 1, "the programs fill the device: one kernel passes nothing through memory"


def hopper(device: torch.device) -> bool:
    """Whether a device has the warpgroups that Gluon kernels are written for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def default_schedule(
    loop: Loop,
    crowd: Crowd,
    backward: bool = False,
    gluon: bool = False,
    split: Split = WHOLE,
) -> Schedule:
    """The schedule of a loop or of one of its stages, with its reasons.

    ``gluon``: kernels for warpgroups may be chosen, see :func:`hopper`. ``split``: how the loop of a forward is split.

    ``backward``: the loop of a VJP. What is not finite makes the loss so: it is not traced token by token through
    cotangents.
    """
    count, why = backward_stages(loop, crowd) if backward else (split.stages, split.why)
    vectors = (
        "repeat_vectors",
        "vector states stay vectors: a row for every token takes registers",
    )
    wide = (
        "narrow",
        "sums of what passes between kernels cancel, as those of a layer norm's backward do: gradients of learning "
        "rates would show that it was rounded",
    )
    large = not fits(loop, MOST_WARPS)
    if loop.parallel and not backward:
        choices = parallel_schedule(loop, split, gluon)
    elif large:
        others = [*_shared_by_warps(loop), *_warpgroups(loop)] if gluon else []
        choices = [*others, _large(loop)]
    else:
        others = feature_schedules(loop, crowd, backward) if gluon else []
        plain = [_small(loop, crowd)] if backward else forward_schedules(loop, crowd, gluon)
        choices = [*others, *plain]
    whole = not is_recurrence(loop)
    if choices[0].segments and whole:
        count, why = 1, "warps share the state: one kernel passes no states through memory"
    if backward and whole and choices[0].renderer == "features" and crowd == Crowd.SOME:
        count, why = (
            1,
            "one kernel is fast alone, and about half of the multiprocessors or more have one",
        )
    chosen: Schedule | None = None
    for choice in reversed(choices):
        reasons = (("stages", why), vectors, *choice.reasons)
        if backward:
            ignored = (
                "nan",
                "what is not finite makes the loss so: it is not traced through cotangents",
            )
            reasons = (*(r for r in reasons if r[0] != "nan"), ignored)
            if not choice.narrow:
                reasons = (*reasons, wide)
            choice = replace(choice, nan="ignored")
        else:  # products alone read states and values, or they stay as they are
            reasons = tuple(r for r in reasons if r[0] != "narrow")
            choice = replace(choice, narrow=False)
        chosen = replace(
            choice,
            stages=count,
            segments=choice.segments and crowd < Crowd.ONE and whole and not backward,
            repeat_vectors=False,
            reasons=reasons,
            origin="rules, without a measurement",
            instead=chosen,
        )
    assert chosen is not None
    return chosen


def phase_schedule(loop: Loop, group: int) -> Schedule:
    """The schedule of one phase of a step over tall tiles (:mod:`tttc.codegen.phases`).

    ``group``: the pieces of rows that a program handles.
    """
    reasons = (
        ("num_warps", "fast weights and sums of their size take most registers"),
        ("order", "values are made late and given up early"),
    )
    if not loop.tokens:
        return Schedule(
            num_warps=MOST_WARPS, num_stages=1, late_loads=True, order="least_live",
            repeat_vectors=False, nan="ignored", reasons=reasons,
        )  # fmt: skip
    turned = (
        "feature_major",
        f"with features as rows a product of {MOST_WARPS} warps keeps its operands once",
    )
    return Schedule(
        num_warps=MOST_WARPS, num_stages=1, feature_major=True, late_loads=True, order="least_live",
        repeat_vectors=False, nan="ignored", group=group, reasons=(*reasons, turned),
    )  # fmt: skip


def _small(loop: Loop, crowd: Crowd) -> Schedule:
    """Of a VJP, where the state leaves registers to other tiles."""
    heavy = products(loop) > MANY_PRODUCTS
    order = (
        "order",
        "products of tokens and state come before whatever waits for a sum, so that they run while the long "
        "chain of the state starts",
    )
    branch = (
        "nan",
        "a branch that is hardly ever taken costs few warps less than a second product beside each causal one",
    )
    # On an H200 the backward of TTT-Linear, B8 T8192, took 3212 us so, and 3930 with products first.
    least = ("order", "matrices take most registers: values are made late and given up early")
    beside = ("nan", "a small product beside each causal one costs least")
    reasons: Reasons
    if loop.parallel:
        # Tiles of more tokens take the registers of more warps; so does the inverse of a triangular system.
        rows = max(loop.mini_batch_size, 16) if loop.tokens else 16
        solves = has_solves(loop)
        warps = min((2 if heavy else 1) * rows // 16, 4)
        if solves:
            warps = 4 if products(loop) > FEW_PRODUCTS else 2
        while warps < MOST_WARPS and matrix_elements(loop) > MATRIX_REGISTERS * THREADS * warps:
            warps *= 2
        matrices = warps == MOST_WARPS
        reasons = (
            (
                "num_warps",
                f"{products(loop)} products of {rows} tokens: {warps} warps hold their tiles, many programs run",
            ),
            ("group", f"a program loads parameters once for {GROUP} mini-batches"),
            least if matrices else order,
            branch,
        )
        return Schedule(
            num_warps=warps, num_stages=1 if matrices else 2, late_loads=True, group=GROUP,
            order="least_live" if matrices else "products_first", nan="branch", reasons=reasons,
        )  # fmt: skip
    warps = 2 if crowd == Crowd.TWO and not heavy else 4
    elements = state_elements(loop)
    tile = tile_elements(loop)
    while not fits(loop, warps):
        warps *= 2
    while warps < MOST_WARPS and tile > TILE_REGISTERS * THREADS * warps:
        warps *= 2
    taken = -(-elements // (THREADS * warps))
    full = "each must be fast alone" if crowd < Crowd.TWO else "they fill it"
    warps_why = (
        f"{crowd}: {full}; the state is "
        f"{elements} numbers, {taken} registers of each thread, a tile of tokens up to {-(-tile // (THREADS * warps))}, "
        f"and {products(loop)} products share the others"
    )
    if is_recurrence(loop):
        ahead = ("prefetch", "every load is on the way to the next state: it is made a turn before")
        return Schedule(
            num_warps=warps, num_stages=1, prefetch=True, order="products_first",
            nan="branch" if warps == 2 else "product",
            reasons=(("num_warps", warps_why), order, branch if warps == 2 else beside, ahead),
        )  # fmt: skip
    return Schedule(
        num_warps=warps,
        order="least_live" if heavy else "products_first",
        nan="branch" if warps == 2 else "product",
        reasons=(("num_warps", warps_why), least if heavy else order, branch if warps == 2 else beside),
    )  # fmt: skip


def _large(loop: Loop) -> Schedule:
    """Where the state takes more registers than are good: whatever else lives shortly, lives shortly."""
    elements = state_elements(loop)
    rows = tile_rows(loop)
    # Products with 16 features to each warp, or with as many tokens as are as good.
    tall = rows >= 64 or (loop.parallel and product_features(loop) >= ROWS * MOST_WARPS)
    reasons = [
        (
            "num_warps",
            f"the state is {elements} numbers, {-(-elements // (THREADS * MOST_WARPS))} registers of each thread and "
            f"more than the {STATE_REGISTERS} that are good; with more than {MOST_WARPS} warps products of 64 rows "
            "would be made more than once",
        ),
        (
            "nan",
            "a second product beside each causal one would take registers that the state needs",
        ),
    ]
    late = (
        "late_loads",
        "the state takes most registers: tokens are loaded where they are first needed",
    )
    least = ("order", "the state takes most registers: values are made late and given up early")
    if tall:
        turned = (
            "feature_major",
            f"tiles have {rows} tokens: with features as rows a product of {MOST_WARPS} warps keeps its operands once",
        )
        return Schedule(
            num_warps=MOST_WARPS, num_stages=1, feature_major=True, late_loads=True, order="least_live",
            nan="branch", group=GROUP if loop.parallel and rows < 64 else 1, reasons=(*reasons, turned, late, least),
        )  # fmt: skip
    if loop.once:
        return Schedule(
            num_warps=MOST_WARPS, num_stages=1, late_loads=True, order="least_live", nan="branch",
            reasons=(*reasons, late, least),
        )  # fmt: skip
    ahead = ("prefetch", "the few tokens of a mini-batch are loaded a turn before")
    return Schedule(
        num_warps=MOST_WARPS, num_stages=1, prefetch=True, order="products_first", nan="branch",
        reasons=(*reasons, ahead),
    )  # fmt: skip


def _shared_by_warps(loop: Loop) -> list[Schedule]:
    """Where each warp holds a piece of the widest dimension of the state; empty where the loop has no such kernel.

    On an H200 TTT-MLP of mini-batches of 16 tokens takes 2220, 484, 7150 and 4600 us at most (B16 T2048, B1 T2048, B1
    T32768, B8 T8192) where plain Triton takes 5329, 1449, 23033 and 10677. Before warps waited for each other only four times a
    mini-batch (:mod:`tttc.codegen.exchanges`) it took 2793, 696, 10958 and 5589
    (benchmarks/results/2026-11-28-h200-warps.json). Care for what is not finite (a second pass that is not taken) costs
    0.3 %. Of schedules like it 16 warps took 4051 us at B16 T2048 where 8 took 3021; TTT-Linear, its state spread likewise, was slower than in plain Triton.
    """
    reasons = (
        (
            "renderer",
            f"few tokens and a wide state: each of {MOST_WARPS} warps holds a piece of it and waits for the others only "
            "where the pieces are added up",
        ),
        ("nan", "where the state is not finite at the end, everything is computed once more with care"),
    )  # fmt: skip
    schedule = Schedule(
        num_warps=MOST_WARPS, num_stages=1, prefetch=True, order="on_demand", renderer="warps", nan="again",
        segments=True, reasons=reasons,
    )  # fmt: skip
    if state_elements(loop) > STATE_OF_WARPS * THREADS * MOST_WARPS:
        return []
    try:
        warp_renderer(loop, replace(schedule, repeat_vectors=False)).render()
    except NotLowerable as problem:
        log.info("%s: no kernel whose warps share the state: %s", loop.name, problem)
        return []
    return [schedule]


def _ways(loop: Loop) -> tuple[dict[str, bool], ...]:
    """How matrices come into shared memory, the best first.

    On an H200 (TTT-MLP, mini-batches of 64 tokens, B16 T2048, microseconds): with copies under way from a product before
    (``early``) the backward's recurrence took 4789 where it took 5046, the kernel after it 964 where it took 1445, a
    forward 1925 where it took 1998; the kernel before the recurrence, which stores more than it loads, 4849 where
    it took 4321. Of the small matrices of the next mini-batch (``prefetch``) and four mini-batches in a program it took
    3891 (4147 without ``prefetch``).
    """
    loaded, stored = (sum(value_elements(loop, n) for n in nodes) for nodes in through_memory(loop))
    return READING if loaded > stored else WRITING


def _warpgroups(loop: Loop) -> list[Schedule]:
    """Where warpgroups hold the state in accumulators and read operands from shared memory, the best first.

    Empty where the loop has no such kernel. How much shared memory one takes is only about known before it is
    compiled: what does not fit after all is left for the next.
    """
    reasons: Reasons = (
        (
            "renderer",
            "large tiles on a Hopper GPU: accumulators of warpgroups hold them, operands are read from shared memory",
        ),
        ("widest", f"a tile of {WIDEST} rows takes 32 registers of each thread of {MOST_WARPS} warps"),
        ("order", "each value is made right before it is read: little stays on chip"),
        ("narrow", "what is copied into shared memory has the dtype of operands"),
    )  # fmt: skip
    ways = _ways(loop)
    if ways is READING:
        reasons += (
            ("early", "it loads more than it stores: copies are under way a product ahead"),
        )
    else:
        reasons += (("prefetch", "it stores more than it loads: only small matrices come ahead"),)
    found = []
    group = GROUP_OF_WARPGROUPS if loop.parallel else 1
    for way in ways:
        schedule = Schedule(
            num_warps=MOST_WARPS, num_stages=1, late_loads=True, order="on_demand", renderer="gluon",
            widest=WIDEST, narrow=True, nan="ignored", group=group, reasons=reasons, **way,
        )  # fmt: skip
        try:
            gluon_renderer(divided(loop, WIDEST), schedule)
        except NotLowerable as problem:
            log.info("%s: no Gluon kernel: %s", loop.name, problem)
            continue
        found.append(schedule)
    return found
