"""Fast weights that are vectors: gain and bias of a layer norm, learnt with momentum and decay.

Source: the update of arXiv 2501.00663, equations 13 and 14, for the parameters that test-time adaptation learns
(arXiv 2006.10726, section 3.2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from _run import Example, Normal, run
from torch.nn import functional as F
from torch.utils._pytree import tree_map


class Weights(NamedTuple):
    """Gain and bias ``[d]``."""

    gain: torch.Tensor
    bias: torch.Tensor


class State(NamedTuple):
    """The weights, and their momentum."""

    weights: Weights
    momentum: Weights


class Token(NamedTuple):
    """q, k, v ``[d]``; the rate ``eta`` is a number."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    eta: torch.Tensor


def model(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """``x + tanh(gain LN(x) + bias)``."""
    # Not layer_norm's own weight and bias: PyTorch 2.13 differentiates their gradient wrongly by x.
    return x + torch.tanh(w.gain * F.layer_norm(x, x.shape[-1:], eps=1e-6) + w.bias)


def step(anchor: State, carry: State, token: Token, shared: dict[str, torch.Tensor]):
    """One token; decay and momentum are parameters of the layer."""

    def loss(w: Weights) -> torch.Tensor:
        return 0.5 * (model(w, token.k) - token.v).square().sum()

    gradient = torch.func.grad(loss)(anchor.weights)
    momentum = tree_map(lambda s, g: shared["beta"] * s + g, carry.momentum, gradient)
    weights = tree_map(lambda w, s: shared["decay"] * w - token.eta * s, carry.weights, momentum)
    return State(weights, momentum), model(weights, token.q)


def example(
    normal: Normal, B: int = 2, H: int = 2, T: int = 37, d: int = 16, b: int = 16
) -> Example:
    """Small inputs."""
    tokens = Token(*(normal(B, H, T, d) for _ in range(3)), normal.gate(B, H, T, high=0.2))
    weights = Weights(1 + normal(H, d), normal(H, d))
    shared = {"beta": normal.gate(H), "decay": normal.gate(H, low=0.8)}
    return Example(State(weights, tree_map(torch.zeros_like, weights)), tokens, shared, b)


if __name__ == "__main__":
    run(step, example(Normal()))
