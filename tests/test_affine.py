"""States that decay, carry momentum or each other: a dual form with coefficients for pairs of tokens, never quotients."""

from __future__ import annotations

import pytest
import torch
from test_passes import (
    MATRIX,
    D,
    assert_same,
    compiled,
    half_square,
    largest_with_tokens,
    random_tree,
)
from tttc.passes.backward import backward
from tttc.passes.verify import verify_backward

PAIR = (MATRIX, MATRIX)


@pytest.fixture(autouse=True)
def forward_only():
    with torch.no_grad():
        yield


def error_gradient(W, k, v):
    return torch.func.grad(lambda W: half_square(torch.tanh(k @ W) - v))(W)


def decay(anchor, W, token, shared):
    W = token["a"] * W - token["b"] * error_gradient(anchor, token["k"], token["v"])
    return W, token["q"] @ W


def zero_gates(anchor, W, token, shared):
    W = torch.relu(token["a"]) * W - error_gradient(anchor, token["k"], token["v"])
    return W, token["q"] @ W


def gated_linear_attention(anchor, W, token, shared):
    W = torch.sigmoid(token["a"]) * W + torch.outer(token["k"], token["v"])
    return W, token["q"] @ W


def titans(anchor, carry, token, shared):
    (W, S), at = carry, anchor[0]
    S = token["b"] * S - token["c"] * error_gradient(at, token["k"], token["v"])
    W = (1 - token["a"]) * W + S
    return (W, S), token["q"] @ W


def momentum_of_the_token_before(anchor, carry, token, shared):
    W, S = carry
    W = (1 - token["a"]) * W + 0.5 * S
    S = token["b"] * S - token["c"] * error_gradient(anchor[0], token["k"], token["v"])
    return (W, S), token["q"] @ W


def nesterov(anchor, carry, token, rate):
    W, S = carry
    g = error_gradient(anchor[0], token["k"], token["v"])
    S = rate * S - token["c"] * g
    W = W + rate * S - token["c"] * g
    return (W, S), token["q"] @ W


def plain_sums(anchor, carry, token, shared):
    W, S = carry
    S = S - error_gradient(anchor[0], token["k"], token["v"])
    W = W + S
    return (W, S), token["q"] @ W


def average_of_the_weights(anchor, carry, token, rate):
    W, E = carry
    W = W - rate * error_gradient(anchor[0], token["k"], token["v"])
    E = E + token["a"] * (W - E)
    return (W, E), token["q"] @ E


def gradient_of_the_token_before(anchor, carry, token, rate):
    W, G = carry
    W = 0.9 * W - rate * G
    G = error_gradient(anchor[0], token["k"], token["v"])
    return (W, G), token["q"] @ W


def reads_before_it_writes(anchor, W, token, rate):
    z = token["q"] @ W
    W = (W - rate * error_gradient(anchor, token["k"], token["v"])) / (1 + token["a"] ** 2)
    return W, z


def pulled_to_the_anchor(anchor, W, token, rate):
    W = W + token["a"] * (anchor - W) - rate * error_gradient(anchor, token["k"], token["v"]) + 0.1
    return W, token["q"] @ W


def cancels(anchor, W, token, rate):
    new = token["a"] * W - error_gradient(anchor, token["k"], token["v"])
    W = new - token["a"] * W
    return W, token["q"] @ W


def three_in_a_chain(anchor, carry, token, rate):
    W, S, R = carry
    R = token["a"] * R + error_gradient(anchor[0], token["k"], token["v"])
    S = token["b"] * S + R - 0.3 * carry[2]
    W = W * token["c"] - rate * S + 0.2 * carry[1]
    return (W, S, R), token["q"] @ (W + 0.1 * S)


def a_leaf_made_anew_between(anchor, carry, token, rate):
    W, S, M = carry
    S = token["b"] * S - error_gradient(anchor[2], token["k"], token["v"])
    W = anchor[2] - token["a"] * (S - anchor[1])
    M = 0.5 * M + 0.5 * W + 0.1 * carry[0]
    return (W, S, M), token["q"] @ M


def gate_of_another_leaf(anchor, carry, token, rate):
    W, c = carry
    W = torch.sigmoid(c) * W + torch.outer(token["k"], token["v"])
    return (W, 0.5 * c + token["a"]), token["q"] @ W


def shapes_that_differ(anchor, carry, token, rate):
    W, w, n = carry["W"], carry["w"], carry["n"]
    W = token["a"] * W - torch.outer(token["k"], torch.tanh(token["k"] @ anchor["W"]) - token["v"])
    w = (1 - token["b"]) * w + token["v"] * rate
    n = 0.9 * n + token["c"]
    return {"W": W, "w": w, "n": n}, token["q"] @ W + w * n


def per_channel_gate(anchor, W, token, rate):
    W = torch.sigmoid(token["v"])[:, None] * W + torch.outer(token["k"], token["v"])
    return W, token["q"] @ W


def per_channel_gate_of_outputs(anchor, carry, token, rate):
    W, S = carry
    S = torch.sigmoid(token["q"]) * S - token["b"] * error_gradient(
        anchor[0], token["k"], token["v"]
    )
    W = torch.sigmoid(token["k"]) * W + S
    return (W, S), token["q"] @ W


RULES = {
    decay: MATRIX,
    zero_gates: MATRIX,
    gated_linear_attention: MATRIX,
    titans: PAIR,
    momentum_of_the_token_before: PAIR,
    nesterov: PAIR,
    plain_sums: PAIR,
    average_of_the_weights: PAIR,
    gradient_of_the_token_before: PAIR,
    reads_before_it_writes: MATRIX,
    pulled_to_the_anchor: MATRIX,
    cancels: MATRIX,
    three_in_a_chain: (MATRIX,) * 3,
    a_leaf_made_anew_between: (MATRIX,) * 3,
    gate_of_another_leaf: (MATRIX, ()),
    shapes_that_differ: {"W": MATRIX, "w": (D,), "n": ()},
    per_channel_gate: MATRIX,
    per_channel_gate_of_outputs: PAIR,
}


def each_other(anchor, carry, token, rate):
    W, S = carry
    g = error_gradient(anchor[0], token["k"], token["v"])
    return (0.9 * W + 0.1 * S - g, 0.9 * S - 0.1 * W), token["q"] @ W


def decays_element_by_element(anchor, W, token, rate):
    W = torch.sigmoid(torch.outer(token["q"], token["k"])) * W + torch.outer(token["k"], token["v"])
    return W, token["q"] @ W


SEQUENTIAL = {
    each_other: (PAIR, "circle"),
    decays_element_by_element: (MATRIX, "not affine in the old one with scalar coefficients"),
}


def arguments(shapes, T=11, seed=0):
    gen = torch.Generator().manual_seed(seed)
    init = random_tree(shapes, gen, (3,))
    tokens = {"q": (D,), "k": (D,), "v": (D,), "a": (), "b": (), "c": ()}
    rate = 0.1 + 0.2 * torch.rand(3, generator=gen, dtype=torch.float64)
    return init, random_tree(tokens, gen, (2, 3, T)), rate


@pytest.mark.parametrize("step", RULES, ids=lambda s: s.__name__)
def test_rules_with_a_dual_form(step):
    program = assert_same(step, *arguments(RULES[step]), 4, cut=6)
    assert not program.sequential and program.verified


@pytest.mark.parametrize("step", SEQUENTIAL, ids=lambda s: s.__name__)
def test_rules_whose_tokens_run_one_after_another(step):
    shapes, reason = SEQUENTIAL[step]
    program = assert_same(step, *arguments(shapes), 4, cut=6)
    assert program.sequential and reason in program.reason


@pytest.mark.parametrize("step", RULES, ids=lambda s: s.__name__)
def test_no_token_has_weights_of_its_own(step):
    b = 5
    _, program = compiled(step, *arguments(RULES[step]), b, verify=False)
    channels = "per_channel" in step.__name__
    assert largest_with_tokens(program.full, b) <= b * max(b, D) * (D if channels else 1)
    assert largest_with_tokens(program.stages["batch"], b) >= b * D * D


@pytest.mark.parametrize("step", RULES, ids=lambda s: s.__name__)
def test_backward_of_the_closed_form(step):
    _, program = compiled(step, *arguments(RULES[step]), 4, verify=False)
    for part, at_anchor in (("full", True), ("continued", False)):
        body = getattr(program, part)
        kinds = ("anchor",) if at_anchor else ("anchor", "carry")
        states = [f"{k}_{i}" for k in kinds for i in range(body.states)]
        names = [str(n.target) for n in body.placeholders]
        others = [n for n in names if n.startswith(("token", "shared"))]
        with torch.enable_grad():
            verify_backward(part, body, backward(body, states + others), at_anchor)
