"""Few sequences with many mini-batches: their states first, then segments of the sequences beside each other.

A kernel that makes nothing but states is faster than one that makes the outputs too, and a segment needs no more than the
state it starts from: the second kernel handles segments as it handles sequences, and they fill the device.
"""

from __future__ import annotations

from torch import Tensor

EACH = 2  # programs a multiprocessor
LEAST, MOST = 8, 128  # mini-batches of a segment
LEAST_SEGMENTS = 4
# Of multiprocessors: up to how many programs it pays. On an H200 TTT-Linear (two warps a program, several of which share a
# multiprocessor) gains with 32 and loses with 128, TTT-MLP (eight, which have it to themselves) gains with 32 and loses
# with 64.
MANY_WARPS = 8
SHARE, SHARE_OF_MANY_WARPS = 0.6, 0.3


def mini_batches_of(programs: int, mini_batches: int, processors: int, warps: int) -> int:
    """Mini-batches of a segment, 0 where sequences are better left whole.

    Args:
        programs: sequences times heads.
        mini_batches: of a sequence.
        processors: of the device.
        warps: of a program.

    >>> [mini_batches_of(32, n, 132, 2) for n in (8, 128, 2048)]
    [0, 16, 128]
    >>> [mini_batches_of(n, 128, 132, 8) for n in (32, 64)]
    [16, 0]
    """
    share = SHARE_OF_MANY_WARPS if warps >= MANY_WARPS else SHARE
    wanted = max(programs * mini_batches // (EACH * processors), 1)
    size = min(max(1 << (wanted - 1).bit_length(), LEAST), MOST)
    few = programs <= share * processors
    return size if few and mini_batches >= LEAST_SEGMENTS * size else 0


def segments(x: Tensor, count: int, length: int, copy: bool = False) -> Tensor | None:
    """``[B, H, T, ...]`` as ``count`` segments of each sequence, ``[B * count, H, length, ...]``.

    None where they cannot be read in place, unless a ``copy`` will do.
    """
    parts = x[:, :, : count * length].unflatten(2, (count, length)).transpose(1, 2)
    in_place = x.shape[0] == 1 or parts.stride(0) == count * parts.stride(1)
    return parts.flatten(0, 1) if in_place or copy else None
