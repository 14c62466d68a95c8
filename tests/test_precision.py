"""In half precision kernels are about as far from float64 as torch operations are, gradient by gradient."""

from __future__ import annotations

import statistics

import pytest
import torch
from marks import interpreted

import tttc
from tttc.nn import TTTMLP, TTTLinear

DRAWS = 3


def results(layer, weights, x):
    """Output and gradients, in float64 or under autocast to float16."""
    layer.load_state_dict(weights)
    layer.zero_grad(set_to_none=True)
    exact = next(layer.parameters()).dtype is torch.float64
    x = x.to(next(layer.parameters()).dtype, copy=True).requires_grad_()
    with torch.autocast("cpu", torch.float16, enabled=not exact):
        y = layer(x)
    y.backward(torch.cos(torch.arange(y.numel())).reshape(y.shape).to(y.dtype))
    grads = {n: p.grad.double() for n, p in layer.named_parameters() if p.grad is not None}
    return {"output": y.detach().double(), "input": x.grad.double(), **grads}


@interpreted
@pytest.mark.parametrize("kind", [TTTLinear, TTTMLP])
def test_kernels_are_as_exact_as_operations(kind):
    """Root mean squares over draws, as of the learning rates' bias there is one number a head.

    Of few tokens or narrow heads the gradient of ``tau_offset`` is a sum that cancels, and is farther off than this allows
    (docs/limits.md): operands of products are rounded, which torch operations do not do. On a GPU
    ``benchmarks/scan_forward.py`` records the same in bfloat16.
    """

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
        want, *found = (results(f, weights, x) for f in (exact, operations, kernels))
        for name, y in want.items():
            errors = [float((z[name] - y).norm() / y.norm()) ** 2 for z in found]
            squares.setdefault(name, []).append(errors)
    for name, of_draws in squares.items():
        theirs, ours = (statistics.fmean(x) ** 0.5 for x in zip(*of_draws, strict=True))
        assert ours <= 1.5 * theirs, f"{name}: {ours:.1e} against {theirs:.1e} of torch operations"
