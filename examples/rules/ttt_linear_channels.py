"""TTT-Linear with a learning rate for every channel of the output and every token.

Source: arXiv 2407.04620, section 2.7 (learnable η), here a vector ``[d]`` in place of a number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from _run import Example, Normal, run
from torch.nn import functional as F


class Weights(NamedTuple):
    """``W [d, d]``, ``b [d]``."""

    W: torch.Tensor
    b: torch.Tensor


class Token(NamedTuple):
    """q, k, v and the rates ``eta``, all ``[d]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    eta: torch.Tensor


class Norm(NamedTuple):
    """Gain and bias ``[d]`` of the inner layer norm."""

    weight: torch.Tensor
    bias: torch.Tensor


def model(w: Weights, x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """``x + LN(x W + b)``."""
    return x + F.layer_norm(x @ w.W + w.b, x.shape[-1:], *norm, 1e-6)


def step(anchor: Weights, carry: Weights, token: Token, norm: Norm):
    """One token."""

    def loss(w: Weights) -> torch.Tensor:
        return 0.5 * (model(w, token.k, norm) - token.v).square().sum()

    gradient = torch.func.grad(loss)(anchor)
    new = Weights(carry.W - token.eta * gradient.W, carry.b - token.eta * gradient.b)
    return new, model(new, token.q, norm)


def example(
    normal: Normal, B: int = 2, H: int = 2, T: int = 37, d: int = 16, b: int = 16
) -> Example:
    """Small inputs."""
    tokens = Token(*(normal(B, H, T, d) for _ in range(3)), normal.gate(B, H, T, d, high=0.2))
    shared = Norm(1 + normal(H, d), normal(H, d))
    return Example(Weights(normal(H, d, d), normal(H, d)), tokens, shared, b)


if __name__ == "__main__":
    run(step, example(Normal()))
