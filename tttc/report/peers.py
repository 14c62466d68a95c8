"""Peers in a benchmark: what one would run in the place of TTT layers, where that applies and is installed."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tttc.nn.layers import TTTLayer, TTTLinear

ATTENTION, FLA = "attention", "flash-linear-attention"
NOTES = {
    ATTENTION: "another model: causal attention (PyTorch's) in the place of each TTT layer, run eagerly",
    FLA: "its chunk_ttt_linear in the place of the scan of each TTTLinear, which knows no tau; run eagerly",
}


class InPlaceOf(nn.Module):
    """A TTT layer with another way from q, k, v and its learning rates to the outputs of its heads.

    ``mix(layer, q, k, v, eta)`` takes ``[B, H, T, d]`` (eta ``[B, H, T]``) and returns the like. States are not kept:
    a benchmark reads from the start.
    """

    def __init__(self, layer: TTTLayer, mix: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.mix = layer, mix

    def forward(self, x: torch.Tensor, state: Any = None, *, return_state: bool = False) -> Any:
        """As the layer's own, from the start of a sequence."""
        layer = self.layer
        q, k, _ = layer._queries_and_keys(x, None)
        q, k, v = (layer._split_heads(y) for y in (q, k, layer.v_proj(x)))
        z = self.mix(layer, q, k, v, layer._learning_rates(x).to(v.dtype))
        y = layer.post_norm(z.transpose(1, 2).flatten(2))
        if layer.g_proj is not None:
            y = F.gelu(layer.g_proj(x), approximate="tanh") * y
        y = layer.o_proj(y)
        return (y, None) if return_state else y


def _attend(
    layer: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eta: Any
) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _chunk_ttt_linear(layer: Any, *tensors: torch.Tensor) -> torch.Tensor:
    from fla.ops.ttt import chunk_ttt_linear

    q, k, v, eta = (x.transpose(1, 2).contiguous() for x in tensors)  # [B, T, H, ...]
    batch, heads, d = q.shape[0], layer.num_heads, layer.head_dim
    out = chunk_ttt_linear(
        q,
        k,
        v,
        w=layer.norm_weight.to(q.dtype),
        b=layer.norm_bias.to(q.dtype),
        eta=eta[..., None],
        chunk_size=layer.mini_batch_size,
        initial_state=layer.W1.float().expand(batch, heads, d, d).contiguous(),
        initial_state_bias=layer.b1.float()[None, :, None].expand(batch, heads, 1, d).contiguous(),
    )
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def applicable(model: Any, device: torch.device) -> list[str]:
    """The peers that can stand beside a model on a device."""
    layers = _layers(model)
    names = [ATTENTION] if layers else []
    linear = bool(layers) and all(isinstance(x, TTTLinear) for x in layers)
    if linear and device.type == "cuda" and importlib.util.find_spec("fla") is not None:
        names.append(FLA)
    return names


def make(name: str, model: nn.Module) -> nn.Module:
    """A copy of the model with a peer in the place of each of its TTT layers."""
    mixes: dict[str, Callable[..., torch.Tensor]] = {ATTENTION: _attend, FLA: _chunk_ttt_linear}
    mix = mixes[name]
    copied = copy.deepcopy(model)
    if isinstance(copied, TTTLayer):
        return InPlaceOf(copied, mix)
    for parent in list(copied.modules()):
        for child, layer in list(parent.named_children()):
            if isinstance(layer, TTTLayer):
                setattr(parent, child, InPlaceOf(layer, mix))
    return copied


def _layers(model: Any) -> list[TTTLayer]:
    if not isinstance(model, nn.Module):
        return []
    return [m for m in model.modules() if isinstance(m, TTTLayer)]
