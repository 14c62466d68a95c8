"""LaCT: SwiGLU fast weights, updated once a chunk by Muon and scaled back to the norms they had at the start.

A token of the scan is a whole chunk, which is read before it is learnt, as in the paper's language model.

Source: arXiv 2505.23884, equations 5 to 9 and section 3.1; Newton-Schulz iteration of Muon (K. Jordan et al., 2024).
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


class Chunk(NamedTuple):
    """q, k, v ``[c, d]`` and the rates ``eta [c]`` of a chunk of c tokens."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    eta: torch.Tensor


def model(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """``(silu(x W1) ∘ x W3) W2``."""
    return (F.silu(x @ w.W1) * (x @ w.W3)) @ w.W2


def muon(G: torch.Tensor) -> torch.Tensor:
    """``U Vᵀ`` of ``G = U S Vᵀ``, nearly: five Newton-Schulz steps on the smaller side."""
    X = G / (G.square().sum().sqrt() + 1e-7)
    X = X.T if G.shape[0] > G.shape[1] else X
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T if G.shape[0] > G.shape[1] else X


def norms(W: torch.Tensor) -> torch.Tensor:
    """The norms of the columns of ``W``: of the weights of each output."""
    return W.square().sum(0).sqrt()


def step(anchor: Weights, w: Weights, chunk: Chunk, at_start: tuple[torch.Tensor, ...]):
    """One chunk; ``at_start``: the norms of the first weights."""

    def loss(w: Weights) -> torch.Tensor:
        return -(chunk.eta[:, None] * model(w, chunk.k) * chunk.v).sum()

    moved = tree_map(lambda w, g: w - muon(g), w, torch.func.grad(loss)(w))
    new = Weights(*(W * (n / (norms(W) + 1e-5)) for W, n in zip(moved, at_start, strict=True)))
    return new, model(w, chunk.q)


def example(
    normal: Normal, B: int = 2, H: int = 2, T: int = 3, d: int = 16, c: int = 32
) -> Example:
    """Small inputs: T chunks of c tokens."""
    chunks = Chunk(*(normal(B, H, T, c, d) for _ in range(3)), normal.gate(B, H, T, c, high=0.2))
    weights = Weights(normal(H, d, 2 * d), normal(H, 2 * d, d), normal(H, d, 2 * d))
    return Example(weights, chunks, tuple(torch.vmap(norms)(W) for W in weights), 1)


if __name__ == "__main__":
    run(step, example(Normal()))
