"""How full a device is of programs that go over mini-batches one after another."""

from __future__ import annotations

from enum import Enum
from functools import total_ordering

import torch
from tttc.codegen.devices import device_of

NEARLY_HALF = 0.45  # of the multiprocessors
LEAST_MINI_BATCHES = 8  # from which several kernels instead of one pay


@total_ordering
class Crowd(Enum):
    """Programs to a multiprocessor: less than about half of them have one, some have none, each has one, or two."""

    FEW = 0
    SOME = 1
    ONE = 2
    TWO = 3

    def __str__(self) -> str:
        return (
            "most multiprocessors have no program", "some multiprocessors have no program", "one program a multiprocessor",
            "two or more programs a multiprocessor",
        )[self.value]  # fmt: skip

    def __lt__(self, other: Crowd) -> bool:
        return self.value < other.value if isinstance(other, Crowd) else NotImplemented


def crowding(programs: int, mini_batches: int, device: torch.device) -> Crowd:
    """How full a device is of so many programs.

    Where there are few mini-batches it is as full as if each multiprocessor had one: what else could run beside them
    would not pay.
    """
    processors = device_of(device).processors
    if programs >= processors or mini_batches < LEAST_MINI_BATCHES:
        return Crowd.TWO if programs >= 2 * processors else Crowd.ONE
    return Crowd.SOME if programs >= NEARLY_HALF * processors else Crowd.FEW
