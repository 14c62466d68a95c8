"""PyTorch's own scan in a compiled model: single, and over mini-batches and their tokens."""

from __future__ import annotations

import pytest
import torch
from marks import interpreted
from torch import nn
from torch._higher_order_ops.scan import scan as torch_scan
from torch.utils import _pytree as pytree

import tttc
from tests.test_loops import (  # noqa: F401
    D,
    H,
    assert_same,
    fresh_dynamo,
    outer,
    parameter,
    qkv,
    random,
    times,
)
from tttc import _recorder
from tttc.ir.errors import NotLowerable

stacked_first = False


@pytest.fixture(scope="module", autouse=True)
def along_which_dimension():
    """PyTorch 2.11 stacks outputs along the first dimension, whichever the tokens lie along."""
    global stacked_first
    _, out = torch_scan(lambda s, x: (s + x, s * x), torch.ones(2), torch.ones(2, 3), dim=1)
    stacked_first = out.shape == (3, 2)


def scan(combine, init, xs, dim=0, reverse=False):
    """PyTorch's scan where a model is compiled, the loop it stands for elsewhere."""
    if torch.compiler.is_dynamo_compiling():
        state, ys = torch_scan(combine, init, xs, dim=dim, reverse=reverse)
        return state, pytree.tree_map(lambda y: y.movedim(0, dim), ys) if stacked_first else ys
    length = pytree.tree_leaves(xs)[0].shape[dim]
    ys = []
    for t in reversed(range(length)) if reverse else range(length):
        init, y = combine(init, pytree.tree_map(lambda x, t=t: x.select(dim, t), xs))
        ys.append(y)
    ys = ys[::-1] if reverse else ys
    return init, pytree.tree_map(lambda *y: torch.stack(y, dim), *ys)


def programs_of(model, inputs):
    torch._dynamo.reset()
    with _recorder.record() as recording:
        tttc.compile(model, backend="torch", strict=True)(*inputs)
    return [site.program for site in recording.sites]


def check(model, make, sizes):
    compiled = tttc.compile(model, backend="torch", strict=True)
    for B, T in sizes:
        assert_same(model, compiled, make(B, T))
    (program,) = programs_of(model, make(*sizes[0]))
    assert program is not None
    return program


class Single(nn.Module):
    """A gradient by torch.func.grad, momentum, the state in a dict, tokens along dimension 1."""

    def __init__(self):
        super().__init__()
        self.W, self.rate = parameter(D, D), parameter(1)

    def forward(self, q, k, v):
        B = q.shape[0]

        def combine(state, token):
            def loss(W):
                return 0.5 * (times(token["k"], W) - token["v"]).square().sum()

            S = 0.9 * state["S"] - self.rate * torch.func.grad(loss)(state["W"])
            W = state["W"] + S
            return {"W": W, "S": S}, (times(token["q"], W), W.sum((1, 2)))

        init = {"W": self.W.expand(B, D, D).clone(), "S": q.new_zeros(B, D, D)}
        return scan(combine, init, {"q": q, "k": k, "v": v}, dim=1)


def test_single():
    program = check(Single(), qkv, [(2, 10), (3, 17)])
    assert not program.sequential


class Reversed(nn.Module):
    def forward(self, q, k, v):
        def combine(S, token):
            q_t, k_t, v_t = token
            S = S + outer(k_t, v_t)
            return S, times(q_t, S)

        return scan(combine, q.new_zeros(q.shape[0], D, D), (q, k, v), dim=1, reverse=True)


def test_reverse():
    check(Reversed(), qkv, [(2, 10), (3, 17)])


class Nested(nn.Module):
    """With heads: the outer scan over mini-batches holds the anchor, the inner one takes tokens."""

    def __init__(self, b=4):
        super().__init__()
        self.b, self.W, self.norm = b, parameter(H, D, D), parameter(H, D)

    def forward(self, q, k, v):
        B, _, T, _ = q.shape

        def f(W, x):
            return x + torch.tanh(times(x, W)) * self.norm

        def loss(W, k, v):
            return 0.5 * (f(W, k) - v).square().sum()

        def mini_batch(anchor, tokens):
            def token(W, x):
                q_t, k_t, v_t = x
                W = W - 0.1 * torch.func.grad(loss)(anchor, k_t, v_t)
                return W, f(W, q_t)

            return scan(token, anchor.clone(), tokens)

        tokens = tuple(
            x.unflatten(2, (T // self.b, self.b)).permute(2, 3, 0, 1, 4) for x in (q, k, v)
        )
        W, z = scan(mini_batch, self.W.expand(B, -1, -1, -1).clone(), tokens)
        return W, z.flatten(0, 1).permute(1, 2, 0, 3)


def heads(B, T):
    return [random(B, H, T, D, seed=1 + i) for i in range(3)]


def test_over_mini_batches_and_their_tokens():
    program = check(Nested(), heads, [(2, 12), (3, 20)])
    assert program.mini_batch_size == 4 and program.full is not None


class Around(nn.Module):
    """The outer scan projects its tokens, moves their dimension and normalises what comes out."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(D, D, dtype=torch.float64)
        self.q, self.k, self.v = (parameter(D, D, seed=i) for i in range(3))
        self.W1, self.W2 = parameter(D, 6), parameter(6, D)

    def forward(self, x):
        B, T, _ = x.shape

        def mini_batch(anchor, x_b):
            q, k, v = x_b @ self.q, x_b @ self.k, x_b @ self.v

            def token(fast, x):
                q_t, k_t, v_t = x
                h = torch.tanh(times(k_t, anchor[0]))
                g = times(h, anchor[1]) - v_t
                g1 = times(g, anchor[1].transpose(1, 2)) * (1 - h * h)
                fast = (fast[0] - 0.1 * outer(k_t, g1), fast[1] - 0.1 * outer(h, g))
                return fast, times(torch.tanh(times(q_t, fast[0])), fast[1])

            start = (anchor[0].clone(), anchor[1].clone())
            fast, z = scan(token, start, (q, k, v), dim=1)
            return fast, self.out(torch.tanh(z @ self.q)) + x_b

        init = (self.W1.expand(B, D, 6).clone(), self.W2.expand(B, 6, D).clone())
        tokens = x.unflatten(1, (T // 4, 4))
        _, z = scan(mini_batch, init, tokens, dim=1)
        return z.flatten(1, 2)


def test_what_the_outer_scan_does_beside():
    program = check(Around(), lambda B, T: [random(B, T, D)], [(2, 12), (3, 20)])
    assert program.mini_batch_size == 4 and program.full is not None


class Fresh(nn.Module):
    """The inner scan adds up gradients from zero: no state of one scan over tokens."""

    def forward(self, q, k, v):
        def mini_batch(W, tokens):
            def token(G, x):
                q_t, k_t, v_t = x
                return G + outer(k_t, times(k_t, W) - v_t), times(q_t, W)

            G, z = scan(token, torch.zeros_like(W), tokens)
            return W - 0.1 * G, z

        tokens = tuple(x.unflatten(1, (-1, 4)).permute(1, 2, 0, 3) for x in (q, k, v))
        return scan(mini_batch, q.new_zeros(q.shape[0], D, D), tokens)


def test_what_can_not_be_lowered_says_where():
    inputs = qkv(2, 12)
    with pytest.raises(NotLowerable, match=r"test_torch_scan\.py:\d+"):
        tttc.compile(Fresh(), backend="torch", strict=True)(*inputs)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match=r"the scan at .*test_torch_scan\.py:\d+ can't be lowered"):
        got = tttc.compile(Fresh(), backend="torch")(*inputs)
    for x, y in zip(got, Fresh()(*inputs), strict=True):
        torch.testing.assert_close(x, y)


def test_through_torch_compile():
    # PyTorch has no gradient of a scan inside a scan, and asks for it before any backend sees the graph.
    model, inputs = Reversed(), qkv(2, 12)
    compiled = torch.compile(model, backend="tttc", options={"backend": "torch", "strict": True})
    assert_same(model, compiled, inputs)


@interpreted
def test_kernels_in_the_interpreter():
    model = Nested()
    inputs = [x.float() for x in heads(1, 8)]
    expected = model(*(x.double() for x in inputs))
    got = tttc.compile(model.float(), backend="triton", strict=True)(*inputs)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-3)
