"""Loops over tokens in plain Python, compiled as they are: every style against the same loop run eagerly."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from marks import interpreted
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import tttc
from tttc.capture.loops import Loops, sites_of

D, H = 4, 2


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Nothing that an earlier test compiled."""
    import torch._dynamo

    torch._dynamo.reset()


def random(*shape, seed=0, scale=0.5):
    gen = torch.Generator().manual_seed(seed + sum(shape))
    return scale * torch.randn(*shape, generator=gen, dtype=torch.float64)


def parameter(*shape, **options):
    return nn.Parameter(random(*shape, **options))


def plans_of(model):
    return [plan for site in sites_of(Loops(model)) for plan in site.plans]


def leaves(tree):
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def gradients(outputs, wanted):
    total = sum((x * random(*x.shape, seed=7)).sum() for x in leaves(outputs) if x.requires_grad)
    got = torch.autograd.grad(total, wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(got, wanted, strict=True)]


def assert_same(model, compiled, inputs, tolerance=1e-8):
    """Outputs and gradients of inputs and parameters agree."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    wanted = [x.requires_grad_() for x in inputs] + parameters
    expected, got = model(*inputs), compiled(*inputs)
    for x, y in zip(leaves(got), leaves(expected), strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    assert [x.requires_grad for x in leaves(got)] == [x.requires_grad for x in leaves(expected)]
    for x, y in zip(gradients(got, wanted), gradients(expected, wanted), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def check(model, make, sizes=((2, 10), (3, 17)), mini_batch_size=None):
    """Compile at the first size, compare there and at the others; the loop has been re-rolled once."""
    compiled = tttc.compile(model, backend="torch", strict=True)
    plans = None
    for B, T in sizes:
        assert_same(model, compiled, make(B, T))
        found = plans_of(model)
        assert found and (plans is None or len(found) == plans)
        plans = len(found)
    return compiled


def qkv(B, T, seed=1):
    """One head, ``[B, T, D]`` each."""
    return [random(B, T, D, seed=seed + i) for i in range(3)]


def heads(B, T):
    """``[B, H, T, D]`` each."""
    return [random(B, H, T, D, seed=1 + i) for i in range(3)]


def outer(a, b):
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def times(x, W):
    return (x.unsqueeze(-2) @ W).squeeze(-2)


# --- where the gradient comes from -------------------------------------------------------------------


class FuncGrad(nn.Module):
    """torch.func.grad at an anchor, outputs in a list, projections around the loop."""

    def __init__(self, b=4):
        super().__init__()
        self.b = b
        self.qkv = nn.Linear(D * H, 3 * D * H, bias=False, dtype=torch.float64)
        self.rate = nn.Linear(D * H, H, dtype=torch.float64)
        self.W = parameter(H, D, D)
        self.norm = parameter(H, D)

    def forward(self, x):
        B, T, width = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
        eta = torch.sigmoid(self.rate(x)).transpose(1, 2)
        W = self.W.expand(B, -1, -1, -1)
        outs = []

        def f(W, x):
            return x + F.layer_norm(times(x, W), (D,), eps=1e-6) * self.norm

        def loss(W, k, v):
            return 0.5 * (f(W, k) - v).square().sum()

        for t in range(T):
            if t % self.b == 0:
                anchor = W
            g = torch.func.grad(loss)(anchor, k[:, :, t], v[:, :, t])
            W = W - eta[:, :, t, None, None] * g
            outs.append(f(W, q[:, :, t]))
        return torch.stack(outs, dim=2).transpose(1, 2).reshape(B, T, width)


def wide(B, T):
    return [random(B, T, D * H)]


def test_func_grad():
    model = FuncGrad()
    compiled = check(model, wide, [(3, 10), (2, 17), (2, 3), (5, 4)])
    assert list(compiled.state_dict()) == list(model.state_dict())


def test_compiled_at_a_length_below_the_mini_batch():
    check(FuncGrad(b=8), wide, [(3, 3), (3, 20)])


class AutogradGrad(nn.Module):
    """torch.autograd.grad through the state itself, differentiable."""

    def __init__(self):
        super().__init__()
        self.W = parameter(D, D)
        self.rate = parameter(1)

    def forward(self, q, k, v):
        W = self.W.expand(q.shape[0], D, D)
        outs = []
        for t in range(q.shape[1]):
            loss = 0.5 * (torch.einsum("bi,bij->bj", k[:, t], W) - v[:, t]).square().sum()
            (g,) = torch.autograd.grad(loss, W, create_graph=True)
            W = W - self.rate * g
            outs.append(torch.einsum("bi,bij->bj", q[:, t], W))
        return torch.stack(outs, 1), W


def test_autograd_grad_with_create_graph():
    check(AutogradGrad(), qkv)


class DetachedLeaf(nn.Module):
    """torch.autograd.grad at detached leaves: the inner gradient is a constant to the outer one."""

    def __init__(self):
        super().__init__()
        self.W = parameter(D, D)
        self.rate = parameter(1)

    def forward(self, q, k, v):
        W = self.W.expand(q.shape[0], D, D)
        outs = []
        for t in range(q.shape[1]):
            leaf = W.detach().requires_grad_()
            loss = 0.5 * (times(k[:, t], leaf) - v[:, t]).square().sum()
            (g,) = torch.autograd.grad(loss, leaf)
            W = W - self.rate * g
            outs.append(times(q[:, t], W))
        return torch.stack(outs, 1)


def test_autograd_grad_at_detached_leaves():
    check(DetachedLeaf(), qkv)


class DetachedState(nn.Module):
    """The state itself is detached after every token."""

    def __init__(self):
        super().__init__()
        self.rate = parameter(1)

    def forward(self, q, k, v):
        W = torch.zeros(q.shape[0], D, D, dtype=q.dtype, requires_grad=True)
        outs = []
        for t in range(q.shape[1]):
            loss = 0.5 * (times(k[:, t], W) - v[:, t]).square().sum()
            (g,) = torch.autograd.grad(loss, W, retain_graph=True)
            new = W - self.rate * g
            outs.append(times(q[:, t], new))
            W = new.detach().requires_grad_()
        return torch.stack(outs, 1)


def test_detached_state():
    check(DetachedState(), qkv)


def test_detached_in_inference():
    model = DetachedLeaf()
    compiled = tttc.compile(model, backend="torch", strict=True)
    inputs = qkv(2, 9)
    assert_same(model, compiled, inputs)
    assert_same(model, compiled, inputs)


class ByHand(nn.Module):
    """A gradient written by hand, outputs written into a tensor made before."""

    def forward(self, q, k, v, W):
        out = torch.empty_like(q)
        for t in range(q.shape[1]):
            error = times(k[:, t], W) - v[:, t]
            W = W - 0.1 * outer(k[:, t], error)
            out[:, t] = times(q[:, t], W)
        return out, W


def with_state(B, T):
    return [*qkv(B, T), random(B, D, D, seed=9)]


def test_gradient_by_hand_and_preallocated_output():
    check(ByHand(), with_state)


# --- where the state is -------------------------------------------------------------------------------


class DictState(nn.Module):
    """Momentum and decay, the state in a dict that is changed in place."""

    def forward(self, q, k, v, alpha):
        B, T, _ = q.shape
        state = {"W": q.new_zeros(B, D, D), "S": q.new_zeros(B, D, D)}
        outs = []
        for t in range(T):
            g = outer(k[:, t], times(k[:, t], state["W"]) - v[:, t])
            state["S"] = 0.9 * state["S"] - 0.1 * g
            state["W"] = torch.sigmoid(alpha[:, t, None, None]) * state["W"] + state["S"]
            outs.append(times(q[:, t], state["W"]))
        return torch.stack(outs, 1), state


def test_state_in_a_dict():
    check(DictState(), lambda B, T: [*qkv(B, T), random(B, T)])


@dataclasses.dataclass
class Memory:
    W: torch.Tensor
    b: torch.Tensor


def read(memory, x):
    return torch.tanh(times(x, memory.W) + memory.b)


class DataclassState(nn.Module):
    """A dataclass made anew with every token, anchored at mini-batches."""

    def __init__(self):
        super().__init__()
        self.W, self.b = parameter(D, D), parameter(D)

    def forward(self, q, k, v):
        B = q.shape[0]
        memory = Memory(self.W.expand(B, D, D), self.b.expand(B, D))
        outs = []
        for t in range(q.shape[1]):
            if t % 3 == 0:
                anchor = memory

            def loss(W, b, t=t):
                return F.huber_loss(read(Memory(W, b), k[:, t]), v[:, t], reduction="sum")

            gW, gb = torch.func.grad(loss, argnums=(0, 1))(anchor.W, anchor.b)
            memory = Memory(memory.W - 0.3 * gW, memory.b - 0.3 * gb)
            outs.append(read(memory, q[:, t]))
        return torch.stack(outs, 1), memory.W, memory.b


def test_state_in_a_dataclass():
    check(DataclassState(), qkv)


class Cell(nn.Module):
    """Holds its fast weights as an attribute."""

    def __init__(self):
        super().__init__()
        self.W0 = parameter(D, D)

    def start(self, B):
        self.W = self.W0.expand(B, D, D)

    def step(self, q, k, v):
        self.W = self.W - 0.2 * outer(k, times(k, self.W) - v)
        return times(q, self.W)


class AttributeState(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = Cell()

    def forward(self, q, k, v):
        self.cell.start(q.shape[0])
        outs = []
        for q_t, k_t, v_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True):
            outs.append(self.cell.step(q_t, k_t, v_t))
        return torch.stack(outs, 1), self.cell.W


def test_state_as_an_attribute():
    model = AttributeState()
    check(model, qkv)


class TwoLayers(nn.Module):
    """A tuple of weights, a list of their gradients; heads; the anchor renewed after the update."""

    def __init__(self, b=4):
        super().__init__()
        self.W1, self.W2, self.b = parameter(H, D, 6), parameter(H, 6, D), b

    def forward(self, q, k, v):
        weights = (self.W1.expand(q.shape[0], -1, -1, -1), self.W2.expand(q.shape[0], -1, -1, -1))
        anchor = weights
        outs = []

        def f(weights, x):
            return times(F.gelu(times(x, weights[0])), weights[1])

        for t in range(q.shape[2]):
            grads = torch.func.grad(lambda w, t=t: (f(w, k[:, :, t]) - v[:, :, t]).square().sum())(
                anchor
            )
            weights = tuple(w - 0.1 * g for w, g in zip(weights, grads, strict=True))
            outs.append(f(weights, q[:, :, t]))
            if (t + 1) % self.b == 0:
                anchor = weights
        return torch.stack(outs, 2)


def test_tuple_of_weights_and_renewal_after_the_update():
    check(TwoLayers(), heads)


# --- what else is in the loop ---------------------------------------------------------------------------


class LayersInside(nn.Module):
    """Linear layers of the token before, and of the output after the update, inside the loop."""

    def __init__(self):
        super().__init__()
        width = D * H
        self.q, self.k, self.v, self.o = (
            nn.Linear(width, width, dtype=torch.float64) for _ in range(4)
        )
        self.norm = nn.LayerNorm(width, dtype=torch.float64)

    def forward(self, x):
        B, T, width = x.shape
        W = x.new_zeros(B, H, D, D)
        outs = []
        for t in range(T):
            x_t = self.norm(x[:, t])
            q, k, v = (f(x_t).view(B, H, D) for f in (self.q, self.k, self.v))
            W = W - 0.1 * outer(k, times(k, W) - v)
            z = times(q, W)
            outs.append(self.o(z.reshape(B, width)) + x[:, t])
        return torch.stack(outs, 1)


def test_linear_layers_inside_the_loop():
    check(LayersInside(), wide)


def linear_attention(q, k, v):
    S = q.new_zeros(q.shape[-1], v.shape[-1])
    out = torch.zeros_like(v)
    for t in range(len(q)):
        S = S + torch.outer(k[t], v[t])
        out[t] = q[t] @ S
    return out


def test_function_without_batch():
    check(linear_attention, lambda B, T: [random(T, D, seed=i) for i in range(3)])


class Enumerated(nn.Module):
    def forward(self, q, k, v):
        S = q.new_zeros(q.shape[0], D, D)
        outs = []
        for i, (q_t, k_t) in enumerate(zip(q.unbind(1), k.unbind(1), strict=True)):
            S = S + outer(k_t, v[:, i])
            outs.append(times(q_t, S)[:, None])
        return torch.cat(outs, dim=1)


def test_enumerate_and_cat():
    check(Enumerated(), qkv)


class Helper(nn.Module):
    """The loop is in a method that forward calls."""

    def forward(self, q, k, v):
        return self.run(q, k, v, q.shape[1])

    def run(self, q, k, v, T):
        W, outs = q.new_zeros(q.shape[0], D, D), []
        for t in range(T):
            W = W + outer(k[:, t], v[:, t])
            outs += [times(q[:, t], W)] if False else []
            outs.append(times(q[:, t], W))
        return torch.stack(outs, 1)


def test_loop_in_a_method():
    check(Helper(), qkv)


class Stack(nn.Module):
    """Layers in a loop of their own, which is none over tokens."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(LayersInside() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        for i in range(len(self.layers)):
            x = self.layers[i].norm(x)
        return x


def test_layers_of_a_larger_model():
    check(Stack(), wide)


# --- what can't be re-rolled -----------------------------------------------------------------------------


class Unsupported(nn.Module):
    def forward(self, q, k, v):
        W, outs = q.new_zeros(q.shape[0], D, D), []
        for t in range(q.shape[1]):
            W = W + outer(k[:, t], v[:, t])
            if W.sum() > 0:  # depends on values
                W = 0.5 * W
            outs.append(times(q[:, t], W))
        return torch.stack(outs, 1)


def test_unsupported_loops_run_eagerly_with_one_warning():
    model, inputs = Unsupported(), qkv(2, 9)
    compiled = tttc.compile(model, backend="torch")
    with pytest.warns(tttc.TTTCWarning if hasattr(tttc, "TTTCWarning") else UserWarning) as seen:
        got = compiled(*inputs)
    torch.testing.assert_close(got, model(*inputs))
    messages = [str(w.message) for w in seen if "re-rolled" in str(w.message)]
    assert len(messages) == 1 and __file__ in messages[0]
    line = Unsupported.forward.__code__.co_firstlineno + 2
    assert f"{__file__}:{line}" in messages[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(*inputs)


def test_unsupported_loops_raise_under_strict():
    from tttc.ir.errors import NotLowerable

    compiled = tttc.compile(Unsupported(), backend="torch", strict=True)
    with pytest.raises(NotLowerable, match=r"test_loops\.py:\d+"):
        compiled(*qkv(2, 9))


# --- the examples, and kernels -----------------------------------------------------------------------------


def test_example_ttt_linear():
    from examples.loops.ttt_linear import TTTLinearLoop

    torch.manual_seed(0)
    check(TTTLinearLoop(8, 2, 4).double(), wide)


def test_example_delta_memory():
    from examples.loops.delta_memory import DeltaMemory

    torch.manual_seed(0)
    check(DeltaMemory(8).double(), wide)


@interpreted
@pytest.mark.parametrize("style", [FuncGrad, AutogradGrad, DataclassState])
def test_kernels_in_the_interpreter(style):
    model = style()
    inputs = [x.float() for x in (wide if style is FuncGrad else qkv)(2, 9)]
    expected = leaves(model(*(x.double() for x in inputs)))
    got = leaves(tttc.compile(model.float(), backend="triton", strict=True)(*inputs))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-3)
