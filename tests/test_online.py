"""Online rules: exact chunkwise forms against the naive loop, and the mini-batch approximation where there is none."""

from __future__ import annotations

import itertools
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from tttc.codegen.torch_scan import run_program
from tttc.passes.backward import backward

import tttc
from tttc import _scan_op, _tracing
from tttc.ir import ops
from tttc.ir.body import Body
from tttc.ir.build import Builder
from tttc.ir.errors import CheckError
from tttc.pipeline import build_program

sys.path.append(str(Path(__file__).parents[1] / "examples" / "rules"))
import _run
import delta_net
import gated_delta_net

F64 = torch.float64
D = 6
LENGTHS = [1, 7, 16, 33, 100]


# --- rules ----------------------------------------------------------------------------------------------


def half_square(x):
    return 0.5 * x.square().sum()


def linear_attention(anchor, W, token, rate):
    q, k, v, *_ = token
    W = W + torch.outer(k, v)
    return W, q @ W


def gated_linear_attention(anchor, W, token, rate):
    q, k, v, a, _ = token
    W = a * W + torch.outer(k, v)
    return W, q @ W


def delta(anchor, W, token, rate):
    q, k, v, _, eta = token
    W = W - eta * torch.func.grad(lambda W: half_square(k @ W - v))(W)
    return W, q @ W


def delta_of_the_anchor(anchor, W, token, rate):
    """The same: at mini-batch size 1 the anchor is the carry."""
    q, k, v, _, eta = token
    W = W - eta * torch.func.grad(lambda W: half_square(k @ W - v))(anchor)
    return W, q @ W


def transposed_delta(anchor, W, token, rate):
    q, k, v, *_ = token
    W = W - rate * torch.func.grad(lambda W: half_square(W @ k - v))(W)
    return W, W @ q


def decay_first(anchor, W, token, rate):
    q, k, v, a, eta = token
    W = a * W
    W = W - eta * torch.outer(k, k @ W - v)
    return W, q @ W


def decay_last(anchor, W, token, rate):
    q, k, v, a, eta = token
    W = a * (W - eta * torch.outer(k, k @ W - v))
    return W, q @ W


def with_bias(anchor, weights, token, rate):
    q, k, v, a, eta = token

    def f(w, x):
        return x @ w["W"] + w["b"]

    g = torch.func.grad(lambda w: half_square(f(w, k) - v))(weights)
    weights = {name: a * weights[name] - eta * g[name] for name in weights}
    return weights, f(weights, q)


def momentum(anchor, carry, token, rate):
    (q, k, v, a, eta), (W, S) = token, carry
    S = a * S - rate * torch.func.grad(lambda W: half_square(k @ W - v))(W)
    W = (1 - 0.1 * eta) * W + S
    return (W, S), q @ W


def vector_weights(anchor, w, token, rate):
    """Normalised least mean squares: the state is a vector, the step is divided by a norm."""
    q, k, v, *_ = token
    error = (torch.dot(w, k) - v.sum()) / (1 + torch.dot(k, k))
    w = w - rate * error * k
    return w, w * q


def one_number_many_targets(anchor, w, token, rate):
    """A number is compared with every feature of v: what is the same along a dimension is summed over it."""
    q, k, v, a, eta = token
    w = a * w - eta * torch.func.grad(lambda w: half_square(torch.dot(k, w) - v))(w)
    return w, torch.dot(q, w) * v


def read_before_write(anchor, W, token, rate):
    q, k, v, _, eta = token
    z = torch.tanh(q @ W)
    return W - eta * torch.outer(k, k @ W - v), z


def gates_of_features(anchor, W, token, rate):
    q, k, v, _, eta = token
    W = torch.sigmoid(q)[:, None] * W
    W = W - eta * torch.outer(k, k @ W - v)
    return W, q @ W


MATRIX = (D, D)
EXACT = {
    linear_attention: MATRIX,
    gated_linear_attention: MATRIX,
    delta: MATRIX,
    delta_of_the_anchor: MATRIX,
    transposed_delta: MATRIX,
    decay_first: MATRIX,
    decay_last: MATRIX,
    with_bias: {"W": MATRIX, "b": (D,)},
    momentum: (MATRIX, MATRIX),
    vector_weights: (D,),
    one_number_many_targets: (D,),
    read_before_write: MATRIX,
    gates_of_features: MATRIX,
}


def nonlinear(anchor, W, token, rate):
    q, k, v, a, _ = token
    W = a * W - rate * torch.func.grad(lambda W: half_square(torch.tanh(k @ W) - v))(W)
    return W, q @ W


def normalised(anchor, W, token, rate):
    q, k, v, *_ = token
    W = W - rate * torch.outer(k, torch.tanh(k @ W) - v)
    W = W / W.square().sum().sqrt()
    return W, q @ W


def two_steps(anchor, W, token, rate):
    """The second step is taken at the state that the first one made."""
    q, k, v, *_ = token
    for x in (k, q):
        W = W - rate * torch.outer(x, x @ W - v)
    return W, q @ W


SEQUENTIAL = {
    two_steps: (MATRIX, "otherwise than through one value"),
    nonlinear: (MATRIX, "not affine in the state"),
    normalised: (MATRIX, "otherwise than through one value"),
}


def arguments(shapes, T=11, B=2, H=2, seed=0, dtype=F64):
    """State, tokens (q, k, v, decay, rate) and a shared rate, as float leaves."""
    generator = torch.Generator().manual_seed(seed)

    def r(*shape):
        return 0.5 * torch.randn(shape, generator=generator, dtype=F64).to(dtype)

    def u(*shape):
        return torch.rand(shape, generator=generator, dtype=F64).to(dtype)

    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)  # noqa: E731
    init = pytree.tree_map(lambda shape: r(B, H, *shape), shapes, is_leaf=is_shape)
    tokens = (*(r(B, H, T, D) for _ in range(3)), u(B, H, T), u(B, H, T))
    return init, tokens, 0.1 + 0.2 * u(H)


def interned(step, init, tokens, shared):
    """The key of a step, and its arguments as the operators take them."""
    leaves = [[x for x in pytree.tree_leaves(t) if x is not None] for t in (init, tokens, shared)]
    structure = _tracing.describe((init, None, tokens, shared))
    shapes = tuple(
        _tracing.constant_shapes(x, [lead] * len(x))
        for x, lead in zip(leaves, (2, 3, 1), strict=True)
    )
    dtypes = tuple(_tracing.seen_dtypes(x, leaves[0][0].dtype) for x in leaves)
    key = _scan_op.intern_step(step, structure, shapes, dtypes, torch.device("cpu"))
    return key, (leaves[0], [], leaves[1], leaves[2])


def program_of(step, shapes, b=1, verify=True):
    key, _ = interned(step, *arguments(shapes))
    return build_program(_scan_op.interned(key), b, verify)


def with_gradients(operator, groups, *rest, cotangents=None):
    """Results that can be differentiated, and gradients of all arguments."""
    leaves = [[x.detach().clone().requires_grad_() for x in g] for g in groups]
    out = [x for x in operator(*leaves, *rest) if x.requires_grad]
    if cotangents is None:
        generator = torch.Generator().manual_seed(3)
        cotangents = [torch.randn(x.shape, generator=generator, dtype=F64).to(x.dtype) for x in out]
    wanted = [x for g in leaves for x in g]
    return out, torch.autograd.grad(
        out[: len(cotangents)], wanted, cotangents, allow_unused=True, materialize_grads=True
    )


def assert_close(expected, got, tolerance):
    for i, (x, y) in enumerate(zip(expected, got, strict=False)):
        assert x.shape == y.shape, i
        scale = max(1.0, float(x.detach().abs().max()))
        error = float((x.double() - y.double()).detach().abs().max())
        assert error <= tolerance * scale, f"{i}: {error:.3g}, values up to {scale:.3g}"


def assert_same(step, shapes, T, backend, dtype, tolerance, b=1, **sizes):
    """Outputs, states and all gradients are those of the naive loop in float64."""
    key, groups = interned(step, *arguments(shapes, T, **sizes))
    expected = with_gradients(torch.ops.tttc.scan, groups, key, b, 0)
    generator = torch.Generator().manual_seed(3)
    cotangents = [
        torch.randn(x.shape, generator=generator, dtype=F64).to(dtype) for x in expected[0]
    ]
    key, groups = interned(step, *arguments(shapes, T, dtype=dtype, **sizes))
    got = with_gradients(
        torch.ops.tttc.fused_scan, groups, key, b, 0, backend, True, 1, cotangents=cotangents
    )
    for x, y in zip(expected, got, strict=True):
        assert_close(x, y, tolerance)
    return build_program(_scan_op.interned(key), b)


# --- exact forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", EXACT, ids=lambda s: s.__name__)
def test_exact_forms_by_torch_operations(step):
    assert program_of(step, EXACT[step]).chunk_size == 16
    for T in LENGTHS if step in (delta, decay_first) else (7, 33):
        program = assert_same(step, EXACT[step], T, "torch", F64, 1e-10)
        assert not program.sequential and program.reason is None


@pytest.mark.parametrize("step", EXACT, ids=lambda s: s.__name__)
def test_exact_forms_by_kernels(step):
    for T in LENGTHS if step in (delta, decay_first) else (7, 33):
        program = assert_same(step, EXACT[step], T, "triton", torch.float32, 1e-4, B=1)
        assert program.no_kernels is None and program.no_backward_kernels is None


@pytest.mark.parametrize("step", [delta, with_bias, momentum], ids=lambda s: s.__name__)
def test_states_are_handed_on_at_any_token(step):
    init, tokens, rate = arguments(EXACT[step], T=40)
    expected, z = tttc.scan(step, init, tokens, 1, shared=rate)
    key, (anchor, _, rows, shared) = interned(step, init, tokens, rate)
    program = build_program(_scan_op.interned(key), 1)
    for cuts in ([0, 21, 40], [0, 3, 4, 5, 40]):
        carry, pieces = list(anchor), []
        for start, end in itertools.pairwise(cuts):
            now = [x[:, :, start:end] for x in rows]
            new_anchor, carry, outputs = run_program(program, carry, carry, now, shared, 0)
            pieces.append(outputs[0])
            assert_close(carry, new_anchor, 0.0)
        assert_close([z], [torch.cat(pieces, 2)], 1e-12)
        assert_close(pytree.tree_leaves(expected.carry), carry, 1e-12)


def decoding(q, k, v, a, eta, state):
    return tttc.scan(decay_first, state, (q, k, v, a, eta), 1, shared=None)


def test_decoding_token_by_token_is_one_long_call():
    init, tokens, _ = arguments(MATRIX, T=6)
    compiled = tttc.compile(decoding, backend="torch", strict=True)
    expected, z = decoding(*tokens, init)
    state, outputs = init, []
    for t in range(6):
        state, now = compiled(*(x[:, :, t : t + 1] for x in tokens), state)
        outputs.append(now)
        assert state.place == 0
    assert_close([z, expected.carry], [torch.cat(outputs, 2), state.carry], 1e-12)


@pytest.mark.parametrize("backend, dtype", [("torch", F64), ("triton", torch.float32)])
@pytest.mark.parametrize("leaf, token", [(0, 5), (1, 20), (2, 17), (4, 3)])
def test_what_is_not_finite_reaches_later_tokens_alone(backend, dtype, leaf, token):
    init, tokens, rate = arguments(MATRIX, T=40, B=1, dtype=dtype)
    for value in (float("nan"), float("inf")):
        rows = [x.clone() for x in tokens]
        rows[leaf][0, 1, token].view(-1)[0] = value
        key, groups = interned(delta, init, tuple(rows), rate)
        expected = torch.ops.tttc.scan(*groups, key, 1, 0)
        got = torch.ops.tttc.fused_scan(*groups, key, 1, 0, backend, True, 0)
        for x, y in zip(expected, got, strict=True):
            assert torch.equal(x.isfinite(), y.isfinite())


def test_like_tokens_lose_no_digits():
    """Equal keys at a full learning rate: powers of the system grow like binomial coefficients."""
    rate = torch.ones(1, dtype=F64)
    generator = torch.Generator().manual_seed(0)
    k = torch.nn.functional.normalize(
        torch.randn(1, 1, 1, 64, generator=generator, dtype=F64), dim=-1
    )
    q, v = (torch.randn(1, 1, 64, 64, generator=generator, dtype=F64) for _ in range(2))
    W = torch.zeros(1, 1, 64, 64, dtype=F64)
    gates = (torch.ones(1, 1, 64, dtype=F64),) * 2
    rows = (q, k.expand(1, 1, 64, 64).contiguous(), v, *gates)
    key, groups = interned(delta, W, rows, rate)
    expected = torch.ops.tttc.scan(*groups, key, 1, 0)
    key, groups = interned(delta, *pytree.tree_map(lambda x: x.float(), (W, rows, rate)))
    assert build_program(_scan_op.interned(key), 1).chunk_size == 32
    got = torch.ops.tttc.fused_scan(*groups, key, 1, 0, "triton", True, 0)
    assert_close(expected, got, 2e-6)


def test_gradients_at_the_carry_within_mini_batches():
    for backend, dtype, tolerance in (("torch", F64, 1e-10), ("triton", torch.float32, 1e-4)):
        program = assert_same(delta, MATRIX, 22, backend, dtype, tolerance, b=8)
        assert not program.sequential and program.chunk_size is None


# --- rules without one ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", SEQUENTIAL, ids=lambda s: s.__name__)
def test_rules_that_are_not_affine_stay_token_by_token(step):
    shapes, reason = SEQUENTIAL[step]
    program = assert_same(step, shapes, 9, "torch", F64, 1e-10)
    assert program.sequential and program.chunk_size is None
    assert reason in program.reason and "mini_batch_size is 1" in program.reason


def tile_attention(anchor, W, tile, rate):
    q, k, v = tile
    W = W + k.mT @ v
    return W, q @ W


def test_tiles_of_tokens_are_not_chunked_again():
    tiles = tuple(torch.randn(1, 2, 3, 4, D, dtype=F64) for _ in range(3))
    key, _ = interned(tile_attention, torch.zeros(1, 2, D, D, dtype=F64), tiles, None)
    program = build_program(_scan_op.interned(key), 1)
    assert program.sequential and "tile" in program.reason


# --- the operator -----------------------------------------------------------------------------------------


def solve_body(relation, spec, r="t j", system="t s"):
    """A body that is one triangular system."""
    graph = torch.fx.Graph()
    nodes = []
    for i, dims in enumerate((system, r)):
        node = graph.placeholder(f"token_{i}")
        node.meta["dims"] = tuple(dims.split())
        nodes.append(node)
    builder = Builder(graph)
    made = builder.call(ops.triangular_solve, (relation,), nodes, tuple(spec.split()))
    graph.output((made,))
    return Body.make(graph, {"j": 3}, states=0, leaf_shapes={}, output_shapes=[(3,)])


def substituted(system, x, forwards):
    """Token after token."""
    y: dict[int, torch.Tensor] = {}
    order = range(len(x)) if forwards else reversed(range(len(x)))
    for t in order:
        y[t] = x[t] - sum((system[t, s] * y[s] for s in y), torch.zeros_like(x[t]))
    return torch.stack([y[t] for t in range(len(x))])


@pytest.mark.parametrize("relation", ["s<t", "t<s"])
def test_a_triangular_system_is_solved_token_after_token(relation):
    system, x = torch.randn(5, 5, dtype=F64), torch.randn(5, 3, dtype=F64)
    forwards = relation == "s<t"
    expected = substituted(system, x, forwards)
    assert_close([expected], [ops.triangular_solve(relation, "t s, t j -> t j", system, x)], 1e-12)
    turned = ops.triangular_solve(relation, "s t, j t -> j t", system.mT, x.mT)
    assert_close([expected.mT], [turned], 1e-12)
    column = ops.triangular_solve(relation, "t s, t -> t", system, x[:, 0])
    assert_close([expected[:, 0]], [column], 1e-12)
    alike = ops.triangular_solve(relation, "s, t j -> t j", system[0], x)
    assert_close([substituted(system[:1].expand(5, 5), x, forwards)], [alike], 1e-12)


@pytest.mark.parametrize("relation", ["s<t", "t<s"])
def test_the_vjp_of_a_triangular_system(relation):
    system = torch.randn(4, 4, dtype=F64, requires_grad=True)
    x = torch.randn(4, 3, dtype=F64, requires_grad=True)
    made = backward(solve_body(relation, "t j"), ["token_0", "token_1"])
    g = torch.randn(4, 3, dtype=F64)
    expected = torch.autograd.grad(substituted(system, x, relation == "s<t"), (system, x), g)
    names = [str(n.target) for n in made.body.placeholders]
    values = {"token_0": system.detach(), "token_1": x.detach(), "goutput_0": g}
    assert_close(expected, made.body.gm(*(values[n] for n in names)), 1e-12)


def test_the_ir_refuses_what_is_no_triangular_system():
    for relation, system, r in [
        ("s<=t", "t s", "t j"),
        ("s<t", "t s", "t s"),
        ("s<t", "t j", "t j"),
    ]:
        with pytest.raises(CheckError):
            solve_body(relation, r, r, system)


# --- random rules -------------------------------------------------------------------------------------------


def affine_rule(matrix, bias, loss, gate, momentum, output):
    """An update that is affine in the state it is taken at."""

    def model(w, x):
        y = w["W"] @ x if matrix == "transposed" else x @ w["W"]
        return y + w["b"] if bias else y

    def step(anchor, carry, token, rate):
        q, k, v, a, eta = token
        weights, speed = carry["weights"], carry["speed"]
        if gate == "first":
            weights = {n: a * w for n, w in weights.items()}

        def objective(w):
            error = (model(w, k) - v).square()
            extra = 0.1 * sum(x.square().sum() for x in w.values()) if loss == "decayed" else 0.0
            return {
                "half": 0.5 * error.sum(),
                "decayed": 0.5 * error.sum(),
                "mean": error.mean(),
                "weighted": eta * error.sum(),
                "normalised": error.sum() / (1 + k.square().sum()),
            }[loss] + extra

        g = torch.func.grad(objective)(weights)
        if momentum:
            speed = {n: 0.8 * speed[n] - rate * g[n] for n in g}
            new = {n: weights[n] + speed[n] for n in g}
        else:
            new = {n: weights[n] - rate * g[n] for n in g}
        if gate == "last":
            new = {n: a * w for n, w in new.items()}
        z = model(carry["weights"] if output == "before" else new, q)
        z = torch.tanh(z) if output == "tanh" else z
        return {"weights": new, "speed": speed}, z

    shapes = {"W": MATRIX, **({"b": (D,)} if bias else {})}
    return step, {"weights": shapes, "speed": shapes if momentum else {}}


@settings(
    max_examples=16, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)  # fmt: skip
@given(
    st.sampled_from(["plain", "transposed"]),
    st.booleans(),
    st.sampled_from(["half", "decayed", "mean", "weighted", "normalised"]),
    st.sampled_from(["none", "first", "last"]),
    st.booleans(),
    st.sampled_from(["before", "after", "tanh"]),
    st.integers(1, 40),
    st.integers(0, 3),
)
def test_random_affine_rules(matrix, bias, loss, gate, momentum, output, T, seed):
    step, shapes = affine_rule(matrix, bias, loss, gate, momentum, output)
    program = assert_same(step, shapes, T, "torch", F64, 1e-9, seed=seed)
    # With momentum a decay of the state couples weights and momentum both ways: no scalar coefficients.
    assert program.sequential == (loss == "decayed" and momentum)


# --- a mini-batch size that is asked for ----------------------------------------------------------------------


class Online(torch.nn.Module):
    """An online rule from a state of its own."""

    def __init__(self, step):
        super().__init__()
        self.step = step
        self.W = torch.nn.Parameter(torch.zeros(2, D, D, dtype=F64))

    def forward(self, *tokens):
        return tttc.scan(self.step, self.W, tokens, 1, shared=torch.full((2,), 0.2, dtype=F64))[1]


def warned(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = run()
    return out, [str(w.message) for w in caught if issubclass(w.category, tttc.TTTCWarning)]


def taken_at_the_anchor(anchor, W, token, rate):
    """What ``nonlinear`` is where its updates are taken at the anchor."""
    q, k, v, a, _ = token
    W = a * W - rate * torch.func.grad(lambda W: half_square(torch.tanh(k @ W) - v))(anchor)
    return W, q @ W


def test_a_rule_without_exact_form_is_approximated_where_asked_to():
    model, (_, tokens, _) = Online(nonlinear), arguments(MATRIX, T=21)
    compiled = tttc.compile(model, backend="torch", strict=True, mini_batch_size=8)
    got, messages = warned(lambda: compiled(*tokens))
    assert len(messages) == 1 and "nonlinear says 1, which this approximates" in messages[0]
    assert warned(lambda: compiled(*tokens))[1] == []
    rate = torch.full((2,), 0.2, dtype=F64)
    expected = tttc.scan(taken_at_the_anchor, model.W, tokens, 8, shared=rate)[1]
    assert_close([expected], [got], 1e-12)
    (gradient,) = torch.autograd.grad(got.sin().sum(), model.W)
    assert_close(torch.autograd.grad(expected.sin().sum(), model.W), [gradient], 1e-12)


def test_explain_measures_how_far_an_approximation_is():
    model, (_, tokens, _) = Online(nonlinear), arguments(MATRIX, T=21)
    explanation = tttc.explain(model, *tokens, backend="torch", mini_batch_size=8, target="")
    (scan,) = explanation.scans
    assert (scan.form, scan.says, scan.mini_batch_size) == ("dual", 1, 8)
    exact = model(*tokens)
    approximate = tttc.compile(model, backend="torch", mini_batch_size=8)(*tokens)
    deviation = float((approximate - exact).abs().max() / exact.abs().max())
    assert deviation > 1e-3
    assert scan.deviation["outputs"] == pytest.approx(deviation)
    assert max(scan.errors.values()) < 1e-12
    assert all(stage.error < 1e-12 for stage in scan.stages)
    assert "deviation from it" in str(explanation)


def test_a_rule_with_an_exact_form_keeps_it():
    model, (_, tokens, _) = Online(delta), arguments(MATRIX, T=21)
    compiled = tttc.compile(model, backend="torch", strict=True, mini_batch_size=8)
    got, messages = warned(lambda: compiled(*tokens))
    assert messages == []
    assert_close([model(*tokens)], [got], 1e-12)
    (scan,) = tttc.explain(model, *tokens, backend="torch", mini_batch_size=8, target="").scans
    assert (scan.form, scan.says, scan.unit, scan.deviation) == ("chunkwise", None, 16, {})
    assert all(stage.error < 1e-12 for stage in scan.stages)


def test_a_rule_that_mini_batches_do_not_help_stays_exact():
    model, (_, tokens, _) = Online(normalised), arguments(MATRIX, T=9)
    compiled = tttc.compile(model, backend="torch", strict=True, mini_batch_size=8)
    got, messages = warned(lambda: compiled(*tokens))
    assert len(messages) == 1 and "stays token by token" in messages[0]
    assert_close([model(*tokens)], [got], 1e-12)


# --- the examples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [delta_net, gated_delta_net], ids=lambda m: m.__name__)
def test_examples(rule):
    for backend, dtype, tolerance in (("torch", F64, 1e-10), ("triton", torch.float32, 1e-4)):
        leaves, spec = pytree.tree_flatten(rule.example(_run.Normal(), B=1, T=21, d=D)[:3])
        leaves = [x if x is None else x.to(dtype) for x in leaves]
        W, tokens, _ = pytree.tree_unflatten(leaves, spec)
        key, groups = interned(rule.step, W[None], tokens, None)
        assert not build_program(_scan_op.interned(key), 1, verify=True).sequential
        expected = with_gradients(torch.ops.tttc.scan, groups, key, 1, 0)
        got = with_gradients(torch.ops.tttc.fused_scan, groups, key, 1, 0, backend, True, 1)
        for x, y in zip(expected, got, strict=True):
            assert_close(x, y, tolerance)
