"""Compiling kernels before they are launched: several at a time, each in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from tttc.codegen.resources import Request, ResourceError, Resources, compile_all
from tttc.progress import phase
from tttc.runtime.launch import Launch

Done = Callable[[int], None]
Compiler = Callable[[Sequence[Request], float, Done], list[Resources | ResourceError]]
LONGEST = 600.0  # seconds


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


def fast() -> bool:
    """Whether kernels for the GPU at hand use NVIDIA's own instructions."""
    return torch.version.hip is None


def compile_ahead(launches: Sequence[Launch], device: torch.device) -> None:
    """Compile kernels that no process has launched yet, together; what fails here says why when it is launched.

    A kernel whose source is on disk was launched before: Triton finds it compiled faster than a process starts.
    """
    new = {x.kernel.path: x for x in launches if not x.kernel.path.exists()}
    if len(new) < 2 or workers() < 2:
        return
    with phase("kernels", f"compiling {len(new)} kernels"):
        requests = [x.request(fast=fast()) for x in new.values()]
        compiler_for(device)(requests, LONGEST, lambda i: None)
