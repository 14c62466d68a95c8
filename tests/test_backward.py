"""The backward of scans: VJPs of bodies, the torch backend and the kernels against autograd through the naive loop."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from tttc.codegen.torch_scan_backward import save_interval
from tttc.passes.backward import backward
from tttc.passes.derivatives import DERIVATIVES
from tttc.passes.simplify import simplify
from tttc.passes.verify import verify_backward

import tttc
from tttc import _scan_op, _tracing
from tttc.ir import ops
from tttc.ir.errors import KernelTooLarge
from tttc.ir.functions import FUNCTIONS
from tttc.nn import inner
from tttc.pipeline import build_program
from tttc.runtime import fused_scan_backward

sys.path.append(str(Path(__file__).parents[1] / "examples" / "rules"))
import ttt_mlp_chunk

F64 = torch.float64


def linear_attention(anchor, W, token, shared):
    k, v, q = token
    W = W + torch.outer(k, v)
    return W, q @ W


def decay_step(anchor, W, token, shared):
    """A state that decays, read through functions with corners: its tokens run one after another."""
    x, rate = token
    y = torch.relu(x @ anchor) + torch.maximum(x, x @ W).abs()
    W = rate * W + torch.outer(x, y - torch.amax(y) * shared)
    return W, torch.where(y > 0.1, torch.tanh(y), y * y) + torch.clamp(y, max=0.3)


def rule(kind, d=4, B=2, H=2, T=7, dtype=F64, seed=0):
    """A step, its initial state, tokens and parameters."""
    generator = torch.Generator().manual_seed(seed)

    def r(*shape):
        return 0.3 * torch.randn(shape, generator=generator, dtype=dtype)

    if kind in ("linear", "mlp"):
        if kind == "linear":
            weights, step = inner.LinearWeights(r(B, H, d, d), r(B, H, d)), inner.linear_step
        else:
            weights = inner.MLPWeights(
                r(B, H, d, 4 * d), r(B, H, 4 * d), r(B, H, 4 * d, d), r(B, H, d)
            )
            step = inner.mlp_step
        init = inner.Carry(weights, pytree.tree_map(torch.zeros_like, weights))
        rows = (r(B, H, T, d), r(B, H, T, d), r(B, H, T, d), r(B, H, T).abs(), r(B, H, T).abs())
        return step, init, inner.Token(*rows), inner.Norm(1 + r(H, d), r(H, d))
    if kind == "chunk":
        m, c = ttt_mlp_chunk, 5
        init = m.Weights(r(B, H, d, 4 * d), r(B, H, 4 * d), r(B, H, 4 * d, d), r(B, H, d))
        rows = (*(r(B, H, T, c, d) for _ in range(3)), r(B, H, T, c).abs())
        return m.step, init, m.Chunk(*rows), (1 + r(H, d), r(H, d))
    if kind == "decay":
        return decay_step, r(B, H, d, d), (r(B, H, T, d), 1 - r(B, H, T).abs()), r(H, d)
    return linear_attention, r(B, H, d, d), tuple(r(B, H, T, d) for _ in range(3)), None


def flat(step, init, tokens, shared, continued=False, seed=1):
    """The key of the step, and the arguments of the operators: anchor, carry, tokens, shared."""
    leaves = [[x for x in pytree.tree_leaves(t) if x is not None] for t in (init, tokens, shared)]
    structure = _tracing.describe((init, None, tokens, shared))
    pairs = list(zip(leaves, (2, 3, 1), strict=True))
    shapes = tuple(_tracing.constant_shapes(x, [lead] * len(x)) for x, lead in pairs)
    dtypes = tuple(_tracing.seen_dtypes(x, leaves[0][0].dtype) for x in leaves)
    key = _scan_op.intern_step(step, structure, shapes, dtypes, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    noise = [0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in leaves[0]]
    carry = [x + n for x, n in zip(leaves[0], noise, strict=True)] if continued else []
    return key, (leaves[0], carry, leaves[1], leaves[2])


def gradients(operator, groups, *rest, cotangents=None):
    """The results of an operator that can be differentiated, and the gradients of all its arguments."""
    leaves = [[x.detach().clone().requires_grad_() for x in g] for g in groups]
    out = [x for x in operator(*leaves, *rest) if x.requires_grad]
    if cotangents is None:
        generator = torch.Generator().manual_seed(2)
        cotangents = [torch.randn(x.shape, generator=generator, dtype=F64).to(x.dtype) for x in out]
    flat_leaves = [x for g in leaves for x in g]
    return out, torch.autograd.grad(
        out[: len(cotangents)], flat_leaves, cotangents, allow_unused=True, materialize_grads=True
    )


def assert_close(expected, got, tolerance):
    for i, (x, y) in enumerate(zip(expected, got, strict=True)):
        assert x.shape == y.shape, i
        scale = max(1.0, float(x.abs().max())) if x.numel() else 1.0
        error = float((x.double() - y.double()).abs().max()) if x.numel() else 0.0
        assert error <= tolerance * scale, f"gradient {i}: {error:.3g}, values up to {scale:.3g}"


naive = torch.ops.tttc.scan
fused = torch.ops.tttc.fused_scan


# --- the pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, b, d",
    [
        ("linear", 4, 4),
        ("linear", 1, 4),
        ("mlp", 4, 8),
        ("chunk", 1, 4),
        ("attention", 4, 4),
        ("decay", 3, 4),
    ],
)
def test_the_vjp_of_every_body_is_what_autograd_gives(kind, b, d):
    key, _ = flat(*rule(kind, d))
    program = build_program(_scan_op.interned(key), b)
    parts = {"token": program.token, "full": program.full, "continued": program.continued}
    assert kind in ("chunk", "decay") or b == 1 or program.full is not None
    for name, body in parts.items():
        if body is None:
            continue
        leaves = [
            str(n.target) for n in body.placeholders if not str(n.target).startswith("constant")
        ]
        made = backward(body, leaves)
        for _ in range(2):  # as derived, and simplified
            verify_backward(name, body, made, at_anchor=False)
            made.body = simplify(made.body)


def test_the_vjp_of_a_dual_body_makes_nothing_large():
    key, _ = flat(*rule("linear", d=16, T=16))
    body = build_program(_scan_op.interned(key), 16).full
    leaves = [str(n.target) for n in body.placeholders if not str(n.target).startswith("constant")]
    made = simplify(backward(body, leaves).body)
    assert all(len(n.meta["dims"]) <= 2 for n in made.nodes)
    products = [n for n in made.nodes if n.target in (ops.contraction, ops.masked_contraction)]
    assert all(len(n.all_input_nodes) <= 2 for n in products)


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_every_elementwise_function_has_rules(function):
    assert function in DERIVATIVES


def test_verify_sees_a_wrong_vjp():
    key, _ = flat(*rule("linear"))
    body = build_program(_scan_op.interned(key), 4).full
    made = backward(body, ["anchor_0", "token_0"])
    (node,) = [n for n in made.body.nodes if n.args[0] == "rsqrt"][:1]
    node.args = ("sqrt", *node.args[1:])
    made.body.gm.recompile()
    with pytest.raises(tttc.ir.errors.CheckError):
        verify_backward("broken", body, made, at_anchor=True)


# --- the torch backend -------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [1, 4, 16])
@pytest.mark.parametrize("kind, d", [("linear", 2), ("linear", 4), ("mlp", 16), ("decay", 3)])
def test_gradients_of_the_torch_backend(kind, d, b):
    for T in (1, 7, 16, 17, 40) if (kind, d) == ("linear", 4) else (17,):
        for place in sorted({0, 3 % b} if T in (7, 17) else {0}):
            key, groups = flat(*rule(kind, d, T=T, B=1, H=1), continued=place > 0)
            _, expected = gradients(naive, groups, key, b, place)
            for interval in (0, 1, 2):
                _, got = gradients(fused, groups, key, b, place, "torch", True, interval)
                assert_close(expected, got, 1e-8)


def test_gradients_of_a_whole_chunk_rule():
    key, groups = flat(*rule("chunk", T=5))
    _, expected = gradients(naive, groups, key, 1, 0)
    _, got = gradients(fused, groups, key, 1, 0, "torch", True, 2)
    assert_close(expected, got, 1e-8)


def test_no_tokens_pass_cotangents_of_states_through():
    for place in (0, 2):
        key, groups = flat(*rule("linear", T=0), continued=place > 0)
        _, expected = gradients(naive, groups, key, 4, place)
        _, got = gradients(fused, groups, key, 4, place, "torch", True, 1)
        assert_close(expected, got, 1e-12)


def test_gradcheck():
    key, groups = flat(*rule("linear", d=2, B=1, H=1, T=3))
    counts = [len(g) for g in groups]

    def run(*leaves):
        it = iter(leaves)
        parts = [[next(it) for _ in range(n)] for n in counts]
        return tuple(fused(*parts, key, 2, 0, "torch", True, 1)[: 2 * counts[0] + 1])

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for g in groups for x in g])


@pytest.mark.parametrize("place, interval", [(0, 2), (3, 0)])
def test_opcheck(place, interval):
    key, groups = flat(*rule("linear", T=6), continued=place > 0)
    leaves = [[x.clone().requires_grad_() for x in g] for g in groups]
    torch.library.opcheck(fused.default, (*leaves, key, 4, place, "torch", True, interval))
    out = fused(*groups, key, 4, place, "torch", True, interval)
    n = 2 * len(groups[0]) + 1
    given = [torch.randn_like(x) for x in out[:n]]
    wanted = [True] * sum(map(len, groups))
    rest = (key, 4, place, "torch", True, interval)
    torch.library.opcheck(
        torch.ops.tttc.fused_scan_backward.default, (given, *groups, out[n:], wanted, *rest)
    )


def test_second_order_says_that_it_is_not_there():
    key, groups = flat(*rule("linear", T=3))
    leaves = [[x.requires_grad_() for x in g] for g in groups]
    loss = fused(*leaves, key, 4, 0, "torch", False, 1)[0].square().sum()
    (g,) = torch.autograd.grad(loss, leaves[2][0], create_graph=True)
    with pytest.raises(RuntimeError, match="second-order"):
        torch.autograd.grad(g.sum(), leaves[2][0])


def test_states_are_saved_as_often_as_their_bytes_allow():
    key, _ = flat(*rule("mlp", d=16))
    program = build_program(_scan_op.interned(key), 4)
    often = save_interval(program, ("token_0", "token_1", "token_2"), 10_000, 4)
    seldom = save_interval(program, ("token_0", "token_1", "token_2"), 10, 4)
    assert often < seldom
    state = 4 * (
        2 * 16 * 64 + 16 + 64
    )  # weights alone: of the sums of gradients only differences count
    assert state <= seldom * 4 * 10 < 2 * state


# --- kernels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, d, b, T, place",
    [
        ("linear", 16, 16, 40, 5), ("linear", 8, 4, 7, 0), ("linear", 8, 4, 7, 3), ("linear", 8, 1, 5, 0),
        ("mlp", 16, 16, 20, 9), ("attention", 16, 16, 24, 4), ("chunk", 16, 1, 3, 0),
    ],
)  # fmt: skip
def test_gradients_of_kernels(kind, d, b, T, place):
    key, groups = flat(*rule(kind, d, T=T, B=1, dtype=torch.float32), continued=place > 0)
    exact = [[x.double() for x in g] for g in groups]
    _, expected = gradients(fused, exact, key, b, place, "torch", True, 0)
    _, got = gradients(fused, groups, key, b, place, "triton", True, 1)
    program = build_program(_scan_op.interned(key), b)
    assert any(k[0] == "backward" for k in program.kernels)
    assert_close(expected, got, 1e-3)
    _, again = gradients(fused, groups, key, b, place, "triton", True, 1)
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))


def test_a_kernel_too_large_for_the_gpu_leaves_the_backward_to_torch_operations(monkeypatch):
    key, groups = flat(*rule("attention", 16, T=22, dtype=torch.float32, seed=5))
    _, expected = gradients(fused, groups, key, 8, 0, "torch", True, 0)

    def refuse(*arguments, **options):
        raise KernelTooLarge("300000 bytes of shared memory, 232448 there")

    monkeypatch.setattr(fused_scan_backward, "run_backward_kernels", refuse)
    _, got = gradients(fused, groups, key, 8, 0, "triton", True, 1)
    assert_close(expected, got, 1e-4)
    program = build_program(_scan_op.interned(key), 8)
    assert "shared memory" in program.no_backward_kernels
    program.no_backward_kernels = None


def test_kernels_without_final_states():
    key, groups = flat(*rule("linear", 16, T=22, dtype=torch.float32))
    out, expected = gradients(fused, groups, key, 16, 0, "torch", False, 0)
    given = [torch.ones_like(out[0])]
    _, expected = gradients(fused, groups, key, 16, 0, "torch", False, 0, cotangents=given)
    _, got = gradients(fused, groups, key, 16, 0, "triton", False, 1, cotangents=given)
    assert_close(expected, got, 1e-4)


# --- models -----------------------------------------------------------------------------------------


def train_once(model, x, **autocast):
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", enabled=bool(autocast), **autocast):
        model(x).float().square().mean().backward()
    return [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("layer", [tttc.nn.TTTLinear, tttc.nn.TTTMLP])
def test_a_compiled_layer_trains(layer, constant_floats):
    torch.manual_seed(0)
    model = layer(16, 2, mini_batch_size=4)
    compiled = tttc.compile(model, backend="torch", strict=True)
    x = torch.randn(2, 10, 16)
    expected = train_once(model, x)
    got = train_once(compiled, x)
    assert_close(expected, got, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(got, train_once(compiled, x), strict=True))
    y = x.clone().requires_grad_()
    checkpoint(compiled, y, use_reentrant=False).square().mean().backward()
    assert_close(expected[:1], [y.grad], 1e-5)
    # Gradients were added to those that were there.
    assert_close([2 * g for g in expected[1:]], [p.grad for p in model.parameters()], 1e-5)


def test_half_precision_and_frozen_parameters(constant_floats):
    torch.manual_seed(0)
    model = tttc.nn.TTTLinear(16, 2, mini_batch_size=4)
    compiled = tttc.compile(model, backend="torch", strict=True)
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 2 == 0)
    x = torch.randn(2, 10, 16)
    expected = train_once(model, x, dtype=torch.bfloat16)
    got = train_once(compiled, x, dtype=torch.bfloat16)
    assert all(g.dtype == torch.float32 for g in got)
    for a, b in zip(expected, got, strict=True):
        assert float((a - b).norm()) <= 0.05 * float(a.norm()) + 1e-6
