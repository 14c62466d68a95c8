"""What the body of a loop asks of its loop variable: which iterations may do something else than others."""

from __future__ import annotations

import math

NEAR = 2  # iterations beyond the end


class Facts:
    """What was asked, in numbers n of iterations.

    Args:
        count: how many iterations the loop has.

    Attributes:
        moduli: a remainder by this was taken.
        phases: remainders at which a comparison may change its result, with their moduli.
        limits: iterations at which one may.
        fixed: those of them that stay where they are when the loop gets longer.
        lost: where a number was made that can't be followed.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.moduli: set[int] = set()
        self.phases: set[tuple[int, int]] = set()
        self.limits: set[int] = set()
        self.fixed: set[int] = set()
        self.lost: list[str | None] = []

    def add(self, other: Facts) -> None:
        """What another iteration asked."""
        self.moduli |= other.moduli
        self.phases |= other.phases
        self.limits |= other.limits
        self.fixed |= other.fixed
        self.lost += other.lost

    @property
    def period(self) -> int | None:
        """After how many iterations the remainders repeat; None where none was taken."""
        return math.lcm(*self.moduli) if self.moduli else None

    @property
    def known(self) -> int | None:
        """How many iterations a loop may have about which these facts say all; None for any number."""
        return min((n for n in self.fixed if n > self.count + NEAR), default=None)

    def places(self) -> set[int]:
        """The iterations that may differ: of the loop, and of one period."""
        found = {n for n in self.limits if 0 <= n < self.count}
        # A limit at the end may move with it, or not: iterations beyond show that neither matters.
        found |= {n for n in self.fixed if self.count <= n <= self.count + NEAR}
        for modulus, phase in self.phases:
            found |= set(range(phase or modulus, (self.period or 0) + 1, modulus))
        return found
