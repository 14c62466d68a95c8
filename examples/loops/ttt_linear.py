"""TTT-Linear as one would first write it: a Python loop over tokens, the gradient by autograd.

Source: arXiv 2407.04620. ``tttc.compile(TTTLinearLoop(64, 4))`` compiles it as it stands.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class TTTLinearLoop(nn.Module):
    """``[B, T, width] -> [B, T, width]``; ``mini_batch`` tokens take their gradients at the same weights."""

    def __init__(self, width: int, heads: int, mini_batch: int = 16) -> None:
        super().__init__()
        d = width // heads
        self.heads, self.mini_batch = heads, mini_batch
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.rate = nn.Linear(width, heads)
        self.out = nn.Linear(width, width, bias=False)
        self.W0 = nn.Parameter(0.02 * torch.randn(heads, d, d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, width = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        eta = torch.sigmoid(self.rate(x)).transpose(1, 2) / q.shape[-1]
        W = self.W0.expand(B, -1, -1, -1)
        outs = []

        def f(W, x):
            return x + F.layer_norm(torch.einsum("bhi,bhij->bhj", x, W), x.shape[-1:], eps=1e-6)

        def loss(W, k, v):
            return 0.5 * (f(W, k) - v).square().sum()

        for t in range(T):
            if t % self.mini_batch == 0:
                anchor = W
            gradient = torch.func.grad(loss)(anchor, k[:, :, t], v[:, :, t])
            W = W - eta[:, :, t, None, None] * gradient
            outs.append(f(W, q[:, :, t]))
        return self.out(torch.stack(outs, 1).reshape(B, T, width))


if __name__ == "__main__":
    from examples.loops._run import run

    torch.manual_seed(0)
    run(TTTLinearLoop(16, 2, 4), [torch.randn(2, 18, 16)])
