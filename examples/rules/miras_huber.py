"""MIRAS with a Huber loss: errors beyond a threshold, given by the token, count by their size alone; the state decays.

Source: arXiv 2504.13173, the model Yaad: Huber loss with thresholds ``δ_t``, here by coordinates, and
``W_t = α_t W_{t−1} − η_t ∇ℓ``.
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


class Token(NamedTuple):
    """q, k, v, thresholds ``delta``, all ``[d]``; retention ``alpha`` and rate ``eta`` are numbers."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    delta: torch.Tensor
    alpha: torch.Tensor
    eta: torch.Tensor


def memory(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """``x + gelu(x W1) W2``."""
    return x + F.gelu(x @ weights.W1, approximate="tanh") @ weights.W2


def step(anchor: Weights, carry: Weights, token: Token, shared: None):
    """One token."""

    def loss(weights: Weights) -> torch.Tensor:
        error, delta = memory(weights, token.k) - token.v, token.delta
        small, large = 0.5 * error.square(), delta * (error.abs() - 0.5 * delta)
        return torch.where(error.abs() <= delta, small, large).sum()

    gradient = torch.func.grad(loss)(anchor)
    new = tree_map(lambda w, g: token.alpha * w - token.eta * g, carry, gradient)
    return new, memory(new, token.q)


def example(
    normal: Normal, B: int = 2, H: int = 2, T: int = 37, d: int = 16, b: int = 16
) -> Example:
    """Small inputs."""
    rows = [*(normal(B, H, T, d) for _ in range(3)), normal.gate(B, H, T, d)]
    rates = normal.gate(B, H, T, low=0.5), normal.gate(B, H, T, high=0.1)
    weights = Weights(normal(H, d, 2 * d), normal(H, 2 * d, d))
    return Example(weights, Token(*rows, *rates), None, b)


if __name__ == "__main__":
    run(step, example(Normal()))
