"""TTT-MLP with a whole-chunk update: a token is a tile of tokens, all of them are learnt before any is read.

Source: the update of TTT-MLP (arXiv 2407.04620) as its video model uses it (arXiv 2504.05298), per chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from _run import Example, Normal, run
from torch.nn import functional as F


class Chunk(NamedTuple):
    """A tile of tokens: q, k, v ``[c, d]`` and learning rates ``[c]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    eta: torch.Tensor


class Weights(NamedTuple):
    """Fast weights: ``W1 [d, m]``, ``b1 [m]``, ``W2 [m, d]``, ``b2 [d]``."""

    W1: torch.Tensor
    b1: torch.Tensor
    W2: torch.Tensor
    b2: torch.Tensor


def model(w: Weights, x: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """``x + LN(gelu(x W1 + b1) W2 + b2)``."""
    hidden = F.gelu(x @ w.W1 + w.b1, approximate="tanh")
    return x + F.layer_norm(hidden @ w.W2 + w.b2, x.shape[-1:], *norm, 1e-6)


def step(anchor: Weights, carry: Weights, chunk: Chunk, norm) -> tuple[Weights, torch.Tensor]:
    """One chunk: ``mini_batch_size=1`` of tiles."""

    def loss(w: Weights) -> torch.Tensor:
        error = (model(w, chunk.k, norm) - chunk.v).square().sum(-1)
        return 0.5 * (chunk.eta * error).sum()

    gradient = torch.func.grad(loss)(carry)
    new = Weights(*(w - g for w, g in zip(carry, gradient, strict=True)))
    return new, model(new, chunk.q, norm)


def example(normal: Normal, B: int = 2, H: int = 2, T: int = 3, d: int = 8, c: int = 16) -> Example:
    """Small inputs: T chunks of c tokens."""
    chunks = Chunk(*(normal(B, H, T, c, d) for _ in range(3)), normal.gate(B, H, T, c, high=0.1))
    weights = Weights(normal(H, d, 4 * d), normal(H, 4 * d), normal(H, 4 * d, d), normal(H, d))
    return Example(weights, chunks, (1.0 + normal(H, d), normal(H, d)), 1)


if __name__ == "__main__":
    run(step, example(Normal()))
