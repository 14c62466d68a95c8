"""Lines of a turn of a loop in an order in which warps wait for each other less often.

What warps store to shared memory others load after a barrier, where all wait for the slowest, and their state leaves
few registers for what waits. So a store goes where there is a barrier before it is read anyway, together with what only
it needs; pairs of tokens that wait for a barrier do so as operands, which take half the registers; and the copies of what
the next turn reads start right after a barrier, as they need one::

    e_s.store(e)                        g_s.store(g)
    a = e_s.load(...)    # barrier      e_s.store(e)
    c = mma_v2(a, ...)                  a = e_s.load(...)    # barrier
    g_s.store(g)                        c = mma_v2(a, ...)
    b = g_s.load(...)    # barrier      b = g_s.load(...)

Triton sees to the barriers: no order of lines makes a kernel wrong that is right one line after another.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

HEAVY = ("mma_v2(", "gl.sum(", "gl.store(")  # what does not move: it takes long, or waits itself


@dataclass(eq=False)
class Line:
    """A line of a turn: the names it gives, the names it reads, the rooms it stores to and loads from."""

    text: str
    made: frozenset[str]
    reads: frozenset[str]
    stored: str
    loaded: frozenset[str]

    @property
    def light(self) -> bool:
        """Whether it may move along with what needs it."""
        return bool(self.made) and not self.loaded and not any(x in self.text for x in HEAVY)


def fewer_barriers(
    lines: Sequence[str], rooms: Collection[str], operands: Collection[str],
    filled: Collection[str] = (), start: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """The lines of a turn in another order.

    Args:
        lines: each gives names values, or stores. What a line reads was given before it in the turn, or is what it was
            at the start of the turn.
        rooms: in shared memory, by name, that a turn stores to before it loads from them.
        operands: names of operands over pairs of tokens.
        filled: what stands for the rooms that copies fill.
        start: lines that start to fill them for the next turn.

    >>> fewer_barriers(
    ...     ["e_s.store(e)", "a = e_s.load()", "c = mma_v2(a, w)", "g = e + 1", "g_s.store(g)", "b = g_s.load()"],
    ...     ["e_s", "g_s"], [],
    ... )
    ['e_s.store(e)', 'g = e + 1', 'g_s.store(g)', 'a = e_s.load()', 'c = mma_v2(a, w)', 'b = g_s.load()']
    """
    order = [_read(text, rooms) for text in lines]
    barriers = _join(order, frozenset(filled))
    _pack(order, frozenset(operands), barriers)
    at = _start(order, barriers, frozenset(filled))
    made = [line.text for line in order]
    return [*made[:at], *start, *made[at:]]


def _read(text: str, rooms: Collection[str]) -> Line:
    given = re.match(r"\s*((?:\w+, )*\w+) = ", text)
    stored = re.match(r"\s*(\w+)\.store\(", text)
    room = stored[1] if stored and stored[1] in rooms else ""
    reads = frozenset(re.findall(r"[A-Za-z_]\w*", text[given.end() :] if given else text))
    loaded = frozenset(x for x in reads if x in rooms and x != room)
    return Line(text, frozenset(given[1].split(", ") if given else ()), reads, room, loaded)


def _only_for(order: list[Line], line: Line) -> list[Line]:
    """A line, after those that nothing else needs."""
    chain = [line]
    for other in reversed(order[: order.index(line)]):
        needed = other.light and any(other.made & x.reads for x in chain)
        if needed and all(x in chain for x in order if other.made & x.reads):
            chain.insert(0, other)
    return chain


def _known(order: list[Line], chain: Sequence[Line]) -> int:
    """From where on what a chain of lines needs is known."""
    needed = frozenset[str]().union(*(x.reads for x in chain))
    before = order[: order.index(chain[-1])]
    return max(
        (i + 1 for i, x in enumerate(before) if x not in chain and x.made & needed), default=0
    )


def _join(order: list[Line], filled: frozenset[str]) -> list[Line]:
    """Stores move to before barriers that there are; the lines before which barriers are left."""
    barriers: list[Line] = []
    settled: list[Line] = []
    for line in list(order):
        before = order[: order.index(line)]
        stores = [
            next((x for x in reversed(before) if x.stored == r), None) for r in sorted(line.loaded)
        ]
        waiting = [
            x for x in stores
            if x is not None and x not in settled and not _joins(order, x, barriers, filled)
        ]  # fmt: skip
        if waiting:
            barriers.append(line)
            settled = [x for x in before if x.stored]
        else:
            settled += [x for x in stores if x is not None]
    return barriers


def _joins(
    order: list[Line], store: Line, barriers: Sequence[Line], filled: frozenset[str]
) -> bool:
    """Move a store to before a barrier, with what it needs, if that is possible.

    What is made for the store alone leaves registers by it: the first barrier is best, and where it is made of tokens,
    the start of the turn, as copies for the next turn wait for what reads them. What is read later too stays in registers:
    the last barrier is.
    """
    own = _only_for(order, store)
    at = _known(order, own)
    crossed = order[at : order.index(store)]
    if (
        any(x.reads & filled for x in own)
        and any(x in barriers for x in crossed)
        and not any(store.stored in x.loaded for x in crossed)
    ):
        _move(order, own, at)
        return True
    for barrier in barriers if len(own) > 1 else barriers[-1:]:
        chain = _from(order, store, barrier)
        if chain:
            _move(order, chain, order.index(barrier))
            return True
    return False


def _from(order: list[Line], store: Line, barrier: Line) -> list[Line]:
    """A store and what it needs of the lines from a barrier on; nothing where that has to stay."""
    chain = [store]
    for other in reversed(order[order.index(barrier) : order.index(store)]):
        needed = any(other.made & x.reads for x in chain)
        if store.stored in other.loaded or (needed and not other.light):
            return []
        if needed:
            chain.insert(0, other)
    return chain


def _pack(order: list[Line], operands: frozenset[str], barriers: Sequence[Line]) -> None:
    """Operands of pairs move up to what they need, with what is only for them, if they wait for a barrier there."""
    for line in [x for x in order if x.made & operands and not x.loaded]:
        chain = _only_for(order, line)
        at = _known(order, chain)
        if any(x in barriers for x in order[at : order.index(line)]):
            _move(order, chain, at)


def _move(order: list[Line], lines: Sequence[Line], to: int) -> None:
    """Move lines to a place; those that are before it stay."""
    moved = [x for x in lines if order.index(x) >= to]
    for x in moved:
        order.remove(x)
    order[to:to] = moved


def _start(order: list[Line], barriers: list[Line], filled: frozenset[str]) -> int:
    """Where copies start: after a barrier, if what they fill is read no more before the next one.

    As late as there is a barrier to come, as their addresses take registers; they arrive while the turn ends.
    """
    for this, following in reversed(list(pairwise(barriers))):
        at = order.index(this) + 1
        if not any(x.reads & filled for x in order[at : order.index(following)]):
            return at
    return 0
