"""DeltaNet: online gradient descent on ``½‖k W − v‖²``, one step a token at its own rate.

Source: arXiv 2406.06484, equation 1 (``S_t = S_{t-1} − β_t (S_{t-1} k_t − v_t) k_tᵀ``); keys have norm 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from _run import Example, Normal, run
from torch.nn import functional as F


class Token(NamedTuple):
    """q, k, v ``[d]`` and the rate ``beta``, a number."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    beta: torch.Tensor


def step(anchor: torch.Tensor, W: torch.Tensor, token: Token, shared: None):
    """One token: the state is ``W [d, d]``."""
    k = F.normalize(token.k, dim=-1)

    def loss(W: torch.Tensor) -> torch.Tensor:
        return 0.5 * (k @ W - token.v).square().sum()

    W = W - token.beta * torch.func.grad(loss)(W)
    return W, token.q @ W


def example(normal: Normal, B: int = 2, H: int = 2, T: int = 37, d: int = 16) -> Example:
    """Small inputs."""
    tokens = Token(*(normal(B, H, T, d) for _ in range(3)), normal.gate(B, H, T))
    return Example(normal(H, d, d), tokens, None, 1)


if __name__ == "__main__":
    run(step, example(Normal()))
