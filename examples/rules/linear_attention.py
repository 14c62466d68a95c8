"""Linear attention: the inner loss ``−(k W)·v`` has the gradient ``−k ⊗ v``, whatever the weights are.

Source: arXiv 2006.16236, equations 18 to 20 (feature map ``elu + 1``, its normaliser carried beside the weights).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from _run import Example, Normal, run
from torch.nn import functional as F


class State(NamedTuple):
    """``W [d, d]`` and the sum of keys ``n [d]``."""

    W: torch.Tensor
    n: torch.Tensor


class Token(NamedTuple):
    """q, k, v ``[d]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def step(anchor: State, carry: State, token: Token, shared: None) -> tuple[State, torch.Tensor]:
    """One token."""
    q, k = F.elu(token.q) + 1, F.elu(token.k) + 1
    gradient = torch.func.grad(lambda W: -(k @ W).dot(token.v))(anchor.W)
    new = State(carry.W - gradient, carry.n + k)
    return new, q @ new.W / (q.dot(new.n) + 1e-6)


def example(
    normal: Normal, B: int = 2, H: int = 2, T: int = 37, d: int = 16, b: int = 16
) -> Example:
    """Small inputs."""
    tokens = Token(*(normal(B, H, T, d) for _ in range(3)))
    return Example(State(normal(H, d, d), normal.gate(H, d)), tokens, None, b)


if __name__ == "__main__":
    run(step, example(Normal()))
