"""The inner models of TTT-Linear and TTT-MLP, and their update: one token, one head, one sequence.

A step closes over nothing but this module, so that graph capture can carry it as a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

INNER_EPS = 1e-6


class Token(NamedTuple):
    """What the update reads of one token: q, k, v ``[d]``, and two scalars."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    eta: torch.Tensor  # the learning rate of this token
    tau: torch.Tensor  # how much of the update so far counts at this place of the mini-batch


class Norm(NamedTuple):
    """Gain and bias ``[d]`` of the inner layer norm; outer parameters."""

    weight: torch.Tensor
    bias: torch.Tensor


class LinearWeights(NamedTuple):
    """Fast weights of TTT-Linear: ``W1 [d, d]``, ``b1 [d]``."""

    W1: torch.Tensor
    b1: torch.Tensor


class MLPWeights(NamedTuple):
    """Fast weights of TTT-MLP: ``W1 [d, 4d]``, ``b1 [4d]``, ``W2 [4d, d]``, ``b2 [d]``."""

    W1: torch.Tensor
    b1: torch.Tensor
    W2: torch.Tensor
    b2: torch.Tensor


class Carry(NamedTuple):
    """The state of a scan: fast weights, and the sum of all weighted gradients read so far."""

    weights: Any
    gradients: Any


def _residual_norm(x: torch.Tensor, y: torch.Tensor, norm: Norm) -> torch.Tensor:
    return x + F.layer_norm(y, y.shape[-1:], norm.weight, norm.bias, INNER_EPS)


def linear_model(weights: LinearWeights, x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """``x + LN(x W1 + b1)``."""
    return _residual_norm(x, x @ weights.W1 + weights.b1, norm)


def mlp_model(weights: MLPWeights, x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """``x + LN(gelu_tanh(x W1 + b1) W2 + b2)``."""
    hidden = F.gelu(x @ weights.W1 + weights.b1, approximate="tanh")
    return _residual_norm(x, hidden @ weights.W2 + weights.b2, norm)


def _update(
    model: Callable[..., torch.Tensor], anchor: Carry, carry: Carry, token: Token, norm: Norm
) -> tuple[Carry, torch.Tensor]:
    """``W_t = A - tau_t sum_{s<=t} eta_s G_s``, the sum over the mini-batch, G_s taken at its anchor A."""

    def loss(weights: Any) -> torch.Tensor:
        return 0.5 * (model(weights, token.k, norm) - token.v).square().sum()

    gradient = torch.func.grad(loss)(anchor.weights)
    # The sums run on from mini-batch to mini-batch and only their differences are used: a step sees
    # no place, so it could not reset them.
    gradients = pytree.tree_map(lambda s, g: s + token.eta * g, carry.gradients, gradient)
    weights = pytree.tree_map(
        lambda w, s, s0: w - token.tau * (s - s0), anchor.weights, gradients, anchor.gradients
    )
    return Carry(weights, gradients), model(weights, token.q, norm)


def linear_step(
    anchor: Carry, carry: Carry, token: Token, shared: Norm
) -> tuple[Carry, torch.Tensor]:
    """One token of TTT-Linear."""
    return _update(linear_model, anchor, carry, token, shared)


def mlp_step(anchor: Carry, carry: Carry, token: Token, shared: Norm) -> tuple[Carry, torch.Tensor]:
    """One token of TTT-MLP."""
    return _update(mlp_model, anchor, carry, token, shared)
