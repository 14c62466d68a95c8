"""Every style of loop by kernels, at 4096 tokens in bfloat16: outputs and gradients against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from marks import on_gpu

import tttc
from tests import test_loop_anchors as anchors
from tests import test_loop_mini_batches as mini_batches
from tests import test_loop_nested as nested
from tests import test_loops as loops
from tests.test_loops import fresh_dynamo, gradients, heads, leaves, plans_of, qkv, wide  # noqa: F401

pytestmark = on_gpu

TOKENS = 4096
ERROR = 5e-2  # relative: bfloat16 tokens, operands of products and, where it has any, layers around the loop
FEATURES = 16  # a norm of four makes so much of what products round to bfloat16 that a gradient is 14 % off


@pytest.fixture(autouse=True)
def features(monkeypatch):
    for module in (loops, anchors, mini_batches, nested):
        monkeypatch.setattr(module, "D", FEATURES)


def steady():
    """Updates small beside the fast weights: others grow what is rounded to bfloat16 in operations, too."""
    model = loops.FuncGrad()
    with torch.no_grad():
        model.W *= 16
        model.rate.bias -= 2
    return model


STYLES = {
    "gradients by torch.func, an anchor": (steady, wide),
    "torch.autograd.grad": (loops.AutogradGrad, qkv),
    "a detached leaf": (loops.DetachedLeaf, qkv),
    "by hand, a tensor allocated before": (loops.ByHand, loops.with_state),
    "a dict": (loops.DictState, lambda B, T: [*qkv(B, T), loops.random(B, T)]),
    "a dataclass": (loops.DataclassState, qkv),
    "a tuple of two layers' weights": (loops.TwoLayers, heads),
    "layers inside": (loops.LayersInside, wide),
    "enumerate": (loops.Enumerated, qkv),
    "a method": (loops.Helper, qkv),
    "the anchor before the update": (lambda: anchors.Before(16), heads),
    "the anchor after the update": (lambda: anchors.After(16), heads),
    "the anchor in attributes": (lambda: anchors.AfterInAttributes(16), heads),
    "mini-batches, primal": (lambda: mini_batches.Primal(16), heads),
    "mini-batches, split": (lambda: mini_batches.Split(16), heads),
    "mini-batches, dual by hand": (mini_batches.ByHand, mini_batches.with_state),
    "nested, an anchor": (lambda: nested.Anchored(16), heads),
    "nested, swapped": (nested.Swapped, qkv),
    "nested, several steps": (nested.Steps, qkv),
}


def results(model, inputs, backend):
    """Outputs and gradients of inputs and parameters."""
    compiled = tttc.compile(model, backend=backend, strict=True)
    outputs = leaves(compiled(*inputs))
    assert plans_of(model)
    total = sum((y * torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape).to(y.dtype)).sum()
                for y in outputs if y.requires_grad)  # fmt: skip
    wanted = [*inputs, *model.parameters()]
    return outputs + list(torch.autograd.grad(total, wanted, allow_unused=True))


@pytest.mark.parametrize("style", STYLES)
def test_in_bfloat16(style):
    """Where the layers around a loop are farther off than that, kernels are no more so than torch operations."""
    make, arguments = STYLES[style]
    torch.manual_seed(0)
    model = make().to("cuda", torch.bfloat16)
    inputs = [(0.5 * x).to("cuda", torch.bfloat16) for x in arguments(2, TOKENS)]

    def run(model, backend, dtype):
        return results(model, [x.to(dtype, copy=True).requires_grad_() for x in inputs], backend)

    exact = run(copy.deepcopy(model).double(), "torch", torch.float64)
    operations, kernels = (run(model, b, torch.bfloat16) for b in ("torch", "triton"))
    for i, (x, y, z) in enumerate(zip(kernels, operations, exact, strict=True)):
        if z is None:
            assert x is None
            continue
        assert torch.isfinite(z).all()
        ours, theirs = (
            float((g.detach() - z.detach()).double().norm() / z.detach().norm()) for g in (x, y)
        )
        assert ours < max(ERROR, 1.5 * theirs), f"result {i}: {ours:.1e}, operations {theirs:.1e}"
