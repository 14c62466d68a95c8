"""Equal operations of a graph are done once, and nothing else is."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tttc.passes.merge_equal import merge_equal

import tttc


def traced(function, *inputs):
    from torch.fx.experimental.proxy_tensor import make_fx

    gm = make_fx(function, tracing_mode="fake")(*inputs)
    return gm, merge_equal(gm.graph)


def operations(gm):
    return [n.name for n in gm.graph.nodes if n.op == "call_function"]


def test_equal_operations_are_done_once():
    def function(x, w):
        top = x.mT.exp().sum(0, True) + x.mT.exp().sum(0, True)
        return (top * 2).sin() @ w.mT + (top * 2).cos() @ w.mT

    x, w = torch.randn(3, 4), torch.randn(5, 3)
    gm, merged = traced(function, x, w)
    assert merged
    names = [name.rpartition("_")[0] or name for name in operations(gm)]
    assert sum("exp" in n for n in names) == 1
    assert sum("transpose" in n for n in names) == 2  # of x, and of w
    gm.recompile()
    torch.testing.assert_close(gm(x, w), function(x, w), rtol=0, atol=0)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x * 1).sin() + (x * 1.0).sin() + (x * True).sin(),
        lambda x: (x / 0.0).sin() + (x / -0.0).sin(),
        lambda x: torch.rand_like(x) + torch.rand_like(x),
        lambda x: torch.bernoulli(x) + torch.bernoulli(x),
        lambda x: (x.sum(0), x.sum(0)),
        lambda x: (x.sum(0, True), x.sum(0, False)),
        lambda x: x.to(torch.float64).sum() + x.to(torch.bfloat16).sum(),
    ],
    ids=["constants", "zeros", "random", "drawn", "results", "flags", "dtypes"],
)
def test_what_is_not_equal_stays(function):
    x = torch.rand(3, 4)
    before = operations(torch.fx.experimental.proxy_tensor.make_fx(function)(x))
    gm, merged = traced(function, x)
    assert merged and len(operations(gm)) == len(before)


def test_a_graph_that_writes_stays():
    def function(x):
        y = x.sum(0)
        x.add_(1)
        return y * x.sum(0)

    x = torch.ones(3)
    gm, merged = traced(function, x)
    assert not merged
    assert gm(torch.ones(3)).item() == function(torch.ones(3)).item() == 18


def test_a_model_that_writes_is_compiled_as_before():
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            first = x.exp() + self.seen
            self.seen.add_(1)
            return first + x.exp() + self.seen

    model = Counting()
    x = torch.randn(3, requires_grad=True)
    y = tttc.compile(model, backend="torch")(x)
    y.sum().backward()
    torch.testing.assert_close(y, 2 * x.exp() + 1)
    torch.testing.assert_close(x.grad, 2 * x.exp())
    assert model.seen == 1


def test_torch_inductor_is_not_imported():
    """It takes a second to import, of which a compile needs nothing."""
    program = """
import sys, torch, tttc
model = tttc.compile(torch.nn.Linear(3, 4), backend="torch")
model(torch.randn(2, 3)).sum().backward()
print([m for m in ("ir", "lowering", "pattern_matcher", "scheduler") if f"torch._inductor.{m}" in sys.modules])
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
