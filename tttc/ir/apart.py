"""Tensors that stay while a process lives, whoever asks for them first."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def apart(device: torch.device, make: Callable[[], T]) -> T:
    """What ``make`` makes on a device, written when it is returned.

    On a GPU another thread makes it: what a thread allocates while it warms up for CUDA graphs is memory of the graphs,
    which use it again. While a graph is recorded nothing can be waited for: this
    thread makes it, as a part of the graph, and it is not to be kept.

    >>> apart(torch.device("cpu"), lambda: torch.zeros(2))
    tensor([0., 0.])
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return make()

    def made() -> T:
        result = make()
        torch.cuda.current_stream(
            device
        ).synchronize()  # others' streams don't wait for this thread's
        return result

    with ThreadPoolExecutor(1) as other:
        return other.submit(made).result()
