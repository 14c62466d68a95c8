"""MIRAS with an L_p loss: ``½‖·‖²`` gives way to ``(1/p) Σ|f(k) − v|^p``; the state decays.

Source: arXiv 2504.13173, the ``ℓ_p`` attentional bias of its model Moneta (sign and power exact, not smoothed), with
the plain decay ``W_t = α_t W_{t−1} − η_t ∇ℓ`` for retention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from _run import Example, Normal, run

P = 3.0


class Token(NamedTuple):
    """q, k, v ``[d]``; retention ``alpha`` and rate ``eta`` are numbers."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    alpha: torch.Tensor
    eta: torch.Tensor


def step(anchor: torch.Tensor, W: torch.Tensor, token: Token, shared: None):
    """One token: the state is ``W [d, d]``."""

    def loss(W: torch.Tensor) -> torch.Tensor:
        return (token.k @ W - token.v).abs().pow(P).sum() / P

    W = token.alpha * W - token.eta * torch.func.grad(loss)(anchor)
    return W, token.q @ W


def example(
    normal: Normal, B: int = 2, H: int = 2, T: int = 37, d: int = 16, b: int = 16
) -> Example:
    """Small inputs."""
    rows = [normal(B, H, T, d) for _ in range(3)]
    rates = normal.gate(B, H, T, low=0.5), normal.gate(B, H, T, high=0.1)
    return Example(normal(H, d, d), Token(*rows, *rates), None, b)


if __name__ == "__main__":
    run(step, example(Normal()))
