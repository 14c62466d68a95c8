"""The first matrix product of a process on a GPU, run while its programs are read or compiled.

It loads cuBLAS, and the first product of a type the kernels of that type: a tenth of a second, of which little is Python's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

_lock = threading.Lock()
_begun: set[tuple[torch.device, torch.dtype]] = set()


@contextmanager
def first_products(values: Iterable[Any]) -> Iterator[None]:
    """Within, another thread runs a product, of the type and on the device of what a model's products will take.

    The first floating tensor on a GPU says which: among these values, or a parameter of a module among them. Nothing is
    run twice in a process, nor while a CUDA graph is being captured.
    """
    thread = _thread(values)
    try:
        yield
    finally:
        if thread is not None:
            thread.join()  # its handle of cuBLAS, with the memory that has, goes to who asks next


def _thread(values: Iterable[Any]) -> threading.Thread | None:
    """The thread that has begun with it, if there is anything to do; nothing is lost where that can't be told."""
    if not torch.cuda.is_initialized():
        return None
    # A module of somebody's may raise anything when it is asked for its parameters.
    with suppress(Exception):
        return _begun_for(values)
    return None


def _begun_for(values: Iterable[Any]) -> threading.Thread | None:
    found = next((x for x in _tensors(values) if x.is_cuda and x.is_floating_point()), None)
    if found is None or torch.cuda.is_current_stream_capturing():
        return None
    autocast = torch.is_autocast_enabled("cuda")
    what = found.device, torch.get_autocast_dtype("cuda") if autocast else found.dtype
    with _lock:
        if what in _begun:
            return None
        _begun.add(what)
    thread = threading.Thread(target=_product, args=what, name="tttc: first product")
    thread.start()
    return thread


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, nn.Module):
            yield from value.parameters()
        elif isinstance(value, torch.Tensor):
            yield value


def _product(device: torch.device, dtype: torch.dtype) -> None:
    with suppress(Exception):  # a type that has no product: the model says so, if it needs one
        matrix = torch.zeros(64, 64, device=device, dtype=dtype)
        matrix @ matrix
