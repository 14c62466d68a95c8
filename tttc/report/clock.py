"""A budget for naive loops, which stops them before their next token."""

from __future__ import annotations

import time


class OutOfTime(Exception):
    """A naive loop used up its share of the time."""


class Clock:
    """Stops naive loops that run for longer than a budget, from their first token on."""

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.tokens = 0
        self.restart()

    def restart(self) -> None:
        self.start: float | None = None

    def spent(self) -> float:
        return 0.0 if self.start is None else time.perf_counter() - self.start

    def __call__(self) -> None:
        self.tokens += 1
        if self.start is None:
            self.start = time.perf_counter()
        if self.spent() > self.budget:
            raise OutOfTime
