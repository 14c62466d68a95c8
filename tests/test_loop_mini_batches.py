"""Loops that take a mini-batch of tokens at a time, in the primal form: they get the dual form all the same."""

from __future__ import annotations

import pytest
import torch
from marks import interpreted
from torch import nn
from torch.nn import functional as F

import tttc
from tests.test_loops import (
    D,
    H,
    assert_same,
    check,
    fresh_dynamo,
    heads,
    parameter,
    plans_of,
    random,
)
from tttc import _recorder
from tttc.ir.body import TOKEN
from tttc.ir.build import dims_of
from tttc.ir.errors import NotLowerable

__all__ = ["fresh_dynamo"]
SIZES = [(2, 16), (3, 20), (2, 18), (2, 11)]  # mini-batches of 4: whole ones, and some left


def programs_of(model, inputs):
    """The programs of the scans that a model's loops became, on the torch backend."""
    torch._dynamo.reset()
    with _recorder.record() as recording:
        tttc.compile(model, backend="torch", strict=True)(*inputs)
    return [site.program for site in recording.sites]


def assert_dual(model, inputs):
    """The loop runs in the dual form: no value has a matrix for every token."""
    (program,) = programs_of(model, inputs)
    assert program.full is not None, program.reason
    for node in program.full.nodes:
        dims = dims_of(node)
        assert TOKEN not in dims or len([d for d in dims if d not in ("t", "s")]) < 2, (
            node.format_node()
        )


class Primal(nn.Module):
    """Per-sample gradients by einsum, a cumulative sum over tokens, every token's own fast weights."""

    def __init__(self, b=4):
        super().__init__()
        self.b, self.W, self.rate = b, parameter(H, D, D), parameter(H, 1)

    def forward(self, q, k, v):
        B, _, T, _ = q.shape
        W = self.W.expand(B, -1, -1, -1)
        outs = []
        for i in range(0, T, self.b):
            q_b, k_b, v_b = (x[:, :, i : i + self.b] for x in (q, k, v))
            error = torch.einsum("bhti,bhij->bhtj", k_b, W) - v_b
            gradients = torch.einsum("bhti,bhtj->bhtij", k_b, error)
            weights = W[:, :, None] - self.rate[:, :, None, None] * gradients.cumsum(2)
            outs.append(torch.einsum("bhti,bhtij->bhtj", q_b, weights))
            W = weights[:, :, -1]
        return torch.cat(outs, 2), W


def test_cumulative_sums():
    model = Primal()
    check(model, heads, SIZES)
    assert_dual(model, heads(2, 16))


def test_the_last_mini_batch_may_be_the_second():
    model = Primal()
    check(model, heads, [(2, 16), (2, 6), (2, 15)])
    assert len(plans_of(model)) == 1


def test_a_loop_first_met_with_too_few_iterations():
    """One whole mini-batch says nothing of the next: such lengths run as they are, a longer one is re-rolled all the same."""

    class Fresh(Primal):
        def forward(self, q, k, v):
            W = self.W.expand(q.shape[0], -1, -1, -1)
            outs = []
            for i in range(0, q.shape[2], self.b):
                q_b, k_b, v_b = (x[:, :, i : i + self.b] for x in (q, k, v))
                outs.append(torch.einsum("bhti,bhij->bhtj", q_b, W))
                error = torch.einsum("bhti,bhij->bhtj", k_b, W) - v_b
                W = W - torch.einsum("bhti,bhtj->bhij", k_b, error)
            return torch.cat(outs, 2), W

    model = Fresh()
    compiled = tttc.compile(model, backend="torch", strict=True)
    for length in (6, 7, 5):
        assert_same(model, compiled, heads(2, length))
        assert not plans_of(model)
    for length in (15, 18):
        assert_same(model, compiled, heads(2, length))
        assert len(plans_of(model)) == 1


class Split(nn.Module):
    """Over pieces of the sequence; TTT-Linear with its norm, residual and bias, the update summed for the next one."""

    def __init__(self, b=4):
        super().__init__()
        self.b = b
        self.W, self.bias, self.norm = parameter(H, D, D), parameter(H, 1, D), parameter(H, 1, D)
        self.rate = nn.Linear(D, 1, dtype=torch.float64)

    def forward(self, q, k, v):
        W = self.W.expand(q.shape[0], -1, -1, -1)
        bias = self.bias.expand(q.shape[0], -1, -1, -1)
        outs = []
        for q_b, k_b, v_b in zip(
            q.split(self.b, 2), k.split(self.b, 2), v.split(self.b, dim=2), strict=False
        ):
            eta = torch.sigmoid(self.rate(k_b))

            def loss(z, k_b=k_b, v_b=v_b):
                y = k_b + F.layer_norm(z, (D,), eps=1e-6) * self.norm
                return 0.5 * (y - v_b).square().sum()

            z = torch.einsum("bhti,bhij->bhtj", k_b, W) + bias
            g = eta * torch.func.grad(loss)(z)
            dW = torch.einsum("bhti,bhtj->bhtij", k_b, g)
            W_t = W.unsqueeze(2) - torch.cumsum(dW, dim=2)
            b_t = bias - torch.cumsum(g, dim=2)
            y = torch.einsum("bhti,bhtij->bhtj", q_b, W_t) + b_t
            outs.append(q_b + F.layer_norm(y, (D,), eps=1e-6) * self.norm)
            W = W - dW.sum(2)
            bias = bias - g.sum(2, keepdim=True)
        return torch.cat(outs, dim=2)


def test_pieces_of_a_sequence():
    model = Split()
    check(model, heads, SIZES)
    assert_dual(model, heads(2, 16))


class Viewed(nn.Module):
    """Indexed by the mini-batch, the mask made before the loop, two layers."""

    def __init__(self, b=4):
        super().__init__()
        self.b, self.W1, self.W2 = b, parameter(H, D, 6), parameter(H, 6, D)

    def forward(self, q, k, v):
        B, _, T, _ = q.shape
        b = self.b
        q_n, k_n, v_n = (x.view(B, H, T // b, b, D) for x in (q, k, v))
        W1, W2 = self.W1.expand(B, -1, -1, -1), self.W2.expand(B, -1, -1, -1)
        lower = torch.tril(torch.ones(b, b, dtype=q.dtype, device=q.device))
        outs = []
        for n in range(T // b):
            x, y = k_n[:, :, n], v_n[:, :, n]
            z = x @ W1
            h = torch.tanh(z)
            g2 = h @ W2 - y
            g1 = (g2 @ W2.transpose(-1, -2)) * (1 - h * h)
            dW1 = 0.1 * torch.einsum("bhti,bhtj->bhtij", x, g1)
            dW2 = 0.1 * torch.einsum("bhti,bhtj->bhtij", h, g2)
            W1_t = W1[:, :, None] - torch.einsum("ts,bhsij->bhtij", lower, dW1)
            W2_t = W2[:, :, None] - torch.einsum("ts,bhsij->bhtij", lower, dW2)
            z = torch.einsum("bhti,bhtij->bhtj", q_n[:, :, n], W1_t)
            outs.append(torch.einsum("bhti,bhtij->bhtj", torch.tanh(z), W2_t))
            W1, W2 = W1_t[:, :, -1], W2_t[:, :, -1]
        return torch.stack(outs, 2).reshape(B, H, T, D)


def test_mini_batches_as_a_dimension_and_a_mask_made_before():
    model = Viewed()
    check(model, heads, [(2, 16), (3, 20)])
    assert_dual(model, heads(2, 16))


class ByHand(nn.Module):
    """The dual form as one writes it by hand, into a tensor made before."""

    def forward(self, q, k, v, W):
        out = torch.empty_like(v)
        T = q.shape[2]
        for i in range(0, T, 4):
            end = min(i + 4, T)
            q_b, k_b, v_b = q[:, :, i:end], k[:, :, i:end], v[:, :, i:end]
            g = k_b @ W - v_b
            scores = (q_b @ k_b.transpose(-1, -2)).tril()
            out[:, :, i:end] = q_b @ W - 0.1 * scores @ g
            W = W - 0.1 * k_b.transpose(-1, -2) @ g
        return out, W


def with_state(B, T):
    return [*heads(B, T), random(B, H, D, D, seed=9)]


def test_dual_form_by_hand():
    model = ByHand()
    check(model, with_state, SIZES)
    assert_dual(model, with_state(2, 16))


class Masked(nn.Module):
    """Masks by where, by masked_fill and by a product with rates; tokens that do not see themselves."""

    def forward(self, q, k, v, eta):
        B, _, T, _ = q.shape
        W = q.new_zeros(B, H, D, D)
        outs = []
        for i in range(0, T, 4):
            q_b, k_b, v_b, eta_b = (x[:, :, i : i + 4] for x in (q, k, v, eta))
            lower = torch.ones(q_b.shape[2], q_b.shape[2], dtype=torch.bool).tril()
            g = k_b @ W - v_b
            scores = torch.einsum("bhti,bhsi->bhts", q_b, k_b)
            z = q_b @ W - torch.where(lower, scores * eta_b[:, :, None, :], 0.0) @ g
            z = z + scores.masked_fill(~lower.tril(-1), 0.0) @ v_b
            rates = eta_b[:, :, None, :] * lower.to(q.dtype)
            outs.append(z + rates @ g)
            W = W - torch.einsum("bht,bhti,bhtj->bhij", eta_b, k_b, g)
        return torch.cat(outs, -2)


def test_masks():
    model = Masked()
    make = lambda B, T: [*heads(B, T), random(B, H, T, seed=5)]  # noqa: E731
    check(model, make, SIZES)
    assert_dual(model, make(2, 16))


class Whole(nn.Module):
    """One update for all tokens of a chunk: nothing to dualise, everything to fuse."""

    def forward(self, q, k, v):
        W = q.new_zeros(q.shape[0], H, D, D) + torch.eye(D, dtype=q.dtype)
        outs = []
        for i in range(0, q.shape[2], 4):
            q_c, k_c, v_c = (x[:, :, i : i + 4] for x in (q, k, v))
            outs.append(q_c @ W)
            W = W + 0.1 * k_c.transpose(-1, -2) @ torch.tanh(v_c - k_c @ W)
            W = F.normalize(W, dim=-2)
        return torch.cat(outs, 2), W


def test_one_update_for_a_chunk():
    check(Whole(), heads, SIZES)


class Backwards(nn.Module):
    def forward(self, q, k, v):
        W, outs = q.new_zeros(q.shape[0], H, D, D), []
        for i in range(0, q.shape[2], 4):
            k_b, v_b = k[:, :, i : i + 4], v[:, :, i : i + 4]
            W = W + torch.einsum("bhti,bhtj->bhij", k_b.flip(2), v_b)
            outs.append(q[:, :, i : i + 4] @ W)
        return torch.cat(outs, 2)


def test_what_has_no_form_is_refused_with_its_line():
    inputs = heads(2, 16)
    compiled = tttc.compile(Backwards(), backend="torch", strict=True)
    with pytest.raises(NotLowerable, match=r"aten\.flip.*test_loop_mini_batches\.py:\d+"):
        compiled(*inputs)
    with pytest.warns(tttc.TTTCWarning if hasattr(tttc, "TTTCWarning") else UserWarning):
        got = tttc.compile(Backwards(), backend="torch")(*inputs)
    torch.testing.assert_close(got, Backwards()(*inputs))


def test_every_pass_is_validated():
    model, inputs = Split(), heads(2, 16)
    assert_same(model, tttc.compile(model, backend="torch", strict=True, verify=True), inputs)


@interpreted
@pytest.mark.parametrize("style", [Split, ByHand])
def test_kernels_in_the_interpreter(style):
    model = style()
    inputs = [x.float() for x in (heads if style is Split else with_state)(1, 18)]
    expected = model(*(x.double() for x in inputs))
    got = tttc.compile(model.float(), backend="triton", strict=True)(*inputs)
    for x, y in zip(
        torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected), strict=True
    ):
        torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-3)


def test_example_primal_form():
    from examples.loops.primal_form import PrimalForm

    torch.manual_seed(0)
    model = PrimalForm(H, D, 4).double()
    check(model, heads, [(2, 18)])
    assert len(plans_of(model)) == 1
