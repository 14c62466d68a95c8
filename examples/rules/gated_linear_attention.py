"""Gated linear attention: the state decays by a number for every channel of the keys, ``S_t = Diag(α_t) S_{t−1} + k_t ⊗ v_t``.

Source: arXiv 2312.06635, equation 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from _run import Example, Normal, run


class Token(NamedTuple):
    """q, k, v and the gates ``alpha``, all ``[d]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    alpha: torch.Tensor


def step(anchor: torch.Tensor, S: torch.Tensor, token: Token, shared: None):
    """One token: the state is ``S [d, d]``."""
    S = token.alpha[:, None] * S + torch.outer(token.k, token.v)
    return S, token.q @ S


def example(
    normal: Normal, B: int = 2, H: int = 2, T: int = 37, d: int = 16, b: int = 16
) -> Example:
    """Small inputs."""
    tokens = Token(*(normal(B, H, T, d) for _ in range(3)), normal.gate(B, H, T, d, low=0.5))
    return Example(normal(H, d, d), tokens, None, b)


if __name__ == "__main__":
    run(step, example(Normal()))
