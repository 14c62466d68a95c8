"""In half precision kernels are about as far from float64 as torch operations are, gradient by gradient."""

from __future__ import annotations

import statistics

import pytest
import torch
from marks import interpreted

import tttc
from tttc.nn import TTTMLP, TTTLinear
from tttc.runtime import fused_scan_backward

DRAWS = 3
# Gradients of these are sums over all tokens, of which a few are so large that rounding them to half precision once is
# most of the error: of what is added up there is more to compare.
OF_FEW_NUMBERS = ("tau_offset", "lr_proj.bias")


def results(layer, weights, x, cotangents):
    """Output and gradients, those of the scan's arguments too, in float64 or under autocast to float16."""
    cotangents.clear()
    layer.load_state_dict(weights)
    layer.zero_grad(set_to_none=True)
    exact = next(layer.parameters()).dtype is torch.float64
    x = x.to(next(layer.parameters()).dtype, copy=True).requires_grad_()
    with torch.autocast("cpu", torch.float16, enabled=not exact):
        y = layer(x)
    y.backward(torch.cos(torch.arange(y.numel())).reshape(y.shape).to(y.dtype))
    grads = {
        n: p.grad.double()
        for n, p in layer.named_parameters()
        if p.grad is not None and n not in OF_FEW_NUMBERS
    }
    scan = {f"argument {i} of the scan": g.double() for i, g in enumerate(cotangents)}
    return {"output": y.detach().double(), "input": x.grad.double(), **grads, **scan}


@interpreted
@pytest.mark.parametrize("kind", [TTTLinear, TTTMLP])
def test_kernels_are_as_exact_as_operations(kind, monkeypatch):
    """Root mean squares over draws. On a GPU ``benchmarks/scan_forward.py`` records the same in bfloat16, of every
    parameter, over more draws.
    """
    cotangents, run = [], fused_scan_backward._run

    def kept(*args):
        made = run(*args)
        cotangents.extend(x.detach().clone() for x in made)
        return made

    monkeypatch.setattr(fused_scan_backward, "_run", kept)

    def layer():
        return kind(128, 2, gate=True, share_qk=True)

    exact, operations, kernels = (
        tttc.compile(made, backend=backend, strict=True)
        for made, backend in ((layer().double(), "torch"), (layer(), "torch"), (layer(), "triton"))
    )
    squares: dict[str, list[list[float]]] = {}
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        weights, x = layer().state_dict(), torch.randn(1, 256, 128)
        want, *found = (results(f, weights, x, cotangents) for f in (exact, operations, kernels))
        for name, y in want.items():
            errors = [float((z[name] - y).norm() / y.norm()) ** 2 for z in found]
            squares.setdefault(name, []).append(errors)
    for name, of_draws in squares.items():
        theirs, ours = (statistics.fmean(x) ** 0.5 for x in zip(*of_draws, strict=True))
        assert ours <= 1.5 * theirs, f"{name}: {ours:.1e} against {theirs:.1e} of torch operations"
