"""Fast weights by PyTorch's own scan: one over mini-batches, which holds the anchor, and one over their tokens.

Source: the mini-batch inner loop of arXiv 2407.04620, section 2.4, its gradient written by hand.
Run: ``python -m examples.loops.torch_scan``
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch._higher_order_ops.scan import scan


class ScannedMemory(nn.Module):
    """``[B, T, width] -> [B, T, width]``; T is a multiple of the mini-batch."""

    def __init__(self, width: int, mini_batch: int = 16) -> None:
        super().__init__()
        self.mini_batch, self.scan = mini_batch, scan
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.W0 = nn.Parameter(0.02 * torch.randn(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, width = x.shape

        def token(W, anchor, q, k, v):
            error = torch.tanh(torch.einsum("bi,bij->bj", k, anchor)) - v
            W = W - torch.einsum("bi,bj->bij", k, error) / width
            return W, torch.einsum("bi,bij->bj", q, W)

        def mini_batch(anchor, tokens):
            return self.scan(lambda W, t: token(W, anchor, *t), anchor.clone(), tokens)

        tokens = tuple(
            f(x).unflatten(1, (T // self.mini_batch, self.mini_batch)).permute(1, 2, 0, 3)
            for f in (self.q, self.k, self.v)
        )
        _, z = self.scan(mini_batch, self.W0.expand(B, -1, -1).clone(), tokens)
        return z.flatten(0, 1).transpose(0, 1)


def as_loop(combine, init, xs):
    """The loop that a scan stands for; PyTorch itself has no gradient of a scan inside a scan."""
    ys = []
    for x in zip(*xs, strict=True):
        init, y = combine(init, x)
        ys.append(y)
    return init, torch.stack(ys)


if __name__ == "__main__":
    from examples.loops._run import run

    torch.manual_seed(0)
    model = ScannedMemory(8, 4)
    reference = copy.deepcopy(model)
    reference.scan = as_loop
    run(model, [torch.randn(2, 16, 8)], reference)
