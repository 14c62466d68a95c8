"""A schedule: how a loop is rendered, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Choices of one kernel.

    Attributes:
        feature_major: axes of tiles are features first, tokens last (else tokens first).
        num_warps: warps a program.
        num_stages: depth of the software pipeline over mini-batches, 1 for none.
        accumulate: products are added into their sum inside the matrix unit.
        maxnreg: registers a thread may take, None for the compiler's choice.
    """

    feature_major: bool = False
    num_warps: int = 4
    num_stages: int = 1
    accumulate: bool = True
    maxnreg: int | None = None
