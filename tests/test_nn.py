"""TTT-Linear and TTT-MLP against the formulas of arXiv 2407.04620, gradients written by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import tttc
from tttc.nn import TTTMLP, CausalConv, TTTLinear, TTTState, layers
from tttc.nn.rotary import rotary

EPS = 1e-6
LAYERS = [TTTLinear, TTTMLP]
OPTIONS = [{}, {"gate": True, "share_qk": True}]


def make(layer=TTTLinear, seed=0, dtype=torch.float64, hidden=24, heads=3, b=4, **options):
    """A layer whose every parameter is random, so that no term of a formula is zero or one."""
    gen = torch.Generator().manual_seed(seed)
    module = layer(hidden, heads, b, dtype=torch.float64, **options)
    with torch.no_grad():
        for name, p in module.named_parameters():
            mean = 1.0 if name in ("norm_weight", "post_norm.weight") else 0.0
            p.copy_(mean + 0.3 * torch.randn(p.shape, generator=gen, dtype=p.dtype))
    return module.to(dtype)


def inputs(B=2, T=10, hidden=24, dtype=torch.float64):
    return torch.randn(B, T, hidden, generator=torch.Generator().manual_seed(5)).to(dtype)


# --- an implementation of its own, one sequence and one head at a time -----------------------------


def norm_forward(y, gain, bias):
    centred = y - y.mean()
    std = (centred.square().mean() + EPS).sqrt()
    return centred / std * gain + bias, centred / std, std


def norm_backward(d, gain, hat, std):
    d = d * gain
    return (d - d.mean() - hat * (d * hat).mean()) / std


def gelu(x):
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + u.tanh())


def gelu_slope(x):
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    du = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * (1 + u.tanh()) + 0.5 * x * (1 - u.tanh() ** 2) * du


def apply(weights, x, gain, bias):
    y = x @ weights[0] + weights[1]
    if len(weights) == 4:
        y = gelu(y) @ weights[2] + weights[3]
    return x + norm_forward(y, gain, bias)[0]


def gradient(weights, k, v, gain, bias):
    """Of ``½‖f(k) - v‖²`` with respect to each fast weight."""
    first = k @ weights[0] + weights[1]
    y = gelu(first) @ weights[2] + weights[3] if len(weights) == 4 else first
    normed, hat, std = norm_forward(y, gain, bias)
    d = norm_backward(k + normed - v, gain, hat, std)
    if len(weights) == 2:
        return [torch.outer(k, d), d]
    inner = (weights[2] @ d) * gelu_slope(first)
    return [torch.outer(k, inner), inner, torch.outer(gelu(first), d), d]


def turn(x, position):
    """Rotary embedding of one vector, as complex numbers."""
    half = len(x) // 2
    rate = 10000.0 ** (-torch.arange(half, dtype=x.dtype) * 2 / len(x))
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(rate), position * rate)
    return torch.cat([turned.real, turned.imag])


def convolve(conv, x):
    out = []
    for t in range(len(x)):
        y = conv.bias
        for j in range(conv.kernel):
            s = t - conv.kernel + 1 + j
            if s >= 0:
                y = y + conv.weight[:, j] * x[s]
        out.append(y)
    return torch.stack(out)


def by_the_paper(m, x):
    """The layer on ``x [T, hidden]``; also the fast weights at the end, for each head."""
    H, d, b, T = m.num_heads, m.head_dim, m.mini_batch_size, len(x)
    if m.share_qk:
        both = x @ m.qk_proj.weight.T
        q, k = convolve(m.q_conv, both), convolve(m.k_conv, both)
    else:
        q, k = x @ m.q_proj.weight.T, x @ m.k_proj.weight.T
    v = x @ m.v_proj.weight.T
    eta = m.base_lr * torch.sigmoid(x @ m.lr_proj.weight.T + m.lr_proj.bias) / d
    z, final = torch.zeros_like(x), []
    for h in range(H):
        cols = slice(h * d, (h + 1) * d)
        gain, bias = m.norm_weight[h], m.norm_bias[h]
        now = anchor = [w[h] for w in m.initial_weights()]
        for t in range(T):
            i = t % b + 1
            if i == 1:
                anchor, total = now, [torch.zeros_like(w) for w in now]
            g = gradient(anchor, turn(k[t, cols], i - 1), v[t, cols], gain, bias)
            total = [s + eta[t, h] * y for s, y in zip(total, g, strict=True)]
            tau = max(1 / i + m.tau_offset[i - 1].item(), 0)
            now = [w - tau * s for w, s in zip(anchor, total, strict=True)]
            z[t, cols] = apply(now, turn(q[t, cols], i - 1), gain, bias)
        final.append(now)
    out = []
    for t in range(T):
        y = norm_forward(z[t], m.post_norm.weight, m.post_norm.bias)[0]
        if m.g_proj is not None:
            y = gelu(m.g_proj.weight @ x[t]) * y
        out.append(m.o_proj.weight @ y)
    return torch.stack(out), final


@pytest.mark.parametrize("b", [1, 4, 16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_layer_is_the_paper(layer, options, b):
    m, x = make(layer, b=b, **options), inputs()
    y, state = m(x, return_state=True)
    for i in range(len(x)):
        expected, final = by_the_paper(m, x[i])
        torch.testing.assert_close(y[i], expected, rtol=1e-9, atol=1e-9)
        for h, weights in enumerate(final):
            for got, w in zip(state.scan.carry.weights, weights, strict=True):
                torch.testing.assert_close(got[i, h], w, rtol=1e-9, atol=1e-9)
    assert state.scan.place == 10 % b


def test_tau_is_clamped_and_every_parameter_has_a_gradient():
    for layer in LAYERS:
        m, x = make(layer, gate=True, share_qk=True), inputs()
        m(x).square().sum().backward()
        for name, p in m.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, name
    with torch.no_grad():
        m = make(TTTLinear)
        m.tau_offset.fill_(-5.0)  # below -1/i everywhere: nothing is learnt
        _, state = m(inputs(), return_state=True)
        assert torch.equal(state.scan.carry.weights.W1, m.W1.expand(2, *m.W1.shape))


@pytest.mark.parametrize("layer", LAYERS)
def test_gradcheck(layer):
    m = make(layer, hidden=4, heads=2, b=2)
    x = inputs(1, 3, 4).requires_grad_()
    names = [n for n, _ in m.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in m.parameters()]

    def call(x, *values):
        return torch.func.functional_call(m, dict(zip(names, values, strict=True)), (x,))

    torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layer", LAYERS)
@torch.no_grad()
def test_continuing_equals_one_long_call(layer, options):
    m, x = make(layer, **options), inputs()
    whole, end = m(x, return_state=True)
    for cuts in ([3, 0, 5, 2], [1] * 10):
        state, parts = None, []
        for part in x.split(cuts, 1):
            y, state = m(part, state, return_state=True)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
        got, wanted = (torch.utils._pytree.tree_leaves(s) for s in (state, end))
        assert [type(a) for a in got] == [type(a) for a in wanted]
        for a, b in zip(got, wanted, strict=True):
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
            else:
                assert a == b


def test_later_tokens_do_not_reach_back():
    m, x = make(TTTLinear, share_qk=True), inputs().requires_grad_()
    (g,) = torch.autograd.grad(m(x)[:, 5].sum(), x)
    assert (g[:, :6].abs().sum(-1) > 0).all() and (g[:, 6:] == 0).all()


# --- as a module ----------------------------------------------------------------------------------


def test_state_dict_keys_and_round_trip():
    common = {"v_proj.weight", "o_proj.weight", "lr_proj.weight", "lr_proj.bias", "tau_offset"}
    common |= {"norm_weight", "norm_bias", "post_norm.weight", "post_norm.bias", "W1", "b1"}
    m = make(TTTLinear)
    assert set(m.state_dict()) == common | {"q_proj.weight", "k_proj.weight"}
    other = make(TTTMLP, gate=True, share_qk=True)
    convolutions = {f"{n}_conv.{p}" for n in "qk" for p in ("weight", "bias")}
    assert set(other.state_dict()) == common | convolutions | {
        "W2",
        "b2",
        "g_proj.weight",
        "qk_proj.weight",
    }
    twin = make(TTTMLP, seed=1, gate=True, share_qk=True)
    x = inputs()
    assert not torch.equal(twin(x), other(x))
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin(x), other(x))


@pytest.mark.parametrize("layer", LAYERS)
def test_deepcopy_is_independent(layer):
    m, x = make(layer), inputs()
    twin = copy.deepcopy(m)
    assert torch.equal(twin(x), m(x))
    with torch.no_grad():
        twin.W1.add_(1)
    assert not torch.equal(twin(x), m(x))


def test_initial_values():
    torch.manual_seed(0)
    m = TTTMLP(256, 4)
    assert m.base_lr == 0.1 and TTTLinear(8, 2).base_lr == 1.0
    assert m.W1.shape == (4, 64, 256) and m.W2.shape == (4, 256, 64)
    for p in (m.W1, m.W2, m.q_proj.weight, m.lr_proj.weight):
        assert abs(p.std().item() - 0.02) < 2e-3 and abs(p.mean().item()) < 1e-3
    for p in (m.b1, m.b2, m.lr_proj.bias, m.tau_offset, m.norm_bias):
        assert (p == 0).all()
    assert (m.norm_weight == 1).all()


@pytest.mark.parametrize("layer", LAYERS)
def test_bfloat16(layer):
    m, x = make(layer, dtype=torch.bfloat16, share_qk=True, gate=True), inputs(dtype=torch.bfloat16)
    y, state = m(x, return_state=True)
    assert y.dtype == state.conv.dtype == torch.bfloat16
    assert state.scan.carry.weights.W1.dtype == torch.float32
    exact = copy.deepcopy(m).double()(x.double())
    assert (y - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("layer", LAYERS)
def test_autocast(layer):
    m, x = make(layer, dtype=torch.float32, share_qk=True, gate=True), inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = m(x, return_state=True)
    assert y.dtype == torch.bfloat16 and state.scan.carry.weights.W1.dtype == torch.float32
    assert (y - m(x)).norm() / m(x).norm() < 0.1


@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0)])
def test_empty(B, T):
    m = make(TTTLinear, share_qk=True, gate=True)
    y, state = m(inputs()[:B, :T] if B and T else torch.zeros(B, T, 24).double(), return_state=True)
    assert y.shape == (B, T, 24) and state.scan.carry.weights.W1.shape == (B, 3, 8, 8)


@torch.no_grad()
def test_sequences_heads_and_head_size_all_equal():
    m, x = make(TTTLinear, hidden=16, heads=4), inputs(4, 5, 16)
    torch.testing.assert_close(m(x)[1], by_the_paper(m, x[1])[0])


def test_non_contiguous_input():
    m, x = make(TTTLinear), inputs()
    assert torch.equal(m(x.transpose(0, 1).contiguous().transpose(0, 1)), m(x))


@pytest.mark.parametrize("layer", LAYERS)
def test_captured_whole(layer, constant_floats):
    m, x = make(layer, share_qk=True, gate=True), inputs()
    captured = torch.compile(m, fullgraph=True, dynamic=True, backend="aot_eager")
    y1, state = captured(x[:, :7], return_state=True)
    assert isinstance(state, TTTState) and state.scan.place == 3
    y = torch.cat([y1, captured(x[:, 7:], state)], 1)
    torch.testing.assert_close(y, m(x), rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad(y.square().sum(), list(m.parameters()))
    expected = torch.autograd.grad(m(x).square().sum(), list(m.parameters()))
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_causal_conv(kernel):
    conv, x = CausalConv(6, kernel).double(), inputs(2, 9, 6)
    y, state = conv(x)
    padded = torch.nn.functional.pad(x.mT, (kernel - 1, 0))
    expected = torch.nn.functional.conv1d(padded, conv.weight[:, None], conv.bias, groups=6).mT
    torch.testing.assert_close(y, expected)
    assert state.shape == (2, kernel - 1, 6)


def test_rotary_depends_on_the_distance_only():
    q, k = inputs(1, 1, 8)[:, :, :8].expand(1, 12, 8), inputs(1, 2, 8)[:, 1:, :8].expand(1, 12, 8)
    place = torch.arange(12)
    near = (rotary(q, place, 100.0) * rotary(k, place + 3, 100.0)).sum(-1)
    torch.testing.assert_close(near, near[:, :1].expand(1, 12))
    assert rotary(q.bfloat16(), place, 100.0).dtype == torch.bfloat16


def test_rotary_of_tokens_before_heads():
    x, place = torch.randn(2, 12, 3, 8), torch.arange(12)
    expected = rotary(x.transpose(1, 2), place, 100.0)
    assert torch.equal(rotary(x, place[:, None], 100.0).transpose(1, 2), expected)


@pytest.mark.parametrize("share_qk", [False, True])
def test_tokens_lie_as_projections_leave_them(share_qk, monkeypatch):
    """A kernel that takes segments of sequences as sequences reads them in place."""
    seen = []

    def scan(step, init, tokens, *args, **kwargs):
        seen.append(tokens)
        return tttc.scan(step, init, tokens, *args, **kwargs)

    monkeypatch.setattr(layers, "scan", scan)
    TTTLinear(32, 2, share_qk=share_qk)(torch.randn(2, 24, 32))
    assert [x.stride() for x in seen[0][:3]] == [(24 * 32, 16, 32, 1)] * 3


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((10, 3), {}, ValueError, r"hidden_size: expected a multiple of num_heads = 3, got 10"),
        ((6, 2), {}, ValueError, r"hidden_size: expected an even head dimension .* got 6 / 2 = 3"),
        ((8, 0), {}, ValueError, r"num_heads: expected an int of at least 1, got 0"),
        ((8.0, 2), {}, TypeError, r"hidden_size: expected an int of at least 1, got 8.0"),
        ((8, 2, 0), {}, ValueError, r"mini_batch_size: expected an int of at least 1, got 0"),
        ((8, 2), {"share_qk": True, "conv_kernel": 0}, ValueError, r"kernel: expected .* got 0"),
    ],
)
def test_errors_of_the_constructor(arguments, options, error, message):
    for layer in LAYERS:
        with pytest.raises(error, match=message):
            layer(*arguments, **options)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.zeros(5, 24),
            ValueError,
            r"x: expected \[B, T, hidden_size\] .* 24, got shape \(5, 24\)",
        ),
        (torch.zeros(1, 5, 23), ValueError, r"x: expected \[B, T, hidden_size\] .* \(1, 5, 23\)"),
        (torch.zeros(1, 5, 24).long(), TypeError, r"x: expected a floating tensor .* torch.int64"),
        (torch.zeros(1, 5, 24).cfloat(), TypeError, r"x: expected a floating tensor .*complex64"),
        ([1.0], TypeError, r"x: expected a floating tensor .* got list"),
        (
            torch.zeros(1, 5, 24, device="meta"),
            ValueError,
            r"x: expected the layer's device cpu, got meta",
        ),
    ],
)
def test_errors_of_the_input(x, error, message):
    with pytest.raises(error, match=message):
        make(dtype=torch.float32)(x)


def test_errors_of_the_state():
    m, x = make(), inputs()
    _, shared = make(share_qk=True)(x, return_state=True)
    with pytest.raises(TypeError, match="state: expected a TTTState, got ScanState"):
        m(x, shared.scan)
    with pytest.raises(ValueError, match="state: expected the state of a layer without share_qk"):
        m(x, shared)
    _, state = m(x, return_state=True)
    with pytest.raises(ValueError, match=r"init.anchor.*: expected \[B, H, ...\] with B = 1"):
        m(x[:1], state)
    with pytest.raises(ValueError, match=r"state: expected .* shape \[B, 3, 24\] with B = 2"):
        make(share_qk=True)(x, shared._replace(conv=shared.conv[:, 1:]))
    assert tttc.nn.TTTLinear is TTTLinear
