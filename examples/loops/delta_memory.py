"""An associative memory with momentum and forgetting, its state in a dict, its output written as it goes.

Source: the update of Titans (arXiv 2501.00663) for a memory that is a matrix, its gradient written by hand.
"""

from __future__ import annotations

import torch
from torch import nn


class DeltaMemory(nn.Module):
    """``[B, T, width] -> [B, T, width]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.alpha, self.beta, self.theta = (nn.Linear(width, 1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, width = x.shape
        state = {"W": x.new_zeros(B, width, width), "S": x.new_zeros(B, width, width)}
        out = torch.empty_like(x)
        for t in range(T):
            q, k, v = self.q(x[:, t]), self.k(x[:, t]), self.v(x[:, t])
            alpha, beta, theta = (
                torch.sigmoid(gate(x[:, t])).unsqueeze(-1)
                for gate in (self.alpha, self.beta, self.theta)
            )
            error = torch.einsum("bi,bij->bj", k, state["W"]) - v
            gradient = torch.einsum("bi,bj->bij", k, error) / width
            state["S"] = beta * state["S"] - theta * gradient
            state["W"] = (1 - alpha) * state["W"] + state["S"]
            out[:, t] = torch.einsum("bi,bij->bj", q, state["W"])
        return out


if __name__ == "__main__":
    from examples.loops._run import run

    torch.manual_seed(0)
    run(DeltaMemory(8), [torch.randn(2, 18, 8)])
