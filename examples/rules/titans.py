"""Titans: an MLP learnt by gradient descent with momentum and weight decay, all three rates given by the token.

Source: arXiv 2501.00663, equations 12 to 14 (``S_t = η_t S_{t−1} − θ_t ∇ℓ``, ``M_t = (1 − α_t) M_{t−1} + S_t``), the
gradient taken at the start of the mini-batch as in its section 3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from _run import Example, Normal, run
from torch.nn import functional as F
from torch.utils._pytree import tree_map


class Weights(NamedTuple):
    """``W1 [d, m]``, ``W2 [m, d]``."""

    W1: torch.Tensor
    W2: torch.Tensor


class State(NamedTuple):
    """The memory, and its momentum."""

    weights: Weights
    momentum: Weights


class Token(NamedTuple):
    """q, k, v ``[d]``; decay ``alpha``, momentum ``eta`` and rate ``theta`` are numbers."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    alpha: torch.Tensor
    eta: torch.Tensor
    theta: torch.Tensor


def memory(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """``silu(x W1) W2``."""
    return F.silu(x @ weights.W1) @ weights.W2


def step(anchor: State, carry: State, token: Token, shared: None) -> tuple[State, torch.Tensor]:
    """One token."""

    def loss(weights: Weights) -> torch.Tensor:
        return (memory(weights, token.k) - token.v).square().sum()

    gradient = torch.func.grad(loss)(anchor.weights)
    momentum = tree_map(lambda s, g: token.eta * s - token.theta * g, carry.momentum, gradient)
    weights = tree_map(lambda w, s: (1 - token.alpha) * w + s, carry.weights, momentum)
    return State(weights, momentum), memory(weights, token.q)


def example(
    normal: Normal, B: int = 2, H: int = 2, T: int = 37, d: int = 16, b: int = 16
) -> Example:
    """Small inputs."""
    weights = Weights(normal(H, d, 2 * d), normal(H, 2 * d, d))
    rows = [normal(B, H, T, d) for _ in range(3)]
    rates = [normal.gate(B, H, T, high=high) for high in (0.2, 0.9, 0.1)]
    return Example(
        State(weights, tree_map(torch.zeros_like, weights)), Token(*rows, *rates), None, b
    )


if __name__ == "__main__":
    run(step, example(Normal()))
