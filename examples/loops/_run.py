"""What the loops share when they run as scripts: compile time cold and warm, and a comparison with the loop itself."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn

import tttc


def run(
    model: nn.Module, inputs: Sequence[torch.Tensor], reference: nn.Module | None = None
) -> None:
    """Compile a model, forward and backward, and print how long it takes and how far it is from its own loop.

    ``reference`` runs in the place of the model where that has no gradient of its own.
    """
    model = model.double()

    def results(f: nn.Module) -> list[torch.Tensor]:
        leaves = [x.double().requires_grad_() for x in inputs]
        out = f(*leaves)
        # A sum with weights that differ, so that no gradient cancels by symmetry.
        total = (out * torch.linspace(0.5, 1.5, out.numel()).view(out.shape).to(out)).sum()
        return [out.detach(), *torch.autograd.grad(total, [*leaves, *f.parameters()])]

    def timed() -> tuple[float, list[torch.Tensor]]:
        torch._dynamo.reset()
        start = time.perf_counter()
        got = results(tttc.compile(model, strict=True))
        return time.perf_counter() - start, got

    cold, _ = timed()
    warm, got = timed()
    print(f"first forward and backward, from nothing:     {cold:.1f} s")
    print(f"again, the loop known to the process:         {warm:.1f} s")
    expected = results(model if reference is None else reference.double())
    names = ["output", *["gradient"] * (len(got) - 1)]
    for kind in ("output", "gradient"):
        error = max(
            float((x - y).abs().max())
            for x, y, name in zip(got, expected, names, strict=True)
            if name == kind
        )
        print(f"largest error of {kind + 's':<9} against the loop:   {error:.1e} (float64)")
