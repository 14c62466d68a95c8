"""Several inner steps: from the weights at the start of the mini-batch, every token descends twice on its own loss.

Source: the inner loop of arXiv 2407.04620 (equation 4) with the step repeated, as in MAML (arXiv 1703.03400,
section 2.2); the sum of a token's steps is what it adds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from _run import Example, Normal, run
from torch.nn import functional as F
from torch.utils._pytree import tree_map

STEPS = 2


class Weights(NamedTuple):
    """``W [d, d]``, ``b [d]``."""

    W: torch.Tensor
    b: torch.Tensor


class Token(NamedTuple):
    """q, k, v ``[d]``; the rate ``eta`` is a number."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    eta: torch.Tensor


def model(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """``x + LN(x W + b)``."""
    return x + F.layer_norm(x @ weights.W + weights.b, x.shape[-1:], eps=1e-6)


def step(anchor: Weights, carry: Weights, token: Token, shared: None):
    """One token."""

    def loss(weights: Weights) -> torch.Tensor:
        return 0.5 * (model(weights, token.k) - token.v).square().sum()

    own = anchor
    for _ in range(STEPS):
        own = tree_map(lambda w, g: w - token.eta * g, own, torch.func.grad(loss)(own))
    new = tree_map(lambda w, mine, start: w + (mine - start), carry, own, anchor)
    return new, model(new, token.q)


def example(
    normal: Normal, B: int = 2, H: int = 2, T: int = 37, d: int = 16, b: int = 16
) -> Example:
    """Small inputs."""
    tokens = Token(*(normal(B, H, T, d) for _ in range(3)), normal.gate(B, H, T, high=0.2))
    return Example(Weights(normal(H, d, d), normal(H, d)), tokens, None, b)


if __name__ == "__main__":
    run(step, example(Normal()))
