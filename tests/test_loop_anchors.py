"""Loops whose anchor is renewed: before or after a token's update, at any place, however the state is held."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from test_loops import D, H, assert_same, heads, outer, parameter, plans_of, times
from torch import nn

import tttc


@pytest.fixture(autouse=True)
def without_dynamo():
    """What surrounds the loops is not looked at here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def update(anchor, W, k, v):
    return 0.9 * W - 0.3 * outer(k, times(k, anchor) - v)


class Renewed(nn.Module):
    """The anchor is renewed where the number of the token leaves ``place`` when divided by ``b``."""

    def __init__(self, b, place=0):
        super().__init__()
        self.b, self.place = b, place
        self.W = parameter(H, D, D)


class Before(Renewed):
    def forward(self, k, v, q):
        W = self.W.expand(k.shape[0], -1, -1, -1)
        anchor = W
        outs = []
        for t in range(k.shape[2]):
            if t % self.b == self.place:
                anchor = W
            W = update(anchor, W, k[:, :, t], v[:, :, t])
            outs.append(times(q[:, :, t], W))
        return torch.stack(outs, 2), W


class After(Renewed):
    def forward(self, k, v, q):
        W = self.W.expand(k.shape[0], -1, -1, -1)
        anchor = W
        outs = []
        for t in range(k.shape[2]):
            W = update(anchor, W, k[:, :, t], v[:, :, t])
            outs.append(times(q[:, :, t], W))
            if (t + 1) % self.b == self.place:
                anchor = W
        return torch.stack(outs, 2), W


class AfterInADict(Renewed):
    def forward(self, k, v, q):
        state = {"W": self.W.expand(k.shape[0], -1, -1, -1)}
        anchor = dict(state)
        outs = []
        for t, (k_t, v_t, q_t) in enumerate(
            zip(k.unbind(2), v.unbind(2), q.unbind(2), strict=True)
        ):
            state["W"] = update(anchor["W"], state["W"], k_t, v_t)
            outs.append(times(q_t, state["W"]))
            if (t + 1) % self.b == self.place:
                anchor = dict(state)
        return torch.stack(outs, 2), state["W"]


@dataclasses.dataclass
class State:
    W: torch.Tensor


class AfterInADataclass(Renewed):
    """The anchor is the very object that the state was."""

    def forward(self, k, v, q):
        state = State(self.W.expand(k.shape[0], -1, -1, -1))
        anchor = state
        z = torch.empty_like(q)
        for t in range(k.shape[2]):
            state = State(update(anchor.W, state.W, k[:, :, t], v[:, :, t]))
            z[:, :, t] = times(q[:, :, t], state.W)
            if (t + 1) % self.b == self.place:
                anchor = state
        return z, state.W


class AfterInAttributes(Renewed):
    def forward(self, k, v, q):
        self.now = self.W.expand(k.shape[0], -1, -1, -1)
        self.anchor = self.now
        outs = []
        for t in range(k.shape[2]):
            self.now = update(self.anchor, self.now, k[:, :, t], v[:, :, t])
            outs.append(times(q[:, :, t], self.now))
            if (t + 1) % self.b == self.place:
                self.anchor = self.now
        return torch.stack(outs, 2), self.now


class Counted(Renewed):
    """The place in the mini-batch has a name; mini-batches start where it is the last but one."""

    def forward(self, k, v, q):
        W = self.W.expand(k.shape[0], -1, -1, -1)
        anchor = W
        outs = []
        for t in range(k.shape[2]):
            at = t % self.b
            if at + 2 == self.b:
                anchor = W
            W = update(anchor, W, k[:, :, t], v[:, :, t])
            outs.append(times(q[:, :, t], W))
        return torch.stack(outs, 2), W


def compiled_once(model, sizes):
    """Re-rolled at the first size, and never again; the class of a model remembers what others had."""
    compiled = tttc.compile(model, backend="torch", strict=True)
    assert_same(model, compiled, heads(*sizes[0]))
    plans = len(plans_of(model))
    assert plans
    for B, T in sizes[1:]:
        assert_same(model, compiled, heads(B, T))
    assert len(plans_of(model)) == plans


@pytest.mark.parametrize("b", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "style", [Before, After, AfterInADict, AfterInADataclass, AfterInAttributes]
)
def test_every_mini_batch_size(style, b):
    compiled_once(style(b), [(2, 7), (3, 12)])


@pytest.mark.parametrize("T", [2, 3, 4])
@pytest.mark.parametrize(
    "style", [Before, After, AfterInADict, AfterInADataclass, AfterInAttributes]
)
def test_compiled_on_few_tokens(style, T):
    compiled_once(style(2), [(2, T), (2, 9)])


@pytest.mark.parametrize("b, place", [(2, 1), (4, 3), (16, 5), (32, 9)])
@pytest.mark.parametrize("style", [Before, After])
def test_any_place(style, b, place):
    compiled_once(style(b, place), [(1, 40)])


def test_place_in_the_mini_batch_with_a_name():
    compiled_once(Counted(8), [(1, 20), (1, 50)])


class SumsSinceAnchor(Renewed):
    """Weights follow from a sum since the anchor, so that no token reads those of the one before."""

    def forward(self, k, v, q):
        W = self.W.expand(k.shape[0], -1, -1, -1)
        total = torch.zeros_like(W)
        outs = []
        for t in range(k.shape[2]):
            if t % self.b == 0:
                anchor, before = W, total
            total = total + outer(k[:, :, t], times(k[:, :, t], anchor) - v[:, :, t])
            W = anchor - 0.3 * (total - before)
            outs.append(times(q[:, :, t], W))
        return torch.stack(outs, 2), W


def test_weights_that_only_anchors_read():
    compiled_once(SumsSinceAnchor(3), [(2, 8), (3, 13)])


# --- what can't be re-rolled runs as it is, at every length -------------------------------------------


def at_a_place(t, W, anchor):
    return (2 * W if t == 30 else W), W


def within_a_mini_batch(t, W, anchor):
    return (2 * W if t % 4 == 0 and t == 32 else W), W


def by_a_quotient(t, W, anchor):
    return W, W if t // 16 == 1 else anchor


def at_two_places(t, W, anchor):
    return W, W if t % 8 in (3, 6) else anchor


def by_a_fraction(t, W, anchor):
    return (2 * W if t / 4 > 7.6 else W), W


class Odd(nn.Module):
    """Some tokens do something else."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule
        self.W = parameter(H, D, D)

    def forward(self, k, v, q):
        W = self.W.expand(k.shape[0], -1, -1, -1)
        anchor = W
        outs = []
        for t in range(k.shape[2]):
            W, anchor = self.rule(t, W, anchor)
            W = update(anchor, W, k[:, :, t], v[:, :, t])
            outs.append(times(q[:, :, t], W))
        return torch.stack(outs, 2), W


@pytest.mark.parametrize(
    "rule", [at_a_place, within_a_mini_batch, by_a_quotient, at_two_places, by_a_fraction]
)
@pytest.mark.parametrize("first", [10, 40])
def test_tokens_that_differ(rule, first):
    model = Odd(rule)
    compiled = tttc.compile(model, backend="torch")
    for T in (first, 50):
        inputs = heads(1, T)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", tttc.TTTCWarning)
            assert_same(model, compiled, inputs)


class Remembers(Odd):
    """The token of the last renewal is remembered."""

    def forward(self, k, v, q):
        W = self.W.expand(k.shape[0], -1, -1, -1)
        anchor, last = W, 0
        outs = []
        for t in range(k.shape[2]):
            if t - last >= 4:
                anchor, last = W, t
            W = update(anchor, W, k[:, :, t], v[:, :, t])
            outs.append(times(q[:, :, t], W))
        return torch.stack(outs, 2), W


class GivesAQuotient(Odd):
    def forward(self, k, v, q):
        W = self.W.expand(k.shape[0], -1, -1, -1)
        outs = []
        for t in range(k.shape[2]):
            block = t // 16
            W = update(W, W, k[:, :, t], v[:, :, t])
            outs.append(times(q[:, :, t], W))
        return torch.stack(outs, 2), W * block


@pytest.mark.parametrize("style", [Remembers, GivesAQuotient])
def test_numbers_made_of_the_loop_variable(style):
    model = style(None)
    compiled = tttc.compile(model, backend="torch")
    with pytest.warns(tttc.TTTCWarning, match="can't be re-rolled"):
        assert_same(model, compiled, heads(1, 10))
    assert_same(model, compiled, heads(1, 40))


def test_a_length_that_is_asked_for_is_no_limit():
    """A comparison with the number of tokens moves with it: one plan for every length."""

    class UpToTheEnd(Odd):
        def forward(self, k, v, q):
            T = k.shape[2]
            W = self.W.expand(k.shape[0], -1, -1, -1)
            outs = []
            for t in range(T):
                if t + 1 < T:
                    _seen = k[:, :, t]
                W = update(W, W, k[:, :, t], v[:, :, t])
                outs.append(times(q[:, :, t], W))
            return torch.stack(outs, 2), W

    compiled_once(UpToTheEnd(None), [(1, 6), (1, 30)])


def test_after_the_update_in_the_interpreter():
    model = After(2)
    inputs = [x for x in heads(1, 5)]
    expected = model(*inputs)
    single = copy.deepcopy(model).float()
    got = tttc.compile(single, backend="triton")(*(x.float() for x in inputs))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-3)
