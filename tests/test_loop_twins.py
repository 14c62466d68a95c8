"""Objects of one class that differ in what they hold: a plan made for one is never run for another."""

from __future__ import annotations

import pytest
import torch
from test_loops import D, H, assert_same, heads, outer, parameter, plans_of, qkv, times
from torch import nn
from torch.nn import functional as F

import tttc
from tttc import _recorder


class Layer(nn.Module):
    """What an iteration does follows from activations, layers, numbers and flags of the module."""

    def __init__(self, activation=torch.tanh, layers=1, eps=1e-5, scale=1.0, b=2):
        super().__init__()
        self.W = parameter(D, D)
        self.activation = activation
        self.slow = nn.ModuleList(nn.Linear(D, D, dtype=torch.float64) for _ in range(layers))
        self.norm = nn.LayerNorm(D, eps=eps, dtype=torch.float64)
        self.options = {"scale": scale}
        self._b = b

    def forward(self, q, k, v):
        W = self.W.expand(k.shape[0], -1, -1)
        outs = []
        for t in range(k.shape[1]):
            if t % self._b == 0:
                anchor = W
            y = times(k[:, t], anchor)
            for layer in self.slow:
                y = layer(y)
            g = self.options["scale"] * outer(k[:, t], self.norm(y) - v[:, t])
            if self.training:
                g = 0.5 * g
            W = 0.9 * W - 0.1 * g
            outs.append(self.activation(times(q[:, t], W)))
        return torch.stack(outs, 1)


TWINS = {
    "function": lambda: Layer(F.silu),
    "module": lambda: Layer(nn.GELU()),
    "layers": lambda: Layer(layers=2),
    "number": lambda: Layer(eps=0.5),
    "entry": lambda: Layer(scale=0.1),
    "private": lambda: Layer(b=3),
    "mode": lambda: Layer().eval(),
}


@pytest.mark.parametrize("difference", TWINS)
def test_another_object_has_a_plan_of_its_own(difference):
    with torch.compiler.set_stance("force_eager"):
        for model in (Layer(), TWINS[difference]()):
            compiled = tttc.compile(model, backend="torch", strict=True)
            assert_same(model, compiled, qkv(2, 7))


def test_through_dynamo():
    torch._dynamo.reset()
    for model in (Layer(), Layer(nn.GELU(), layers=2), Layer(lambda x: 2 * x)):
        compiled = tttc.compile(model, backend="torch", strict=True)
        assert_same(model, compiled, qkv(2, 7))


def test_equal_objects_share_a_plan():
    with torch.compiler.set_stance("force_eager"):
        plans = []
        for _ in range(2):  # each with a function of its own
            model = Layer(lambda x: x * torch.sigmoid(x))
            tttc.compile(model, backend="torch", strict=True)(*qkv(2, 7))
            plans.append(len(plans_of(model)))
    assert plans[0] == plans[1]


def test_the_mode_is_only_asked_for_where_it_matters():
    class Plain(Layer):
        def forward(self, q, k, v):
            W = self.W.expand(k.shape[0], -1, -1)
            outs = []
            for t in range(k.shape[1]):
                W = W - outer(k[:, t], self.norm(times(k[:, t], W)) - v[:, t])
                outs.append(times(q[:, t], W))
            return torch.stack(outs, 1)

    with torch.compiler.set_stance("force_eager"):
        model = Plain()
        compiled = tttc.compile(model, backend="torch", strict=True)
        compiled(*qkv(2, 5))
        assert_same(model.eval(), compiled, qkv(2, 5))
        assert len(plans_of(model)) == 1


class MadeByTheCall(nn.Module):
    """The gradient of one head, mapped over batch and heads: another function in every call."""

    def __init__(self):
        super().__init__()
        self.W = parameter(H, D, D)

    def forward(self, q, k, v):
        def loss(W, k, v):
            return 0.5 * (k @ W - v).square().sum()

        gradient = torch.vmap(torch.vmap(torch.func.grad(loss)))
        W = self.W.expand(q.shape[0], -1, -1, -1)
        outs = []
        for t in range(k.shape[2]):
            W = W - 0.1 * gradient(W, k[:, :, t], v[:, :, t])
            outs.append(torch.vmap(torch.vmap(torch.matmul))(q[:, :, t], W))
        return torch.stack(outs, 2)


def test_functions_made_by_the_call():
    torch._dynamo.reset()
    model = MadeByTheCall()
    with _recorder.record() as recording:
        compiled = tttc.compile(model, backend="torch", strict=True)
        assert_same(model, compiled, heads(2, 5))
        assert_same(model, compiled, heads(3, 9))
    assert recording.sites and len(plans_of(model)) == 1


class OneHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.W = parameter(H, D, D)

    def one(self, W, q, k, v):
        outs = []
        for t in range(k.shape[0]):
            W = W - 0.1 * torch.outer(k[t], k[t] @ W - v[t])
            outs.append(q[t] @ W)
        return torch.stack(outs)

    def forward(self, q, k, v):
        return torch.vmap(torch.vmap(self.one), in_dims=(None, 0, 0, 0))(self.W, q, k, v)


def test_a_loop_under_vmap_says_what_to_do():
    model, inputs = OneHead(), heads(2, 6)
    with torch.compiler.set_stance("force_eager"):
        with pytest.warns(tttc.TTTCWarning, match=r"test_loop_twins\.py:\d+ .*map inside it"):
            got = tttc.compile(model, backend="torch")(*inputs)
        torch.testing.assert_close(got, model(*inputs))
