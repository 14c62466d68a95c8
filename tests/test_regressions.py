"""What random programs once broke, each as the smallest step that did."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from generator.check import check
from generator.description import Layer, Program
from torch.nn import functional as F
from tttc.passes.dualise import Dualiser

import tttc

sys.path.append(str(Path(__file__).parents[1] / "examples" / "rules"))
import itertools

from _run import Example, errors, results

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + len(shape))
    return 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)


def grid(*shape, B=2, H=3, T=6, seed=0):
    """Of tokens: ``[B, H, T, ...]``."""
    return numbers(B, H, T, *shape, seed=seed)


def same(step, init, tokens, shared=None, b=4, backend="torch", cut=None):
    """A scan compiled, without falling back, is the naive loop: outputs, states and gradients."""
    example = Example(init, tokens, shared, b)

    def scan(init, tokens, shared):
        if cut is None:
            return tttc.scan(step, init, tokens, b, shared=shared)
        head, rest = ({n: x[:, :, part] for n, x in tokens.items()}
                      for part in (slice(None, cut), slice(cut, None)))  # fmt: skip
        state, first = tttc.scan(step, init, head, b, shared=shared)
        state, second = tttc.scan(step, state, rest, b, shared=shared)
        return state, torch.cat([first, second], 2)

    expected = results(scan, example)
    given = example
    if backend == "triton":
        cast = lambda x: x.float() if x.is_floating_point() else x  # noqa: E731
        given = example._replace(**{
            n: torch.utils._pytree.tree_map(lambda x: None if x is None else cast(x), getattr(example, n))
            for n in ("init", "tokens", "shared")
        })  # fmt: skip
    # Scans go the same way without Dynamo, many times faster.
    with torch.compiler.set_stance("force_eager"):
        got = results(tttc.compile(scan, backend=backend, strict=True), given)
    worst = errors(expected, got)
    assert max(worst.values()) < (1e-3 if backend == "triton" else 1e-10), worst


def masked(anchor, W, token, shared):
    rate = 0.1 * token["mask"].to(W.dtype)
    W = W - rate * torch.outer(token["k"], token["k"] @ W)
    return W, token["k"] @ W


def counted(anchor, W, token, shared):
    W = W + torch.outer(token["k"], token["k"]) / (1.0 + token["place"].to(W.dtype))
    return W, token["k"] @ W


def integers(**options):
    return {"k": grid(2), "place": torch.arange(6).expand(2, 3, 6).contiguous(), **options}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("step", [masked, counted])
def test_casts_are_to_the_dtype_computed_in(step, backend):
    """In float64 a mask was cast to float32, and numbers times it rounded; kernels took any integer for 1."""
    mask = torch.rand(2, 3, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    same(step, numbers(3, 2, 2), integers(mask=mask), backend=backend)


def chosen(anchor, W, token, shared):
    k = token["k"]
    slope = torch.where(k > 0, torch.full_like(k, 0.3), torch.full_like(k, 0.7))
    W = W + torch.outer(k * slope, k)
    return W, k @ W


def test_a_choice_of_two_numbers_is_of_the_dtype_computed_in():
    same(chosen, numbers(3, 2, 2), {"k": grid(2)})


def shifted(anchor, carry, token, shared):
    W, before = carry["W"], carry["k"]
    W = W + torch.outer(before, token["k"])
    return {"W": W, "k": token["k"]}, token["k"] @ W


@pytest.mark.parametrize("T", [1, 6])
def test_a_state_that_is_the_last_token(T):
    """The new state was the argument itself, which operators may not return."""
    same(shifted, {"W": numbers(3, 2, 2), "k": numbers(3, 2)}, {"k": grid(2, T=T)}, b=4)


def counting(anchor, carry, token, decay):
    n = carry["n"] + 1.0
    W = decay * carry["W"] + torch.outer(token["k"], token["v"]) / n
    return {"W": W, "n": n}, token["k"] @ W


def test_a_decay_of_channels_that_is_the_same_for_all_tokens():
    """Such a coefficient is repeated along tokens, of which the value that says how many lacks its dimension."""
    init = {"W": numbers(3, 4, 2), "n": torch.zeros(3, dtype=torch.float64)}
    tokens = {"k": grid(4), "v": grid(2, seed=1)}
    same(counting, init, tokens, torch.sigmoid(numbers(3, 2)))


def root_mean_square(anchor, W, token, shared):
    def loss(W):
        return (F.rms_norm(token["k"] @ W, (3,), eps=1e-3) - token["v"]).square().sum()

    W = W - 0.1 * torch.func.grad(loss)(anchor)
    return W, token["k"] @ W


def test_rms_norm():
    """PyTorch takes it apart into operators that write in place."""
    same(root_mean_square, numbers(3, 2, 3), {"k": grid(2), "v": grid(3)})


def linear(anchor, W, token, shared):
    W = W - 0.1 * torch.outer(token["k"], F.linear(token["k"], W.T))
    return W, token["k"] @ W


def test_shapes_that_fit_two_readings_are_tried_silently(caplog):
    """With B = H, PyTorch logged a stack for the reading of ``init`` under which the step does not run."""
    with caplog.at_level(logging.ERROR):
        same(linear, numbers(3, 3, 2), {"k": grid(3, B=3)})
    assert not caplog.records


def sums_of_another_state(anchor, carry, token, rate):
    """The gradient of a number is a sum over features of what depends on another leaf."""
    m = 0.9 * carry["m"] + 0.1 * token["k"]
    g = (token["k"] * m * anchor["w"]).sum() + 0.1 * anchor["w"]
    return {"m": m, "w": 0.9 * carry["w"] - rate * g}, token["k"] * carry["w"]


def test_a_sum_over_features_is_no_multiple_of_its_operand():
    """A leaf that adds the sum of what depends on another leaf was taken to add what is summed."""
    init = {"m": numbers(3, 4), "w": numbers(3)}
    same(sums_of_another_state, init, {"k": grid(4)}, torch.sigmoid(numbers(3)))


def deep(anchor, carry, token, shared):
    """More feature dimensions than there were letters before the name of a kernel's loop variable."""
    x = token["k"]
    new = [W + 0.1 * torch.outer(W.sum(1), W.sum(0)) for W in carry]
    for W in carry:
        x = torch.tanh(x @ W)
    return new, x


def test_names_of_dimensions_are_no_names_of_kernels():
    """The sixth dimension of a step was called as the loop over tokens."""
    widths = [2, 3, 4, 5, 6, 7, 8, 9]
    init = [numbers(3, m, n) for m, n in itertools.pairwise(widths)]
    same(deep, init, {"k": grid(2, T=2)}, b=2, backend="triton")


def test_products_of_sums_are_not_distributed_without_end():
    """Two inner steps, a layer norm between them: more products than there is memory for."""
    layers = (Layer("matrix", "linear", 3), Layer("residual"), Layer("norm", "affine"))
    program = Program(
        layers, d=1, B=2, H=2, T=3, loss="cross entropy", update="several", rate="projection",
        decay="shared", after="norm", extra="unused", output="number", wanted="none",
    )  # fmt: skip
    outcome = check(program)
    assert outcome.status == "same" and "more than" in outcome.reason


class Views(torch.nn.Module):
    """A loop over tokens without heads, its inner model normalised, outputs written as it goes."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(numbers(4))

    def forward(self, k, v):
        def loss(w, k, v):
            return torch.log(torch.cosh(F.layer_norm(k + w, (4,)) - v)).mean(-1).sum()

        w, out = self.w.expand(k.shape[0], -1), torch.empty_like(v)
        for t in range(k.shape[1]):
            w = w - 0.1 * torch.func.grad(loss)(w, k[:, t], v[:, t])
            out[:, t] = w * k[:, t]
        return out


def test_views_that_are_not_atens_in_loops():
    """What a loop was traced to has views of PyTorch's decompositions, which could not be traced again."""
    module, k, v = Views(), numbers(2, 5, 4), numbers(2, 5, 4, seed=1)
    torch._dynamo.reset()
    got = tttc.compile(module, backend="torch", strict=True)(k, v)
    torch.testing.assert_close(got, module(k, v), rtol=1e-10, atol=1e-10)


def decayed_in_the_loss(anchor, W, token, shared):
    g = torch.outer(token["k"], token["k"] @ anchor - token["v"]) + 0.1 * anchor
    return W - 0.1 * g, token["k"] @ W


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("T", [3, 4, 6])
def test_what_all_tokens_add_alike_counts_once_for_each(T, backend):
    """Weight decay in the loss, at the anchor: the state after a mini-batch had it once."""
    same(
        decayed_in_the_loss,
        numbers(3, 2, 3),
        {"k": grid(2, T=T), "v": grid(3, T=T, seed=1)},
        b=4,
        backend=backend,
    )


def momentum_of_two_layers(anchor, carry, token, shared):
    """Momentum that differs by channel, below a residual."""

    def f(w, x):
        x = w["first"] @ x
        return w["second"] @ (x + 0.5 * torch.tanh(x))

    def loss(w):
        return 0.5 * (f(w, token["k"]) - token["v"]).square().sum()

    new, half = {}, {}
    for name, g in torch.func.grad(loss)(anchor["new"]).items():
        half[name] = shared[name] * carry["half"][name] - 0.1 * g
        new[name] = carry["new"][name] + half[name]
    return {"new": new, "half": half}, f(new, token["k"])


def test_a_product_of_two_masks(monkeypatch):
    """Weights that are sums of sums of tokens, without a factor: two masks were multiplied, and nothing else."""
    met = []
    made = Dualiser.multiply

    def multiply(self, pair, rest, result):
        met.append(all(x.node is None for x in pair))
        return made(self, pair, rest, result)

    monkeypatch.setattr(Dualiser, "multiply", multiply)
    shapes = {"first": (5, 3), "second": (2, 5)}
    init = {part: {n: numbers(3, *s) for n, s in shapes.items()} for part in ("new", "half")}
    shared = {n: torch.sigmoid(numbers(3, s[1], seed=2)) for n, s in shapes.items()}
    tokens = {"k": grid(3, T=3), "v": grid(2, T=3, seed=1)}
    same(momentum_of_two_layers, init, tokens, shared, b=2)
    assert any(met)


def matrix_of_a_shifted_token(anchor, carry, token, shared):
    """A bias below a matrix: the product of the biases is one number for all tokens."""

    def loss(w):
        y = w["matrix"] @ (token["k"] - m + w["bias"])
        return 0.5 * (y - token["v"]).square().sum()

    m = 0.9 * carry["m"] + 0.1 * token["k"]
    g = torch.func.grad(loss)({"bias": anchor["bias"], "matrix": anchor["matrix"]})
    bias = carry["bias"] - token["rate"] * g["bias"]
    matrix = carry["matrix"] - token["rates"][:, None] * g["matrix"]
    return {"m": m, "bias": bias, "matrix": matrix}, matrix @ (token["k"] + bias)


def test_a_mask_and_a_number():
    """A mask times what no token goes into: a sum over pairs of tokens, of which it was not known how many."""
    init = {"m": numbers(3, 4), "bias": numbers(3, 4), "matrix": numbers(3, 8, 4)}
    tokens = {"k": grid(4), "v": grid(8, seed=1), "rate": grid(4, seed=2), "rates": grid(8, seed=3)}
    same(matrix_of_a_shifted_token, init, tokens, b=2)


def test_products_of_very_many_factors_are_ordered_quickly():
    """Two inner steps of two layers: the best order of 20 factors took seconds for each of many products."""
    layers = (Layer("matrix", "row", 3), Layer("matrix", "matmul", 4))
    program = Program(
        layers, d=4, B=2, H=2, T=2, b=4, loss="mean square", update="several", decay="token",
        beta="channels", output="error", container="tuple", strided=True, used="outputs", seed=826,
    )  # fmt: skip
    outcome = check(program)
    assert (outcome.status, outcome.form) == ("same", "dual")


def test_a_softplus_far_out():
    """Beyond 88 the exponential that softplus takes overflows in float32: its second derivative was no number."""
    layers = (Layer("matrix", "einsum", 6), Layer("activation", "mish"))
    program = Program(
        layers, d=8, B=1, H=1, T=2, b=4, loss="cube", update="nesterov", extra="previous", output="after",
        container="dict", used="all", dtype="float32", path="triton", seed=0,
    )  # fmt: skip
    outcome = check(program)
    assert (outcome.status, outcome.form) == ("same", "dual"), outcome.errors


def test_states_stay_zero_beyond_their_sizes():
    """Three features in tiles of four: what the others would become, of tokens that are zero, is four times as
    much every mini-batch, soon is infinite, and times zero no number."""

    def step(anchor, w, token, shared):
        x = torch.cos(token["x"])
        size = (anchor * token["x"]).square().sum()
        w = w + (x - 0.25) * anchor + x * size
        return w, w

    tokens = {"x": torch.pi / 2 + 0.1 * grid(3, T=320)}
    same(step, numbers(2, 3, 3), tokens, backend="triton")


def test_a_state_over_numbers_of_its_token():
    """What a token divides the state by can't be taken out of the sum over its rows, where tiles are as wide as this."""

    def step(anchor, W, token, shared):
        W = W + torch.outer(token["k"], token["v"])
        return W, (W / token["v"][None, :]).sum(0)

    tokens = {"k": grid(24, T=21), "v": 2.0 + grid(24, T=21, seed=1)}
    same(step, numbers(3, 24, 24), tokens, b=16)
