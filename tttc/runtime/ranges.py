"""Names for PyTorch's profiler: which layer a scan belongs to, and in which direction it runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd import profiler

_NOTHING: AbstractContextManager[None] = nullcontext()


def scan_range(direction: str, key: str, layer: str) -> AbstractContextManager:
    """A range ``tttc forward layers.0.ttt (linear_step)`` around what a scan runs; nothing without a profiler.

    Args:
        direction: "forward" or "backward".
        key: of the step.
        layer: the name of the module that calls the scan, "" where there is none.
    """
    # Opening a range takes microseconds even where nobody looks.
    if not profiler._is_profiler_enabled:
        return _NOTHING
    step = key.rpartition("#")[0].rpartition(".")[2]
    return torch.profiler.record_function(f"tttc {direction} {layer or 'scan'} ({step})")
