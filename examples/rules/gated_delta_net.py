"""Gated DeltaNet: the delta rule on a state that decays first, by a gate of its own for every token.

Source: arXiv 2412.06464, equation 10 (``S_t = α_t S_{t-1} (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ``); keys have norm 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from _run import Example, Normal, run
from torch.nn import functional as F


class Token(NamedTuple):
    """q, k, v ``[d]``, the gate ``alpha`` and the rate ``beta``, numbers between 0 and 1."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    alpha: torch.Tensor
    beta: torch.Tensor


def step(anchor: torch.Tensor, W: torch.Tensor, token: Token, shared: None):
    """One token: the state is ``W [d, d]``."""
    k = F.normalize(token.k, dim=-1)

    def loss(W: torch.Tensor) -> torch.Tensor:
        return 0.5 * (k @ W - token.v).square().sum()

    W = token.alpha * W
    W = W - token.beta * torch.func.grad(loss)(W)
    return W, token.q @ W


def example(normal: Normal, B: int = 2, H: int = 2, T: int = 37, d: int = 16) -> Example:
    """Small inputs."""
    tokens = Token(
        *(normal(B, H, T, d) for _ in range(3)), normal.gate(B, H, T, low=0.5), normal.gate(B, H, T)
    )
    return Example(normal(H, d, d), tokens, None, 1)


if __name__ == "__main__":
    run(step, example(Normal()))
