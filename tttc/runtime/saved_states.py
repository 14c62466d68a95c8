"""Room for the states that a forward saves for its backward."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_states(
    lead: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """An empty tensor ``[*lead, *shape]``; wide dimensions of ``shape`` are rows of memory, as kernels hold them.

    >>> empty_states((2,), (64, 256), torch.float32, torch.device("cpu")).stride()
    (16384, 1, 64)
    """
    order = sorted(range(len(shape)), key=lambda axis: -shape[axis])
    made = torch.empty((*lead, *(shape[axis] for axis in order)), dtype=dtype, device=device)
    first = len(lead)
    return made.permute(*range(first), *(first + order.index(axis) for axis in range(len(shape))))
