"""Few sequences with many mini-batches: their states first, then segments of the sequences beside each other.

A kernel that makes nothing but states is faster than one that makes the outputs too, and a segment needs no more than the
state it starts from: the second kernel handles segments as it handles sequences, and they fill the device.
"""

from __future__ import annotations

from torch import Tensor

EACH = 4  # programs a multiprocessor, about
LEAST, MOST = 4, 64  # mini-batches of a segment
LEAST_SEGMENTS = 4


def mini_batches_of(programs: int, mini_batches: int, processors: int) -> int:
    """Mini-batches of a segment, 0 where sequences are better left whole.

    Args:
        programs: sequences times heads.
        mini_batches: of a sequence.
        processors: of the device.

    >>> mini_batches_of(32, 128, 132), mini_batches_of(32, 2048, 132), mini_batches_of(32, 8, 132)
    (8, 64, 0)
    """
    wanted = programs * mini_batches // (EACH * processors)
    size = min(max(1 << max(wanted.bit_length() - (wanted.bit_count() == 1), 0), LEAST), MOST)
    return size if mini_batches >= LEAST_SEGMENTS * size else 0


def segments(x: Tensor, count: int, length: int, copy: bool = False) -> Tensor | None:
    """``[B, H, T, ...]`` as ``count`` segments of each sequence, ``[B * count, H, length, ...]``.

    None where they cannot be read in place, unless a ``copy`` will do.
    """
    parts = x[:, :, : count * length].unflatten(2, (count, length)).transpose(1, 2)
    in_place = x.shape[0] == 1 or parts.stride(0) == count * parts.stride(1)
    return parts.flatten(0, 1) if in_place or copy else None
