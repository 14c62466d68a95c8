"""Random inner models, losses and updates: every pass validated, the result compared with the naive loop."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_passes import assert_same, random_tree
from torch.nn import functional as F

ACTIVATIONS = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "relu": F.relu,
    "softmax": lambda x: torch.softmax(x, -1),
    "cube": lambda x: x**3,
    "sinh": lambda x: torch.sinh(0.5 * x) + torch.exp2(-x.square()),
    "sine": lambda x: torch.sin(2.0 * x) - 0.5,
}
LOSSES = {
    "half square": lambda y, v: 0.5 * (y - v).square().sum(),
    "minus product": lambda y, v: -(y * v).sum(),
    "huber": lambda y, v: F.huber_loss(y, v, reduction="sum", delta=0.2),
    "fourth power": lambda y, v: 0.1 * (y - v).pow(4).sum(),
    "log cosh": lambda y, v: torch.log(torch.cosh(y - v)).mean(),
    "cross entropy": lambda y, v: -(torch.softmax(v, -1) * torch.log_softmax(y, -1)).sum(),
    "norm": lambda y, v: (1e-3 + (y - v).square().sum()).sqrt(),
}
UPDATES = ("descent", "sum since the anchor", "online", "decay")


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-4)


def build(layers, loss, update):
    """A step: its inner model made of layers, each a name and the weights it has."""

    def model(weights, x):
        first = x
        for (kind, name), w in zip(layers, weights, strict=True):
            if kind == "matrix":
                x = x @ w
            elif kind == "transposed":
                x = w @ x
            elif kind == "bias":
                x = x + w
            elif kind == "gain":
                x = x * w
            elif kind == "norm":
                x = norm(x)
            elif kind == "residual":
                x = x + first if x.shape == first.shape else 2.0 * x
            else:
                x = ACTIVATIONS[name](x)
        return x

    def step(anchor, carry, token, rate):
        at = carry if update == "online" else anchor
        old, used = carry["weights"], [i for i, w in enumerate(at["weights"]) if w.numel() > 0]

        def inner(leaves):
            weights = list(at["weights"])
            for i, leaf in zip(used, leaves, strict=True):
                weights[i] = leaf
            return LOSSES[loss](model(weights, token["k"]), token["v"])

        gradients = torch.func.grad(inner)([at["weights"][i] for i in used])
        new, sums = list(old), list(carry["sums"])
        for i, g in zip(used, gradients, strict=True):
            g = token["eta"] * g
            if update == "decay":
                new[i] = 0.9 * old[i] - rate * g
            elif update == "sum since the anchor":
                sums[i] = carry["sums"][i] + g
                new[i] = anchor["weights"][i] - rate * (sums[i] - anchor["sums"][i])
            else:
                new[i] = old[i] - rate * g
        return {"weights": new, "sums": sums}, model(new, token["q"])

    return step


@st.composite
def programs(draw):
    """Layers, the shapes of their weights, the width of the output."""
    width = start = draw(st.integers(1, 5))
    layers, shapes = [], []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(
            st.sampled_from(
                ["matrix", "transposed", "bias", "gain", "norm", "residual", "activation"]
            )
        )
        name, shape = "", (0,)  # a layer without weights has an empty one
        if kind in ("matrix", "transposed"):
            wide = draw(st.integers(1, 5))
            shape = (width, wide) if kind == "matrix" else (wide, width)
            width = wide
        elif kind in ("bias", "gain"):
            shape = (width,)
        elif kind == "activation":
            name = draw(st.sampled_from(sorted(ACTIVATIONS)))
        layers.append((kind, name))
        shapes.append(shape)
    if not any(kind in ("matrix", "transposed", "bias", "gain") for kind, _ in layers):
        layers.append(("matrix", ""))
        shapes.append((width, width))
    return layers, shapes, start, width


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    programs(),
    st.sampled_from(sorted(LOSSES)),
    st.sampled_from(UPDATES),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(0, 3),
)
def test_random_programs(program, loss, update, b, T, seed):
    layers, shapes, start, width = program
    gen = torch.Generator().manual_seed(seed)
    heads = 2
    weights = random_tree(list(shapes), gen, (heads,))
    init = {"weights": weights, "sums": [torch.zeros_like(w) for w in weights]}
    tokens = random_tree(
        {"q": (start,), "k": (start,), "v": (width,), "eta": ()}, gen, (3, heads, T)
    )
    rate = 0.1 + 0.2 * torch.rand(heads, generator=gen, dtype=torch.float64)
    with torch.no_grad():
        assert_same(build(layers, loss, update), init, tokens, rate, b, cut=T // 2 or None)
