"""Rotary position embedding."""

from __future__ import annotations

import torch


def rotary(x: torch.Tensor, position: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotate the pairs ``(x[i], x[i + d/2])`` of each token by ``position * theta ** (-2 i / d)``.

    ``x`` is ``[..., d]`` with d even, ``position`` an integer for each token, as ``[T]`` for ``[B, H, T, d]`` or
    ``[T, 1]`` for ``[B, T, H, d]``; the result is like x. Angles and products are taken in float32 at least.

    Example:
        >>> x = torch.randn(2, 4, 10, 8)
        >>> y = rotary(x, torch.arange(10), 10000.0)
        >>> torch.equal(y[:, :, 0], x[:, :, 0]), y.shape
        (True, torch.Size([2, 4, 10, 8]))

    Source: arXiv 2104.09864.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    exponent = torch.arange(half, device=x.device, dtype=wide) / -half
    angle = position.to(wide)[..., None] * theta**exponent
    cos, sin = angle.cos(), angle.sin()
    first, second = x[..., :half].to(wide), x[..., half:].to(wide)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(x.dtype)
