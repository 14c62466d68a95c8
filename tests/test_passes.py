"""Each pass on small steps: what it derives, what it refuses, and that validation catches one that is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from tttc.codegen.torch_scan import run_program

import tttc
from tttc import _tracing, pipeline
from tttc._checks import check_scan_inputs
from tttc._scan_op import interned
from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, Body, check, head_of
from tttc.ir.build import Builder, dims_of
from tttc.ir.cost import cost, element_count, size_table
from tttc.ir.errors import CheckError, NotLowerable
from tttc.nn import TTTMLP, TTTLinear
from tttc.nn.inner import Norm, Token
from tttc.pipeline import build_program
from tttc.scan import _flatten

TOLERANCE = 1e-9
D = 6  # of tokens
H = 5  # of hidden layers


@pytest.fixture(autouse=True)
def forward_only():
    with torch.no_grad():
        yield


# --- rules, as a user writes them ---------------------------------------------------------------------


def model(W, x):
    return x @ W


def flops(body, b):
    return cost(body).at(size_table(body, b))[0]


def half_square(x):
    return 0.5 * x.square().sum()


def linear_attention(anchor, W, token, rate):
    q, k, v = token
    W = W + torch.outer(k, v)
    return W, q @ W


def delta_rule(anchor, W, token, rate):
    q, k, v = token
    W = W - rate * torch.func.grad(lambda W: half_square(k @ W - v))(anchor)
    return W, q @ W


def online_descent(anchor, W, token, rate):
    q, k, v = token
    W = W - rate * torch.func.grad(lambda W: half_square(torch.tanh(k @ W) - v))(W)
    return W, q @ W


def momentum(anchor, carry, token, rate):
    (q, k, v), (W, S) = token, carry
    S = 0.9 * S - rate * torch.func.grad(lambda W: half_square(k @ W - v))(anchor[0])
    W = W + S
    return (W, S), q @ W


def two_layers(anchor, weights, token, rate):
    q, k, v = token

    def f(w, x):
        return torch.tanh(x @ w["first"]) @ w["second"]

    g = torch.func.grad(lambda w: half_square(f(w, k) - v))(anchor)
    weights = {name: weights[name] - rate * g[name] for name in weights}
    return weights, f(weights, q)


def linear_layers_on_top_of_each_other(anchor, weights, token, rate):
    q, k, v = token

    def f(w, x):
        return x @ w["first"] @ w["second"]

    g = torch.func.grad(lambda w: half_square(f(w, k) - v))(anchor)
    weights = {name: weights[name] - rate * g[name] for name in weights}
    return weights, f(weights, q)


def huber(anchor, W, token, rate):
    q, k, v = token
    g = torch.func.grad(lambda W: F.huber_loss(k @ W, v, reduction="sum", delta=0.3))(anchor)
    W = W - rate * g
    return W, q @ W


def vector_weights(anchor, w, token, rate):
    q, k, v = token
    w = w - rate * torch.func.grad(lambda w: half_square(torch.sigmoid(w * k) - v))(anchor)
    return w, w * q


def column_major(anchor, W, token, rate):
    q, k, v = token
    W = W - rate * torch.func.grad(lambda W: half_square(W @ k - v))(anchor)
    return W, W @ q


def normed_output(anchor, W, token, rate):
    q, k, v = token

    def f(W, x):
        return x + F.layer_norm(x @ W, (D,), eps=1e-6)

    W = W - rate * torch.func.grad(lambda W: half_square(f(W, k) - v))(anchor)
    return W, f(W, q)


def norm_of_the_state(anchor, W, token, rate):
    q, k, v = token
    W = W - rate * torch.func.grad(lambda W: half_square(k @ W - v))(anchor)
    return W, q @ (W / W.square().sum().sqrt())


def softmax_of_the_output(anchor, W, token, rate):
    q, k, v = token
    W = W - rate * torch.func.grad(lambda W: half_square(torch.softmax(k @ W, -1) - v))(anchor)
    return W, torch.softmax(q @ W, -1)


MATRIX = (D, D)
LAYERS = {"first": (D, H), "second": (H, D)}
DUAL = {
    linear_attention: MATRIX,
    delta_rule: MATRIX,
    two_layers: LAYERS,
    huber: MATRIX,
    vector_weights: (D,),
    column_major: MATRIX,
    normed_output: MATRIX,
    softmax_of_the_output: MATRIX,
    linear_layers_on_top_of_each_other: LAYERS,
    momentum: (MATRIX, MATRIX),
}
SEQUENTIAL = {
    online_descent: (MATRIX, "not affine in the old one with scalar coefficients"),
    norm_of_the_state: (MATRIX, "no dual form"),
}


def random_tree(shapes, gen, lead):
    """A tree of random tensors, one for each shape."""
    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)  # noqa: E731
    return pytree.tree_map(
        lambda shape: 0.5 * torch.randn(*lead, *shape, generator=gen, dtype=torch.float64),
        shapes,
        is_leaf=is_shape,
    )


def arguments(shapes, T=11, B=2, heads=3, width=D, seed=0):
    """State, tokens (q, k, v) and the shared learning rate of a scan."""
    gen = torch.Generator().manual_seed(seed)
    init = random_tree(shapes, gen, (heads,))
    tokens = random_tree(((width,),) * 3, gen, (B, heads, T))
    rate = 0.1 + 0.2 * torch.rand(heads, generator=gen, dtype=torch.float64)
    return init, tokens, rate


def compiled(step, init, tokens, shared, b, verify=True):
    """The flat call of a scan, and its program."""
    anchor, _, tokens, info = check_scan_inputs(step, init, None, 0, tokens, b, shared)
    structure = _tracing.describe((init, None, tokens, shared))
    call = _flatten(step, anchor, None, tokens, shared, structure, info)
    assert call is not None
    return call, build_program(interned(call.key), b, verify)


def assert_same(step, init, tokens, shared, b, cut=None):
    """The program computes what the naive loop does, also from a state within a mini-batch."""
    call, program = compiled(step, init, tokens, shared, b)
    state, z = tttc.scan(step, init, tokens, b, shared=shared)
    got = run_program(program, call.anchor, [], call.tokens, call.shared, 0)
    expected = [pytree.tree_leaves(x) for x in (state.anchor, state.carry, z)]
    for xs, ys in zip(got, expected, strict=True):
        for x, y in zip(xs, ys, strict=True):
            torch.testing.assert_close(x, y, rtol=TOLERANCE, atol=TOLERANCE)
    if cut is not None:
        head = [x[:, :, :cut] for x in call.tokens]
        rest = [x[:, :, cut:] for x in call.tokens]
        anchor, carry, first = run_program(program, call.anchor, [], head, call.shared, 0)
        *_, second = run_program(program, anchor, carry, rest, call.shared, cut % b)
        for x, y, w in zip(first, second, expected[2], strict=True):
            torch.testing.assert_close(torch.cat([x, y], 2), w, rtol=TOLERANCE, atol=TOLERANCE)
    return program


@pytest.mark.parametrize("step", DUAL, ids=lambda s: s.__name__)
def test_rules_with_a_dual_form(step):
    program = assert_same(step, *arguments(DUAL[step]), 4, cut=6)
    assert not program.sequential and program.reason is None and program.verified


@pytest.mark.parametrize("step", SEQUENTIAL, ids=lambda s: s.__name__)
def test_rules_whose_tokens_run_one_after_another(step):
    shapes, reason = SEQUENTIAL[step]
    program = assert_same(step, *arguments(shapes), 4, cut=6)
    assert program.sequential and reason in program.reason


def test_online_descent_is_sequential_and_says_why():
    program = assert_same(online_descent, *arguments(MATRIX), 1)
    assert program.sequential and "mini_batch_size is 1" in program.reason


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("width", [1, 2])
def test_features_and_heads_of_size_one(width, heads):
    arguments_ = arguments((width, width), width=width, heads=heads, B=1)
    for step in (linear_attention, delta_rule, column_major):
        assert_same(step, *arguments_, 4, cut=3)


# --- what the passes make of them -------------------------------------------------------------------------


def layer_arguments(layer, b=16, d=8):
    from test_compile import random_layer

    module = random_layer(layer, d=d, b=b)
    gen = torch.Generator().manual_seed(1)
    q, k, v = random_tree(((d,),) * 3, gen, (2, 2, 20))
    eta = torch.rand(2, 2, 20, generator=gen, dtype=torch.float64) / d
    shared = Norm(module.norm_weight, module.norm_bias)
    return module._initial_carry(), Token(q, k, v, eta, eta + 0.1), shared


@pytest.mark.parametrize("layer", [TTTLinear, TTTMLP])
def test_layers_have_a_dual_form_without_knowing_their_names(layer):
    program = assert_same(layer.step, *layer_arguments(layer), 16)
    assert not program.sequential


def sizes_of(body, b):
    return {**body.sizes, TOKEN: b, EARLIER: b}


def largest_with_tokens(body, b):
    """Elements of the largest value that every token (or pair of tokens) has one of."""
    sizes = sizes_of(body, b)
    counts = [
        element_count(dims_of(n), {**sizes, **{d: b for d in dims_of(n) if d not in sizes}})
        for n in body.nodes
        if any(d.rstrip("0123456789") in (TOKEN, EARLIER) for d in dims_of(n))
    ]
    return max(counts)


@pytest.mark.parametrize("layer", [TTTLinear, TTTMLP])
def test_no_value_is_larger_than_what_it_is_made_of(layer):
    b, d = 16, 8
    _, program = compiled(layer.step, *layer_arguments(layer, b, d), b)
    width = d if layer is TTTLinear else 4 * d
    assert largest_with_tokens(program.stages["batch"], b) == b * d * width
    assert largest_with_tokens(program.full, b) == b * max(b, width)


@pytest.mark.parametrize("layer", [TTTLinear, TTTMLP])
def test_operations_and_nodes_fall(layer):
    b = 16
    _, program = compiled(layer.step, *layer_arguments(layer, b, 48), b)
    captured, primal, dual = (program.stages[s] for s in ("capture", "batch", "dualise"))
    operators = sum(n.op == "call_function" for n in captured.graph.nodes)
    assert len(program.token.nodes) < operators
    assert len(program.full.nodes) <= len(dual.nodes)
    assert flops(dual, b) < flops(primal, b) / 2
    assert flops(program.full, b) <= flops(dual, b)


def test_linear_attention_becomes_masked_attention():
    """The whole derivation on the smallest rule: after it, q, k and v meet in products of tokens only."""
    _, program = compiled(linear_attention, *arguments(MATRIX), 4)
    kinds = sorted(n.target.__name__ for n in program.full.nodes if n.target is not ops.rename)
    # For the output q A, q k and the causal product with v; for the state k v and a sum.
    assert kinds == ["contraction"] * 3 + ["elementwise"] * 2 + ["masked_contraction"]
    (causal,) = [n for n in program.full.nodes if n.target is ops.masked_contraction]
    scores, v = causal.args[2:]
    assert (head_of(causal), causal.args[1]) == (
        "s<=t",
        f"t s, s {dims_of(v)[1]} -> t {dims_of(v)[1]}",
    )
    assert scores.target is ops.contraction
    made_of = [x.args[1] if x.target is ops.rename else x for x in scores.all_input_nodes]
    assert sorted(str(x.target) for x in made_of) == ["token_0", "token_1"]


def test_normalise_leaves_no_views():
    _, program = compiled(normed_output, *arguments(MATRIX), 4)
    allowed = {ops.contraction, ops.elementwise, ops.reduction, ops.rename}
    assert {n.target for n in program.stages["normalise"].nodes} <= allowed


def test_equal_steps_share_a_program():
    arguments_ = arguments(MATRIX)
    first = compiled(delta_rule, *arguments_, 4)[1]
    assert compiled(delta_rule, *arguments(MATRIX, T=5, B=1, seed=1), 4)[1] is first
    assert compiled(delta_rule, *arguments_, 8)[1] is not first


# --- refusals -------------------------------------------------------------------------------------------


def sorts(anchor, W, token, rate):
    q, k, v = token
    W = W + torch.outer(k, v.sort().values)
    return W, q @ W


def test_an_operator_without_a_form_is_named_with_its_line():
    with pytest.raises(NotLowerable, match=r"aten\.sort.*test_passes\.py:\d+"):
        compiled(sorts, *arguments(MATRIX), 4)


# --- what is broken is caught ------------------------------------------------------------------------------


def with_a_sign_flipped(run):
    """A pass that also turns its first sum into a difference, or the other way round."""
    flipped = {"add": "sub", "sub": "add"}

    def broken(*args, **kwargs):
        body = run(*args, **kwargs)
        for node in body.nodes:
            if node.target is ops.elementwise and head_of(node) in flipped:
                node.args = (flipped[head_of(node)], *node.args[1:])
                body.gm.recompile()
                return body
        return body

    return broken


@pytest.mark.parametrize("name", ["normalise", "simplify", "batch", "at_anchor", "dualise"])
@pytest.mark.parametrize("layer", [TTTLinear, TTTMLP])
def test_verify_catches_a_broken_pass(layer, name, monkeypatch):
    monkeypatch.setattr(pipeline, "_programs", {})
    given = layer_arguments(layer, b=4, d=4)
    assert compiled(layer.step, *given, 4, verify=True)[1].verified
    monkeypatch.setattr(pipeline, "_programs", {})
    monkeypatch.setattr(pipeline, name, with_a_sign_flipped(getattr(pipeline, name)))
    with pytest.raises(CheckError, match=r"result \d+ changed by"):
        compiled(layer.step, *given, 4, verify=True)


def test_a_broken_pass_is_caught_through_compile(monkeypatch):
    from test_compile import random_input, random_layer

    monkeypatch.setattr(pipeline, "_programs", {})
    monkeypatch.setattr(pipeline, "dualise", with_a_sign_flipped(pipeline.dualise))
    layer = random_layer(TTTLinear, d=4, b=4)
    with pytest.raises(CheckError, match=r"dualise: result \d+ changed by"):
        tttc.compile(layer, backend="torch", verify=True)(random_input(6, d=4))


# --- the checker of the IR ----------------------------------------------------------------------------------


def small_body(write):
    """A body of one state ``[i, j]`` and one token ``[i]``, its output written by ``write(builder, W, x)``."""
    graph = fx.Graph()
    builder = Builder(graph)
    W, x = graph.placeholder("anchor_0"), graph.placeholder("token_0")
    W.meta["dims"], x.meta["dims"] = ("i", "j"), ("i",)
    z = write(builder, W, x)
    graph.output((W, z))
    return Body.make(graph, {"i": 3, "j": 4}, states=1, leaf_shapes={}, output_shapes=[(4,)])


def test_a_good_body_runs():
    body = small_body(lambda b, W, x: b.contraction([x, W], ("j",)))
    W, x = torch.randn(3, 4), torch.randn(3)
    torch.testing.assert_close(body.gm(W, x)[1], x @ W)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda b, W, x: b.call(ops.contraction, (), [x, W], ("k",)), "dimension k has no size"),
        (lambda b, W, x: b.call(ops.contraction, (), [x], ("j",)), "a dimension no operand has"),
        (lambda b, W, x: b.call(ops.elementwise, ("neg",), [W], ("j",)), r"sums over \('i',\)"),
        (lambda b, W, x: b.call(torch.neg, (), [x], ("i",)), "is not an operator of the IR"),
        (lambda b, W, x: b.graph.call_method("neg", (x,)), "call_method is not part of the IR"),
    ],
)
def test_a_bad_operator_is_caught(write, message):
    with pytest.raises(CheckError, match=message):
        small_body(write)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda z: z.meta.update(dims=("i",)), "meta says"),
        (lambda z: setattr(z, "args", ("i, i j -> j", z.args[1])), "1 operands"),
        (lambda z: setattr(z, "args", ("j, i j -> j", *z.args[1:])), "has dimensions"),
    ],
)
def test_a_spoilt_body_is_caught(spoil, message):
    body = small_body(lambda b, W, x: b.contraction([x, W], ("j",)))
    spoil(body.nodes[0])
    with pytest.raises(CheckError, match=message):
        check(body)


def test_dimensions_are_distinct():
    body = small_body(lambda b, W, x: b.contraction([x, W], ("j",)))
    body.placeholders[0].meta["dims"] = ("i", "i")
    with pytest.raises(CheckError, match="are not distinct"):
        check(body)
