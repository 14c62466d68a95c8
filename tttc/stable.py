"""Activations in pieces whose derivatives, and the derivatives of these, stay finite wherever they are.

PyTorch's own decompositions take the exponential of any argument and choose afterwards: where it overflows, the derivative
of what was not chosen is zero times infinity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten


def softplus(x: torch.Tensor, beta: float = 1.0, threshold: float = 20.0) -> torch.Tensor:
    """``log(1 + exp(beta x)) / beta``, and ``x`` where ``beta x`` is beyond the threshold."""
    scaled = x * beta
    large = scaled > threshold
    return torch.where(large, x, torch.log1p(torch.exp(torch.where(large, 0.0, scaled))) / beta)


def softplus_backward(
    grad: torch.Tensor, x: torch.Tensor, beta: float, threshold: float
) -> torch.Tensor:
    """The cotangent of its argument."""
    scaled = x * beta
    return torch.where(scaled > threshold, grad, grad * torch.sigmoid(scaled))


def mish(x: torch.Tensor) -> torch.Tensor:
    """``x tanh(softplus(x))``."""
    return x * torch.tanh(softplus(x))


def mish_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The cotangent of its argument."""
    gate = torch.tanh(softplus(x))
    return grad * (gate + x * torch.sigmoid(x) * (1.0 - gate * gate))


STABLE: dict[Any, Callable[..., torch.Tensor]] = {
    aten.softplus.default: softplus,
    aten.softplus_backward.default: softplus_backward,
    aten.mish.default: mish,
    aten.mish_backward.default: mish_backward,
}
