"""Compiling schedules to choose from before one is launched: several at a time, each in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from tttc.codegen.resources import Request, ResourceError, Resources, compile_all

Done = Callable[[int], None]
Compiler = Callable[[Sequence[Request], float, Done], list[Resources | ResourceError]]


def workers() -> int:
    """Processes at a time: two processors stay with the program."""
    return max(len(os.sched_getaffinity(0)) - 2, 1)


def target_of(device: torch.device) -> str:
    """What kernels for a GPU that is there are compiled for: ``"sm_90"``, ``"gfx942"``."""
    found = torch.cuda.get_device_properties(device)
    name = getattr(found, "gcnArchName", "").partition(":")[0]
    return name if torch.version.hip else f"sm_{found.major}{found.minor}"


def compiler_for(device: torch.device) -> Compiler:
    """Compiles for a GPU that is there: requests, seconds after which to stop, whom to tell of each that is done."""
    target = target_of(device)

    def run(
        requests: Sequence[Request], seconds: float, done: Done
    ) -> list[Resources | ResourceError]:
        return compile_all(requests, target, workers(), seconds, done)

    return run
