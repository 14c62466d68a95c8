"""The schedules that a loop may run under, read off the loop itself and the fields of a schedule.

``CHOICES`` has an entry for every field whose values are worth trying; a new field of :class:`Schedule` is searched as
soon as it has one. Fields without an entry keep the value that :mod:`tttc.codegen.heuristics` chose. What a choice may
not change is what is computed: candidates treat what is not finite, and round what passes through memory, at least as
carefully as the default does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tttc.codegen.crowding import Crowd
from tttc.codegen.feature_rules import feature_candidates
from tttc.codegen.heuristics import default_schedule
from tttc.codegen.loop import Loop, used
from tttc.codegen.ordering import products_first
from tttc.codegen.schedule import Schedule
from tttc.codegen.sizes import tile_rows
from tttc.codegen.staging import GROUPS, WHOLE, Split

from tttc.ir import ops
from tttc.ir.body import is_token
from tttc.ir.build import dims_of

WARPS = (1, 2, 4, 8, 16)
NUMBERS_A_WARP = 64  # of the largest tile, at least: other warps would have nothing to do
PLENTY = (
    3 * 32 * 255
)  # numbers of a tile that leave no room for others in the registers of one warp
# How tokens are loaded: at the start of a mini-batch or where needed, ahead through shared memory or registers.
LOADS = (
    {"num_stages": 1, "late_loads": False, "prefetch": False},
    {"num_stages": 2, "late_loads": False, "prefetch": False},
    {"num_stages": 3, "late_loads": False, "prefetch": False},
    {"num_stages": 1, "late_loads": True, "prefetch": False},
    {"num_stages": 2, "late_loads": True, "prefetch": False},
    {"num_stages": 1, "late_loads": False, "prefetch": True},
)
Choice = Callable[[Loop, Schedule], Sequence[Mapping[str, Any]]]


def _sides(loop: Loop, dims: Iterable[str]) -> list[int]:
    return [loop.mini_batch_size if is_token(d) else loop.sizes[d] for d in dims]


def _largest(loop: Loop) -> int:
    return max((math.prod(_sides(loop, dims_of(n))) for n in used(loop)), default=1)


def _warps(loop: Loop, exact: Schedule) -> list[dict[str, Any]]:
    largest = _largest(loop)
    most = max(largest // (NUMBERS_A_WARP * 32), 1) if largest < PLENTY else WARPS[-1]
    least = min(largest // PLENTY, WARPS[-1])
    return [{"num_warps": n} for n in WARPS if least <= n <= max(2 * most, 2)]


def _orientations(loop: Loop, exact: Schedule) -> list[dict[str, Any]]:
    """Both where it decides the rows of a product."""
    both = any(n.target in (ops.contraction, ops.masked_contraction) for n in used(loop))
    turned = both and tile_rows(loop) > 1
    return [{"feature_major": x} for x in ((False, True) if turned else (exact.feature_major,))]


def _loads(loop: Loop, exact: Schedule) -> list[dict[str, Any]]:
    kinds = ("token", "saved", "value")
    several = any(s.kind in kinds and n in used(loop) for n, s in loop.sources.items())
    return [dict(x) for x in LOADS] if several and not loop.once else [dict(LOADS[0])]


def _orders(loop: Loop, exact: Schedule) -> list[dict[str, Any]]:
    nodes = [n for n in loop.graph.nodes if n.op == "call_function" and n in used(loop)]
    names = ["graph", "least_live"]
    if products_first(nodes) != nodes:
        names.insert(0, "products_first")
    return [{"order": x} for x in names]


def _nan(loop: Loop, exact: Schedule) -> list[dict[str, Any]]:
    """Of the two that are exact either; where the default does without, so do all."""
    causal = any(n.target is ops.masked_contraction for n in used(loop))
    names = ("branch", "product") if causal and exact.nan != "ignored" else (exact.nan,)
    return [{"nan": x} for x in names]


def _vectors(loop: Loop, exact: Schedule) -> list[dict[str, Any]]:
    vectors = any(s.kind == "state" and len(dims_of(n)) == 1 for n, s in loop.sources.items())
    pays = vectors and loop.tokens and not loop.parallel
    return [{"repeat_vectors": x} for x in ((False, True) if pays else (False,))]


def _groups(loop: Loop, exact: Schedule) -> list[dict[str, Any]]:
    return [{"group": n} for n in (GROUPS if loop.parallel else (1,))]


CHOICES: tuple[Choice, ...] = (_warps, _orientations, _loads, _orders, _nan, _vectors, _groups)


def candidates(
    loop: Loop,
    crowd: Crowd,
    backward: bool = False,
    gluon: bool = False,
    split: Split = WHOLE,
) -> list[Schedule]:
    """The schedules worth a look for one kernel, the default first; of Gluon kernels that one, and of features over warps a few like it.

    Args:
        loop: of one kernel (a stage, as :func:`tttc.codegen.stages.stages` makes them).
        crowd: of :func:`tttc.codegen.crowding.crowding`.
        backward: the loop of a VJP.
        gluon: kernels for warpgroups may run.
        split: how the loop of a forward is split.
    """
    first, exact = (
        replace(default_schedule(loop, crowd, backward, may, split), reasons=(), origin="candidate")
        for may in (gluon, False)
    )
    made = [first, exact]
    if first.renderer == "features":
        made += feature_candidates(loop, first)
    for parts in itertools.product(*(choice(loop, exact) for choice in CHOICES)):
        made.append(replace(exact, **{k: v for part in parts for k, v in part.items()}))
    return list(dict.fromkeys(made))


def plans(
    loop: Loop, crowd: Crowd, backward: bool = False, gluon: bool = False, split: Split = WHOLE
) -> Iterator[dict[str, Any]]:
    """What all kernels of a loop have in common: how many there are, and how they pass values on.

    The default's comes first. Arguments are those of :func:`candidates`.
    """
    exact = default_schedule(loop, crowd, backward, gluon, split)
    tiles = loop.tokens or tile_rows(loop) > 1
    alone = loop.once or loop.refresh or not tiles or loop.interval > 1
    counts = (1,) if alone else (1, 2, 3)
    found = [
        {"stages": n, "narrow": x}
        for n in counts
        for x in ((True, False) if exact.narrow and n > 1 else (exact.narrow,))
    ]
    found.sort(key=lambda p: (p["stages"] != exact.stages, p["narrow"] != exact.narrow))
    yield from found


def neighbours(schedule: Schedule, among: Iterable[Schedule]) -> list[Schedule]:
    """Those that make one choice otherwise; how tokens are loaded is one choice."""
    loads = tuple(LOADS[0])

    def differing(other: Schedule) -> int:
        mine, its = schedule.choices(), other.choices()
        changed = {k for k in mine if mine[k] != its[k]}
        return len(changed - set(loads)) + bool(changed & set(loads))

    return [s for s in among if differing(s) == 1]


def shortlist(ranked: Iterable[Schedule], count: int, alike: int = 2) -> list[Schedule]:
    """The first ``count`` of a ranking, at most ``alike`` of them with the same warps, orientation and loads."""
    kinds: dict[Any, int] = {}
    found: list[Schedule] = []
    for s in ranked:
        kind = (s.num_warps, s.feature_major, s.num_stages, s.late_loads, s.prefetch)
        if kinds.get(kind, 0) < alike:
            kinds[kind] = kinds.get(kind, 0) + 1
            found.append(s)
        if len(found) == count:
            break
    return found
