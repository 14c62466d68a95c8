"""The stages of a backward, group after group of mini-batches: a recurrence beside what does not wait for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tttc.runtime.beside import Aside
from tttc.runtime.launch import Launch
from tttc.runtime.staged import Launcher, Staged

LEAST = 128  # mini-batches of a group: more launches take the host longer
GROUPS = 4  # at least, where there are enough mini-batches: the first and the last have nothing beside them


def overlaps(made: Staged) -> bool:
    """Whether one of the kernels is a recurrence, and there are parallel ones before and after it."""
    return [k.config["parallel"] for k in made.kernels] == [True, False, True]


def group_size(most: int, mini_batches: int) -> int:
    """Mini-batches of a group, ``most`` at a time.

    >>> [group_size(256, n) for n in (100, 200, 512, 4096)]
    [128, 128, 128, 256]
    """
    return min(most, max(-(-mini_batches // GROUPS), LEAST))


class Overlap:
    """Launches groups in turn; what a group's recurrence is waited for by is launched after the next group's has begun."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.pending: tuple[Launch, Launch, Callable[[], None]] | None = None

    def run(self, launches: Sequence[Launch], then: Callable[[], None]) -> None:
        """Launch a group; ``then`` is called when all of it has been."""
        before, recurrence, outputs = launches
        self.launcher(before)
        aside = Aside(recurrence.device)
        recurrence = replace(recurrence, aside=aside)
        self.launcher(recurrence)
        self.finish()
        # The tensors of the recurrence live until what comes next has waited for it.
        self.pending = recurrence, replace(outputs, after=aside), then

    def finish(self) -> None:
        """Launch what waits."""
        if self.pending is None:
            return
        _, outputs, then = self.pending
        self.launcher(outputs)
        self.pending = None
        then()
