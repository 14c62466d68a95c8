"""Loops over tokens inside loops over mini-batches: the outer one keeps the anchor, the inner one takes tokens."""

from __future__ import annotations

import types

import pytest
import torch
from marks import interpreted
from torch import nn
from torch.nn import functional as F

import tttc
from tests.test_loops import (  # noqa: F401
    D,
    H,
    check,
    fresh_dynamo,
    heads,
    outer,
    parameter,
    plans_of,
    qkv,
    times,
    wide,
)

SIZES = [(2, 12), (3, 17), (2, 10)]  # mini-batches of 4, the last one shorter


def sizes_of(model):
    """The mini-batch sizes that a model's loops were found to have."""
    import inspect
    import re

    runs = [inspect.getsource(p.run) for p in plans_of(model)]
    return [int(re.search(r"_scan\(.*, (\d+), shared", text)[1]) for text in runs]


class Anchored(nn.Module):
    """The anchor is renewed by the outer loop; bounds by min."""

    def __init__(self, b=4):
        super().__init__()
        self.b, self.W, self.norm = b, parameter(H, D, D), parameter(H, D)

    def forward(self, q, k, v):
        B, _, T, _ = q.shape
        W = self.W.expand(B, -1, -1, -1)
        outs = []

        def f(W, x):
            return x + F.layer_norm(times(x, W), (D,), eps=1e-6) * self.norm

        def loss(W, k, v):
            return 0.5 * (f(W, k) - v).square().sum()

        for i in range(0, T, self.b):
            anchor = W
            for t in range(i, min(i + self.b, T)):
                W = W - 0.1 * torch.func.grad(loss)(anchor, k[:, :, t], v[:, :, t])
                outs.append(f(W, q[:, :, t]))
        return torch.stack(outs, 2), W


def test_anchor_renewed_by_the_outer_loop():
    model = Anchored()
    check(model, heads, SIZES)
    assert sizes_of(model) == [4]


class Swapped(nn.Module):
    """The fast weights are the anchor; the outer loop ends with what the inner one made of them."""

    def __init__(self):
        super().__init__()
        self.W = parameter(D, D)

    def forward(self, q, k, v):
        T = q.shape[1]
        W = self.W.expand(q.shape[0], D, D)
        out = torch.zeros_like(q)
        for start in range(0, T, 4):
            new = W
            for j in range(min(4, T - start)):
                t = start + j
                error = torch.tanh(times(k[:, t], W)) - v[:, t]
                new = new - 0.1 * outer(k[:, t], error)
                out[:, t] = times(q[:, t], new)
            W = new
        return out, W


def test_the_outer_loop_takes_what_the_inner_one_made():
    model = Swapped()
    check(model, qkv, SIZES)
    assert sizes_of(model) == [4]


class OfPieces(nn.Module):
    """Pieces of the sequence, tokens unbound from them; a list for every mini-batch."""

    def forward(self, q, k, v):
        W = q.new_zeros(q.shape[0], D, D)
        outs = []
        for q_b, k_b, v_b in zip(q.split(4, 1), k.split(4, 1), v.split(4, 1), strict=True):
            anchor, ys = W, []
            for q_t, k_t, v_t in zip(q_b.unbind(1), k_b.unbind(1), v_b.unbind(1), strict=False):
                W = W - 0.1 * outer(k_t, torch.tanh(times(k_t, anchor)) - v_t)
                ys.append(times(q_t, W))
            outs.append(torch.stack(ys, dim=1))
        return torch.cat(outs, dim=1)


class Pieces(nn.Module):
    def forward(self, q, k, v):
        W = q.new_zeros(q.shape[0], D, D)
        outs = []
        for q_b, k_b, v_b in zip(q.split(4, 1), k.split(4, 1), v.split(4, 1), strict=True):
            anchor = W
            ys = []
            for j in range(q_b.shape[1]):
                k_t, v_t = k_b[:, j], v_b[:, j]
                W = W - 0.1 * outer(k_t, torch.tanh(times(k_t, anchor)) - v_t)
                ys.append(times(q_b[:, j], W))
            outs.append(torch.stack(ys, dim=1))
        return torch.cat(outs, dim=1)


@pytest.mark.parametrize("style", [Pieces, OfPieces])
def test_pieces(style):
    model = style()
    check(model, qkv, SIZES)
    assert sizes_of(model) == [4]


class Steps(nn.Module):
    """Several inner steps on every token, and layers of the model in a loop: neither is one over tokens."""

    def __init__(self):
        super().__init__()
        self.W = parameter(D, D)

    def forward(self, q, k, v):
        W, outs = self.W.expand(q.shape[0], D, D), []
        for t in range(q.shape[1]):
            for _ in range(2):
                W = W - 0.1 * outer(k[:, t], times(k[:, t], W) - v[:, t])
            outs.append(times(q[:, t], W))
        return torch.stack(outs, 1)


def test_inner_steps_are_no_tokens():
    model = Steps()
    check(model, qkv)
    assert sizes_of(model) == [1]


def test_a_wrong_re_rolling_is_caught_by_numbers(monkeypatch):
    from tttc.capture import layout
    from tttc.ir.errors import NotLowerable

    right = layout.moving
    monkeypatch.setattr(layout, "moving", lambda x, *rest: right(x, *rest).roll(1, 0))
    # Equal loops share their plans: this one is new.
    forward = types.FunctionType(Swapped.forward.__code__, globals())
    model = type("Again", (Swapped,), {"forward": forward, "__module__": __name__})()
    compiled = tttc.compile(model, backend="torch", strict=True)
    with pytest.raises(NotLowerable, match="comes out otherwise than by the loop itself"):
        compiled(*qkv(2, 12))


@interpreted
def test_kernels_in_the_interpreter():
    model = Anchored()
    inputs = [x.float() for x in heads(1, 10)]
    expected = model(*(x.double() for x in inputs))
    got = tttc.compile(model.float(), backend="triton", strict=True)(*inputs)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-3)
