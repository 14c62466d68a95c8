"""A deeper inner model: residual blocks of norm, matrix and activation, every matrix of them learnt while reading.

Source: deep memory modules of arXiv 2501.00663, section 3.1, updated as in arXiv 2407.04620, equation 6.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from _run import Example, Normal, run
from torch.nn import functional as F
from torch.utils._pytree import tree_map


class Token(NamedTuple):
    """q, k, v ``[d]``; the rate ``eta`` is a number."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    eta: torch.Tensor


class Norm(NamedTuple):
    """Gain and bias ``[d]`` that all blocks share: parameters of the outer model."""

    weight: torch.Tensor
    bias: torch.Tensor


def model(weights: list[torch.Tensor], x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Blocks ``x + tanh(LN(x) W)``."""
    for W in weights:
        x = x + torch.tanh(F.layer_norm(x, x.shape[-1:], *norm, 1e-6) @ W)
    return x


def step(anchor, carry, token: Token, norm: Norm):
    """One token: the state is a list of ``W [d, d]``."""

    def loss(weights: list[torch.Tensor]) -> torch.Tensor:
        return 0.5 * (model(weights, token.k, norm) - token.v).square().sum()

    gradient = torch.func.grad(loss)(anchor)
    new = tree_map(lambda w, g: w - token.eta * g, carry, gradient)
    return new, model(new, token.q, norm)


def example(
    normal: Normal, B: int = 2, H: int = 2, T: int = 37, d: int = 16, b: int = 16
) -> Example:
    """Small inputs."""
    tokens = Token(*(normal(B, H, T, d) for _ in range(3)), normal.gate(B, H, T, high=0.2))
    return Example(
        [normal(H, d, d) for _ in range(3)], tokens, Norm(1 + normal(H, d), normal(H, d)), b
    )


if __name__ == "__main__":
    run(step, example(Normal()))
