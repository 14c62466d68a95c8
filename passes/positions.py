"""Positions along an axis: cumulative sums, and single entries, as products with a constant.

Before::

    cumsum = aten.cumsum(G, 0)          # [16, d, d]
    last = aten.select(cumsum, 0, -1)

After (``lower`` is a triangle of ones, ``one_hot`` a row of the identity)::

    c = contraction("b a, a i j -> b i j", lower, G)
    z = contraction("b, b i j -> i j", one_hot, c)

Along a feature that is what they are; where the axis is that of the tokens of a tile, ``passes/tiles.py``
reads the constants back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tttc.ir.errors import NotLowerable


def cumulative_sum(n: Any, node: fx.Node, args: list[Any]) -> Any:
    """``aten.cumsum`` as a product with a triangle of ones."""
    value, dim = args[0], args[1] % max(len(args[0].axes), 1)
    if not value.axes or not value.axes[dim]:
        return value
    size = value.shape[dim]
    letters = _letters(value)
    lower = n.constant(torch.ones(size, size).tril(), True)
    result = letters[:dim] + "z" + letters[dim + 1 :]
    return n.contract([lower, value], ["z" + letters[dim], letters], result)


def entry(n: Any, node: fx.Node, args: list[Any]) -> Any:
    """``aten.select`` as a product with a row of the identity."""
    value, dim, index = args[0], args[1] % len(args[0].axes), args[2]
    size = value.shape[dim]
    letters = _letters(value)
    rest = letters[:dim] + letters[dim + 1 :]
    if size == 1:
        return n.contract([value], [letters], rest)
    row = n.constant(torch.eye(size)[index], True)
    return n.contract([row, value], [letters[dim], letters], rest)


def part(n: Any, node: fx.Node, args: list[Any]) -> Any:
    """``aten.slice`` where it takes all of an axis, or one entry of it."""
    value, dim = args[0], args[1] % len(args[0].axes) if len(args) > 1 else 0
    size = value.shape[dim]
    start, stop, _ = slice(*args[2:4], *args[4:5]).indices(size)
    if node.meta["val"].shape[dim] == size and start == 0:
        return value
    if stop - start != 1:
        raise NotLowerable("it takes a part of an axis", n.where)
    one = entry(n, node, [value, dim, start])
    axes = list(one.axes)
    axes.insert(dim, ())
    return type(one)(one.node, axes)


def _letters(value: Any) -> str:
    return "".join(chr(ord("a") + i) for i in range(len(value.axes)))
