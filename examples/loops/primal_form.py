"""TTT-Linear a mini-batch at a time, in the primal form: every token's gradient and weights are made.

Source: section 2.4 of arXiv 2407.04620. Compiled, no matrix is made for any token: it gets the dual form.
Run: ``python -m examples.loops.primal_form``
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class PrimalForm(nn.Module):
    """``q, k, v [B, H, T, d] -> [B, H, T, d]``; the last mini-batch may be shorter."""

    def __init__(self, heads: int, d: int, mini_batch: int = 16) -> None:
        super().__init__()
        self.mini_batch = mini_batch
        self.rate = nn.Linear(d, 1)
        self.W0 = nn.Parameter(0.02 * torch.randn(heads, d, d))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        B, _, T, d = q.shape
        W = self.W0.expand(B, -1, -1, -1)
        outs = []
        for i in range(0, T, self.mini_batch):
            q_b, k_b, v_b = (x[:, :, i : i + self.mini_batch] for x in (q, k, v))
            error = torch.einsum("bhti,bhij->bhtj", k_b, W) - v_b
            error = torch.sigmoid(self.rate(k_b)) / d * error
            gradients = torch.einsum("bhti,bhtj->bhtij", k_b, error)  # a matrix for every token
            weights = W.unsqueeze(2) - gradients.cumsum(dim=2)
            outs.append(q_b + F.layer_norm(torch.einsum("bhti,bhtij->bhtj", q_b, weights), (d,)))
            W = weights[:, :, -1]
        return torch.cat(outs, dim=2)


if __name__ == "__main__":
    from examples.loops._run import run

    torch.manual_seed(0)
    run(PrimalForm(2, 8, 4), [torch.randn(2, 2, 18, 8) for _ in range(3)])
