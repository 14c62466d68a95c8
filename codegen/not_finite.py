"""Asking in a kernel whether tiles hold what is not finite."""

from __future__ import annotations

from collections.abc import Iterable


def any_not_finite(tiles: Iterable[tuple[str, int]]) -> str:
    """The condition that a number in one of these tiles, each a name and how many axes it has, is infinite or NaN.

    Times zero, what is finite is zero, and all else NaN, which stays in sums and equals nothing.

    >>> any_not_finite([("x", 1), ("y", 2)])
    'tl.sum(x * 0.0, 0) + tl.sum(tl.sum(y * 0.0, 1), 0) != 0.0'
    """
    return " + ".join(_sum(f"{name} * 0.0", axes) for name, axes in tiles) + " != 0.0"


def _sum(value: str, axes: int) -> str:
    for axis in reversed(range(axes)):
        value = f"tl.sum({value}, {axis})"
    return value
