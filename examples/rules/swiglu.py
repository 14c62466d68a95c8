"""A gated inner model: the fast weights are those of a SwiGLU, updated token by token.

Source: the fast weights of arXiv 2505.23884, equation 5, with the update of arXiv 2407.04620, equation 6.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from _run import Example, Normal, run
from torch.nn import functional as F
from torch.utils._pytree import tree_map


class Weights(NamedTuple):
    """``W1`` and ``W3 [d, m]``, ``W2 [m, d]``."""

    W1: torch.Tensor
    W2: torch.Tensor
    W3: torch.Tensor


class Token(NamedTuple):
    """q, k, v ``[d]``; the rate ``eta`` is a number."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    eta: torch.Tensor


def model(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """``(silu(x W1) ∘ x W3) W2``."""
    return (F.silu(x @ w.W1) * (x @ w.W3)) @ w.W2


def step(anchor: Weights, carry: Weights, token: Token, shared: None):
    """One token."""
    gradient = torch.func.grad(lambda w: -model(w, token.k).dot(token.v))(anchor)
    new = tree_map(lambda w, g: w - token.eta * g, carry, gradient)
    return new, model(new, token.q)


def example(
    normal: Normal, B: int = 2, H: int = 2, T: int = 37, d: int = 16, b: int = 16
) -> Example:
    """Small inputs."""
    tokens = Token(*(normal(B, H, T, d) for _ in range(3)), normal.gate(B, H, T, high=0.2))
    weights = Weights(normal(H, d, 2 * d), normal(H, 2 * d, d), normal(H, d, 2 * d))
    return Example(weights, tokens, None, b)


if __name__ == "__main__":
    run(step, example(Normal()))
