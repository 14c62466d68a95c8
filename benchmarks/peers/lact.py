"""LaCT as its authors write it: a chunk at a time, batched matrix products in bf16, gradients by hand, under torch.compile.

Source: arXiv 2505.23884 and its code (a1600012888/LaCT, ``block_causal_lact_swiglu``), changed where examples/rules/lact.py
differs: one rate for all three weights, Newton-Schulz on float32 weights with products in bf16.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

Tensor = torch.Tensor
Weights = tuple[Tensor, Tensor, Tensor]


def product(a: Tensor, b: Tensor) -> Tensor:
    """A batched product in bf16."""
    return torch.bmm(a.bfloat16(), b.bfloat16())


def muon(G: Tensor) -> Tensor:
    """Five Newton-Schulz steps for every matrix of a batch."""
    X = G / (G.square().sum((1, 2), keepdim=True).sqrt() + 1e-7)
    tall = G.shape[1] > G.shape[2]
    X = X.mT if tall else X
    for _ in range(5):
        A = product(X, X.mT)
        X = 3.4445 * X + product(-4.7750 * A + 2.0315 * product(A, A), X)
    return X.mT if tall else X


def chunk(
    w: Weights, norms: Weights, q: Tensor, k: Tensor, v: Tensor, eta: Tensor
) -> tuple[Weights, Tensor]:
    """One chunk ``[N, c, d]`` of N heads: its output by the weights before it, and the weights after it."""
    W1, W2, W3 = w
    z = product(F.silu(product(q, W1)) * product(q, W3), W2)
    gate, up = product(k, W1), product(k, W3)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    seen = -eta[..., None] * v
    d_hidden = product(seen, W2.mT)
    d_up = d_hidden * silu
    d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    grads = (product(k.mT, d_gate), product((silu * up).mT, seen), product(k.mT, d_up))
    moved = (W - muon(g.float()) for W, g in zip(w, grads, strict=True))
    new = tuple(
        W * (n / (W.square().sum(1, keepdim=True).sqrt() + 1e-5))
        for W, n in zip(moved, norms, strict=True)
    )
    return new, z  # type: ignore[return-value]


def lact(
    w: Weights, norms: Weights, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, size: int
) -> Tensor:
    """q, k, v ``[B, T, H, d]``, eta ``[B, T, H]``, weights ``[H, ...]``, their norms ``[H, m]``; the output as q."""
    batch, length, heads, d = q.shape
    q, k, v = (x.transpose(1, 2).reshape(batch * heads, length, d) for x in (q, k, v))
    eta = eta.transpose(1, 2).reshape(batch * heads, length)
    w = tuple(x.repeat(batch, 1, 1) for x in w)  # type: ignore[assignment]
    norms = tuple(n.repeat(batch, 1)[:, None] for n in norms)  # type: ignore[assignment]
    out = []
    for start in range(0, length, size):
        part = slice(start, start + size)
        w, z = chunk(w, norms, q[:, part], k[:, part], v[:, part], eta[:, part])
        out.append(z)
    return torch.cat(out, 1).unflatten(0, (batch, heads)).transpose(1, 2)
