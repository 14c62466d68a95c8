"""Which operators reach the compiler in primitive pieces, so that fusion sees through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import get_decompositions

aten = torch.ops.aten

_PRIMITIVE: list[Any] = [
    aten._fused_rms_norm,
    aten._fused_rms_norm_backward,
    aten._log_softmax,
    aten._log_softmax_backward_data,
    aten._softmax,
    aten._softmax_backward_data,
    aten.addcdiv,
    aten.addcmul,
    aten.elu,
    aten.elu_backward,
    aten.gelu,
    aten.gelu_backward,
    aten.hardtanh,
    aten.hardtanh_backward,
    aten.leaky_relu,
    aten.leaky_relu_backward,
    aten.lerp,
    aten.log_sigmoid_backward,
    aten.log_sigmoid_forward,
    aten.logsumexp.default,
    aten.masked_fill,
    aten.native_layer_norm,
    aten.native_layer_norm_backward,
    aten.new_full,
    aten.new_ones,
    aten.new_zeros,
    aten.rsub.Tensor,
    aten.select_backward,
    aten.sigmoid_backward,
    aten.silu,
    aten.silu_backward,
    aten.slice_backward,
    aten.split.Tensor,
    aten.split_with_sizes,
    aten.stack,
    aten.tanh_backward,
    aten.threshold_backward,
    aten.unbind,
]


def _var_mean(
    x: torch.Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two passes over values that are on chip by then: no cancellation, and nothing but row sums."""
    axes = list(range(x.dim())) if dim is None else [d % x.dim() for d in dim]
    count = 1
    for d in axes:
        count = count * x.shape[d]
    divisor = count - (1 if correction is None else correction)
    mean = x.mean(axes, True)
    away = x - mean
    variance = (away * away).sum(axes, True) / divisor
    if keepdim:
        return variance, mean
    return variance.squeeze(axes), mean.squeeze(axes)


def _var(
    x: torch.Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False
) -> torch.Tensor:
    return _var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def _softplus(x: torch.Tensor, beta: float = 1.0, threshold: float = 20.0) -> torch.Tensor:
    """``log(1 + exp(beta x)) / beta``, and ``x`` where ``beta x`` is beyond the threshold."""
    scaled = x * beta
    large = scaled > threshold
    return torch.where(large, x, torch.log1p(torch.exp(torch.where(large, 0.0, scaled))) / beta)


def _softplus_backward(
    grad: torch.Tensor, x: torch.Tensor, beta: float, threshold: float
) -> torch.Tensor:
    """The cotangent of its argument."""
    scaled = x * beta
    return torch.where(scaled > threshold, grad, grad * torch.sigmoid(scaled))


def _mish(x: torch.Tensor) -> torch.Tensor:
    """``x tanh(softplus(x))``."""
    return x * torch.tanh(_softplus(x))


def _mish_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The cotangent of its argument."""
    gate = torch.tanh(_softplus(x))
    return grad * (gate + x * torch.sigmoid(x) * (1.0 - gate * gate))


# PyTorch's own take the exponential of any argument and choose afterwards: where it overflows, the derivative of what was
# not chosen is zero times infinity. The derivatives of these, and theirs, stay finite.
ACTIVATIONS: dict[Any, Callable[..., torch.Tensor]] = {
    aten.softplus.default: _softplus,
    aten.softplus_backward.default: _softplus_backward,
    aten.mish.default: _mish,
    aten.mish_backward.default: _mish_backward,
}


def decompositions() -> dict[torch._ops.OperatorBase, Callable[..., Any]]:
    """The table to hand to ``aot_autograd(decompositions=...)``.

    Norms, softmax, activations and their gradients become pointwise operations and row sums; matrix products,
    convolutions, embeddings and attention stay whole.
    """
    table = dict(get_decompositions(_PRIMITIVE)) | ACTIVATIONS
    table[aten.var_mean.correction] = _var_mean
    table[aten.var.correction] = _var
    return table
