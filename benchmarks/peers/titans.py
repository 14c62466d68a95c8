"""Titans as it is written with torch.func: the gradients of a mini-batch's tokens by vmap, then token after token.

Every token's gradient, momentum and weights are there as matrices, as in titans-pytorch (``NeuralMemory.store_memories``,
per-sample gradients under vmap); momentum and decay are a loop over the few tokens of a mini-batch, which torch.compile
fuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.func import grad, vmap
from torch.nn import functional as F

Tensor = torch.Tensor
Matrices = tuple[Tensor, Tensor]  # [B, H, d, m], [B, H, m, d]
Mapped = Callable[..., Any]


def memory(W1: Tensor, W2: Tensor, x: Tensor) -> Tensor:
    """``silu(x W1) W2``."""
    return F.silu(x @ W1) @ W2


def loss(weights: Matrices, k: Tensor, v: Tensor) -> Tensor:
    """Of one token."""
    return (memory(*weights, k) - v).square().sum()


def over_heads(f: Mapped) -> Mapped:
    """Over sequences and heads, the leading axes of everything."""
    return vmap(vmap(f))


GRADIENTS = over_heads(vmap(grad(loss), in_dims=(None, 0, 0)))
OUTPUTS = over_heads(vmap(memory))


def mini_batch(
    weights: Matrices, momentum: Matrices, q: Tensor, k: Tensor, v: Tensor,
    alpha: Tensor, eta: Tensor, theta: Tensor,
) -> tuple[Matrices, Matrices, Tensor]:  # fmt: skip
    """One mini-batch ``[B, H, b, ...]``: weights and momentum after it, and its outputs."""
    gradients = GRADIENTS(weights, k, v)
    alpha, eta, theta = (x[..., None, None] for x in (alpha, eta, theta))
    seen: list[list[Tensor]] = [[], []]
    W, S = list(weights), list(momentum)
    for t in range(q.shape[2]):
        for i in range(2):
            S[i] = eta[:, :, t] * S[i] - theta[:, :, t] * gradients[i][:, :, t]
            W[i] = (1 - alpha[:, :, t]) * W[i] + S[i]
            seen[i].append(W[i])
    z = OUTPUTS(*(torch.stack(x, 2) for x in seen), q)
    return (W[0], W[1]), (S[0], S[1]), z


def titans(
    body: Mapped, weights: Matrices, momentum: Matrices, tokens: tuple[Tensor, ...], size: int
) -> Tensor:
    """Whole mini-batches of ``size`` tokens ``[B, H, T, ...]`` by ``body``, which is :func:`mini_batch`, compiled or not."""
    batch, _, length = tokens[0].shape[:3]
    weights, momentum = _for_all(weights, batch), _for_all(momentum, batch)
    tokens = tuple(x.float() for x in tokens)
    out = []
    for start in range(0, length, size):
        weights, momentum, z = body(
            weights, momentum, *(x[:, :, start : start + size] for x in tokens)
        )
        out.append(z)
    return torch.cat(out, 2)


def _for_all(pair: Matrices, batch: int) -> Matrices:
    first, second = (x.expand(batch, *x.shape) for x in pair)
    return first, second
