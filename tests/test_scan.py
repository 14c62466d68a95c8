"""The semantics of ``tttc.scan``: closed forms written by hand, states carried on, bad input, graph capture."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F

import tttc
from tttc import ScanState, _scan_op

EPS = 1e-6


class Token(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Weights(NamedTuple):
    W: torch.Tensor
    b: torch.Tensor


def linear_attention(anchor, W, token, shared):
    W = W + torch.outer(token.k, token.v)
    return W, token.q @ W


def descent(anchor, carry, token, shared):
    """TTT-Linear with a plain learning rate ``shared["rate"]``."""
    gain, bias, rate = shared["gain"], shared["bias"], shared["rate"]

    def model(weights, x):
        y = x @ weights.W + weights.b
        return x + F.layer_norm(y, y.shape, gain, bias, EPS)

    def loss(weights):
        return 0.5 * (model(weights, token.k) - token.v).square().sum()

    g = torch.func.grad(loss)(anchor)
    carry = Weights(carry.W - rate * g.W, carry.b - rate * g.b)
    return carry, model(carry, token.q)


def one_leaf(anchor, W, token, shared):
    return W + anchor * token, W.sum() * token


def random_tokens(B=2, H=3, T=10, d=4, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return Token(*(torch.randn(B, H, T, d, generator=gen, dtype=dtype) for _ in range(3)))


def descent_arguments(B=2, H=3, T=10, d=4, dtype=torch.float64):
    gen = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(shape, generator=gen, dtype=dtype)  # noqa: E731
    init = Weights(0.3 * make(H, d, d), 0.3 * make(H, d))
    shared = {"gain": 1 + 0.2 * make(H, d), "bias": 0.2 * make(H, d), "rate": 0.1}
    return init, random_tokens(B, H, T, d, dtype), shared


def leaves(tree: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def assert_close(a: Any, b: Any, tolerance: float = 1e-12) -> None:
    la, lb = leaves(a), leaves(b)
    assert len(la) == len(lb) and la
    for x, y in zip(la, lb, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# --- closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [1, 3, 16])
def test_linear_attention_is_masked_attention(b):
    q, k, v = tokens = random_tokens()
    W0 = torch.randn(3, 4, 4, dtype=torch.float64)
    state, z = tttc.scan(linear_attention, W0, tokens, b)
    expected = torch.tril(q @ k.mT) @ v + q @ W0
    assert_close(z, expected)
    assert_close(state.carry, W0 + k.mT @ v)
    assert state.place == 10 % b


def closed_form_descent(init, tokens, shared, b):
    """The dual form of ``descent``: gradients at the anchor by hand, outputs through a mask."""
    q, k, v = tokens
    gain, bias = shared["gain"][:, None], shared["bias"][:, None]
    W = init.W.expand(q.shape[0], *init.W.shape)
    c = init.b.expand(q.shape[0], *init.b.shape)
    out, anchors = [], []
    for start in range(0, q.shape[2], b):
        Q, K, V = (x[:, :, start : start + b] for x in (q, k, v))
        anchors.append(Weights(W, c))
        y = K @ W + c[:, :, None]
        centred = y - y.mean(-1, keepdim=True)
        std = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
        hat = centred / std
        dhat = (K + hat * gain + bias - V) * gain
        G = (dhat - dhat.mean(-1, keepdim=True) - hat * (dhat * hat).mean(-1, keepdim=True)) / std
        mask = torch.ones(Q.shape[2], Q.shape[2], dtype=q.dtype).tril()
        y = Q @ W - shared["rate"] * ((Q @ K.mT) * mask) @ G
        y = y + c[:, :, None] - shared["rate"] * G.cumsum(2)
        centred = y - y.mean(-1, keepdim=True)
        hat = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
        out.append(Q + hat * gain + bias)
        W = W - shared["rate"] * K.mT @ G
        c = c - shared["rate"] * G.sum(2)
    full = q.shape[2] % b == 0
    return Weights(W, c) if full else anchors[-1], Weights(W, c), torch.cat(out, 2)


@pytest.mark.parametrize("b", [1, 4, 5, 16])
def test_ttt_linear_is_its_dual_form(b):
    init, tokens, shared = descent_arguments()
    state, z = tttc.scan(descent, init, tokens, b, shared=shared)
    anchor, carry, expected = closed_form_descent(init, tokens, shared, b)
    assert_close(z, expected)
    assert_close(state.carry, carry)
    assert_close(state.anchor, anchor)


def test_gradients_are_those_of_the_dual_form():
    def run(form):
        init, tokens, shared = descent_arguments(T=6)
        inputs = [x.requires_grad_() for x in leaves((init, tokens, shared))]
        loss = sum(
            (i + 1) * x.sin().sum() for i, x in enumerate(leaves(form(init, tokens, shared)))
        )
        return torch.autograd.grad(loss, inputs)

    def by_hand(init, tokens, shared):
        _, carry, z = closed_form_descent(init, tokens, shared, 4)
        return carry, z

    def by_scan(init, tokens, shared):
        state, z = tttc.scan(descent, init, tokens, 4, shared=shared)
        return state.carry, z

    assert_close(run(by_scan), run(by_hand), 1e-10)


# --- the state ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(11))
def test_continuing_equals_one_long_call(cut):
    init, tokens, shared = descent_arguments()
    whole, z = tttc.scan(descent, init, tokens, 4, shared=shared)
    first = Token(*(x[:, :, :cut] for x in tokens))
    rest = Token(*(x[:, :, cut:] for x in tokens))
    state, z1 = tttc.scan(descent, init, first, 4, shared=shared)
    assert state.place == cut % 4
    state, z2 = tttc.scan(descent, state, rest, 4, shared=shared)
    assert_close(torch.cat([z1, z2], 2), z)
    assert_close(state[:2], whole[:2])
    assert state.place == whole.place


def test_token_by_token_equals_one_long_call():
    init, tokens, shared = descent_arguments()
    whole, z = tttc.scan(descent, init, tokens, 4, shared=shared)
    state, outputs = init, []
    for t in range(10):
        state, out = tttc.scan(
            descent, state, Token(*(x[:, :, t : t + 1] for x in tokens)), 4, shared=shared
        )
        outputs.append(out)
    assert_close(torch.cat(outputs, 2), z)
    assert_close(state[:2], whole[:2])


def test_anchor_is_refreshed_at_the_start_of_each_mini_batch():
    def step(anchor, carry, token, shared):
        return carry + token, torch.stack([anchor, carry])

    x = torch.ones(1, 1, 5)
    state, z = tttc.scan(step, torch.zeros(1), x, 2)
    assert z[0, 0].tolist() == [[0, 0], [0, 1], [2, 2], [2, 3], [4, 4]]
    assert (state.anchor.item(), state.carry.item(), state.place) == (4, 5, 1)


# --- shapes and dtypes ----------------------------------------------------------------------------


@pytest.mark.parametrize(("B", "H", "T"), [(2, 3, 0), (0, 3, 5), (2, 0, 5), (0, 0, 0)])
def test_empty(B, H, T):
    init, tokens, shared = descent_arguments(B, H, T)
    state, z = tttc.scan(descent, init, tokens, 4, shared=shared)
    assert z.shape == (B, H, T, 4) and z.dtype == torch.float64
    assert state.carry.W.shape == (B, H, 4, 4)
    assert state.place == T % 4
    if T == 0:
        assert_close(state.carry, Weights(*(x.expand(B, *x.shape) for x in init)))
        again, _ = tttc.scan(descent, ScanState(*state[:2], 3), tokens, 4, shared=shared)
        assert again.place == 3


def test_non_contiguous():
    init, tokens, shared = descent_arguments()
    expected = tttc.scan(descent, init, tokens, 4, shared=shared)
    strided = Token(*(x.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1) for x in tokens))
    assert not strided.q.is_contiguous()
    turned = Weights(init.W.mT.contiguous().mT, init.b)
    assert_close(tttc.scan(descent, turned, strided, 4, shared=shared)[1], expected[1])
    assert_close(tttc.scan(descent, turned, strided, 4, shared=shared)[0], expected[0])


@pytest.mark.parametrize(
    ("state", "token", "param", "computed", "output"),
    [
        ("float32", "bfloat16", "float32", "float32", "bfloat16"),
        ("bfloat16", "bfloat16", "bfloat16", "float32", "bfloat16"),
        ("float16", "float16", "float32", "float32", "float16"),
        ("float32", "float64", "float32", "float64", "float64"),
        ("float32", "float32", "float64", "float64", "float32"),
        ("float64", "bfloat16", "float32", "float64", "bfloat16"),
    ],
)
def test_mixed_dtypes(state, token, param, computed, output):
    state, token, param, computed, output = (
        getattr(torch, x) for x in (state, token, param, computed, output)
    )
    init, tokens, shared = descent_arguments()
    init = Weights(*(x.to(state) for x in init))
    tokens = Token(*(x.to(token) for x in tokens))
    shared = {k: x.to(param) if isinstance(x, torch.Tensor) else x for k, x in shared.items()}
    out, z = tttc.scan(descent, init, tokens, 4, shared=shared)
    assert out.carry.W.dtype == out.anchor.b.dtype == computed
    assert z.dtype == output
    wide = [type(x)(*(y.to(computed) for y in x)) for x in (init, tokens)]
    params = {k: x.to(computed) if isinstance(x, torch.Tensor) else x for k, x in shared.items()}
    exact, z_exact = tttc.scan(descent, *wide, 4, shared=params)
    assert_close(out[:2], exact[:2])
    assert_close(z, z_exact.to(output))


def test_two_floating_token_dtypes_give_the_widest():
    tokens = random_tokens(dtype=torch.float32)
    tokens = tokens._replace(k=tokens.k.bfloat16())
    assert tttc.scan(linear_attention, torch.zeros(3, 4, 4), tokens)[1].dtype == torch.float32


def pick(anchor, carry, token, shared):
    x, index, keep = token
    carry = torch.where(keep, carry + shared[index], carry)
    return carry, {"z": carry * x, "index": index + 1}


def pick_arguments():
    gen = torch.Generator().manual_seed(0)
    index = torch.randint(5, (2, 3, 7), generator=gen)
    x = torch.randn(2, 3, 7, generator=gen)
    return torch.zeros(3), (x, index, x > 0), torch.randn(3, 5, generator=gen)


def test_integer_and_bool_tokens():
    init, tokens, table = pick_arguments()
    state, out = tttc.scan(pick, init, tokens, 2, shared=table)
    assert out["index"].dtype == torch.int64 and torch.equal(out["index"], tokens[1] + 1)
    added = torch.gather(table.expand(2, 3, 5), 2, tokens[1]) * tokens[2]
    assert_close(state.carry, added.sum(-1), 1e-5)
    assert_close(out["z"], added.cumsum(-1) * tokens[0], 1e-5)


def test_init_with_and_without_batch():
    init, tokens, shared = descent_arguments()
    batched = Weights(*(x.expand(2, *x.shape).contiguous() for x in init))
    expected = tttc.scan(descent, init, tokens, 4, shared=shared)
    assert_close(tttc.scan(descent, batched, tokens, 4, shared=shared), expected)
    mixed = Weights(batched.W, init.b)
    assert_close(tttc.scan(descent, mixed, tokens, 4, shared=shared), expected)


def test_init_that_could_be_read_both_ways():
    """B = H = d: ``[H, d, d]`` is no batch of vectors, because the step does not run on vectors."""
    init, tokens, shared = descent_arguments(B=4, H=4, T=5, d=4)
    batched = Weights(*(x.expand(4, *x.shape) for x in init))
    expected = tttc.scan(descent, batched, tokens, 2, shared=shared)
    assert_close(tttc.scan(descent, init, tokens, 2, shared=shared), expected)


def test_init_that_runs_both_ways_is_batched():
    def step(anchor, carry, token, shared):
        return carry + 1, token.sum()

    x = torch.zeros(3, 3, 2, 5)
    state, _ = tttc.scan(step, torch.zeros(3, 3), x)
    assert state.carry.shape == (3, 3)


def test_shared_none_and_constants():
    def step(anchor, carry, token, shared):
        assert shared is None
        return carry + token, carry

    assert tttc.scan(step, torch.zeros(3), torch.ones(2, 3, 4))[1].shape == (2, 3, 4)


def test_nan_stays_in_its_head_and_after_its_token():
    tokens = random_tokens()
    tokens.k[1, 2, 4, 0] = float("nan")
    _, z = tttc.scan(linear_attention, torch.zeros(3, 4, 4, dtype=torch.float64), tokens, 4)
    bad = z.isnan().any(-1)
    assert bad[1, 2].tolist() == [False] * 4 + [True] * 6
    assert bad.sum() == 6


def test_autocast_does_not_reach_the_step():
    init, tokens, shared = descent_arguments(dtype=torch.float32)
    expected = tttc.scan(descent, init, tokens, 4, shared=shared)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(tttc.scan(descent, init, tokens, 4, shared=shared), expected)


# --- errors ---------------------------------------------------------------------------------------

X = torch.ones(2, 3, 4)  # tokens with B = 2, H = 3, T = 4
GOOD: dict[str, Any] = {"step": one_leaf, "init": torch.zeros(3), "tokens": X, "mini_batch_size": 2}


def returning(value):
    return lambda anchor, carry, token, shared: value(carry, token)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"mini_batch_size": 0},
            ValueError,
            r"mini_batch_size: expected an int of at least 1, got 0",
        ),
        ({"mini_batch_size": 2.0}, TypeError, r"mini_batch_size: expected an int .* got 2.0"),
        ({"mini_batch_size": True}, TypeError, r"mini_batch_size: expected an int .* got True"),
        ({"step": 3}, TypeError, r"step: expected a function, got int"),
        ({"tokens": ()}, ValueError, r"tokens: expected at least one tensor .* empty tree"),
        ({"tokens": {"k": [1.0]}}, TypeError, r"tokens\['k'\]\[0\]: expected a tensor, got float"),
        (
            {"tokens": X[0]},
            ValueError,
            r"tokens: expected rank 3 or more, \[B, H, T, ...\], got \(3, 4\)",
        ),
        ({"tokens": X.cfloat()}, TypeError, r"tokens: expected a real dtype, got torch.complex64"),
        (
            {"tokens": (X, X.to("meta"))},
            ValueError,
            r"tokens\[1\]: expected device cpu, got meta",
        ),
        (
            {"tokens": (X, X[:, :2])},
            ValueError,
            r"tokens\[1\]: expected \[B, H, T\] = \(2, 3, 4\) as in tokens\[0\], got \(2, 2, 4\)",
        ),
        ({"init": {}}, ValueError, r"init: expected at least one state tensor, got an empty tree"),
        ({"init": [None]}, TypeError, r"init\[0\]: expected a tensor, got NoneType"),
        (
            {"init": torch.zeros(3).long()},
            TypeError,
            r"init: expected a floating dtype .* torch.int64",
        ),
        (
            {"init": torch.zeros(3).cfloat()},
            TypeError,
            r"init: expected a floating dtype .*complex64",
        ),
        (
            {"init": torch.zeros(3, device="meta")},
            ValueError,
            r"init: expected device cpu, got meta",
        ),
        (
            {"init": torch.zeros(5)},
            ValueError,
            r"init: expected \[B, H, ...\] or \[H, ...\] with B = 2 and H = 3, got shape \(5,\)",
        ),
        ({"init": torch.zeros(5, 3)}, ValueError, r"init: expected .* got shape \(5, 3\)"),
        ({"init": torch.zeros(())}, ValueError, r"init: expected .* got shape \(\)"),
        (
            {"shared": torch.zeros(2)},
            ValueError,
            r"shared: expected \[H, ...\] with H = 3, got shape \(2,\)",
        ),
        (
            {"shared": {"w": torch.zeros(3).cfloat()}},
            TypeError,
            r"shared\['w'\]: expected a real dtype",
        ),
        (
            {"shared": torch.zeros(3, device="meta")},
            ValueError,
            r"shared: expected device cpu, got meta",
        ),
        (
            {"init": ScanState(torch.zeros(2, 3), torch.zeros(2, 3), 2)},
            ValueError,
            r"init.place: expected a place in the mini-batch, 0 to 1, got 2",
        ),
        (
            {"init": ScanState(torch.zeros(2, 3), torch.zeros(2, 3), 1.0)},
            TypeError,
            r"init.place: expected an int, got float",
        ),
        (
            {"init": ScanState(torch.zeros(3), torch.zeros(2, 3), 0)},
            ValueError,
            r"init.anchor: expected \[B, H, ...\] with B = 2 and H = 3, got shape \(3,\)",
        ),
        (
            {"init": ScanState(torch.zeros(2, 3), torch.zeros(1, 3), 0)},
            ValueError,
            r"init.carry: expected \[B, H, ...\] with B = 2 and H = 3, got shape \(1, 3\)",
        ),
        (
            {"init": ScanState(torch.zeros(2, 3), torch.zeros(2, 3, 1), 0)},
            ValueError,
            r"init.carry: expected the shape of init.anchor, \(2, 3\), got \(2, 3, 1\)",
        ),
        (
            {"init": ScanState(torch.zeros(2, 3), [torch.zeros(2, 3)], 0)},
            ValueError,
            r"init.carry: expected a tree like init.anchor",
        ),
        (
            {"step": returning(lambda c, t: c)},
            TypeError,
            r"step: .* return \(carry, output\), got Tensor",
        ),
        (
            {"step": returning(lambda c, t: ([c], t))},
            ValueError,
            r"step: expected it to return a carry like the one it was given",
        ),
        (
            {"step": returning(lambda c, t: (1.0, t))},
            TypeError,
            r"step: .* tensor for carry, got float",
        ),
        (
            {"step": returning(lambda c, t: (c, 1.0))},
            TypeError,
            r"step: .* tensor for output, got float",
        ),
        (
            {"step": returning(lambda c, t: (c.long(), t))},
            TypeError,
            r"step: expected a floating dtype for carry, got torch.int64",
        ),
        (
            {"step": returning(lambda c, t: (c.cfloat(), t))},
            TypeError,
            r"step: expected a floating dtype for carry, got torch.complex64",
        ),
        (
            {"step": returning(lambda c, t: (torch.stack([c, c]), t))},
            ValueError,
            r"step: expected carry to keep its shape \(\), got \(2,\)",
        ),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        tttc.scan(**{**GOOD, **change})


def test_errors_of_the_step_come_with_no_tokens_too():
    with pytest.raises(TypeError, match="step: expected a tensor for output, got float"):
        tttc.scan(returning(lambda c, t: (c, 1.0)), torch.zeros(3), X[:, :, :0])


# --- graph capture --------------------------------------------------------------------------------


def compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")


def two_calls(init, tokens, shared):
    """A scan cut in two, everything it returns kept."""
    first, rest = (Token(*(x[:, :, s] for x in tokens)) for s in (slice(0, 3), slice(3, None)))
    state, z1 = tttc.scan(descent, init, first, 4, shared=shared)
    state, z2 = tttc.scan(descent, state, rest, 4, shared=shared)
    return state, torch.cat([z1, z2], 2)


def test_captured_whole_with_gradients_at_any_length():
    captured = compiled(two_calls)
    torch._dynamo.utils.counters.clear()
    for B, T in ((2, 10), (3, 7), (5, 6)):
        results = []
        for run in (captured, two_calls):
            init, tokens, shared = descent_arguments(B, 3, T)
            inputs = [x.requires_grad_() for x in leaves((init, tokens, shared))]
            state, z = run(init, tokens, shared)
            loss = z.sin().sum() + sum(x.square().sum() for x in leaves(state.carry))
            results.append((state[:2], z, torch.autograd.grad(loss, inputs)))
            assert state.place == T % 4
        assert_close(*results)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_captured_with_ints_and_ambiguous_init():
    init, tokens, table = pick_arguments()
    call = lambda *args: tttc.scan(pick, args[0], args[1], 2, shared=args[2])  # noqa: E731
    got, expected = compiled(call)(init, tokens, table), call(init, tokens, table)
    assert_close(got, expected, 1e-6)
    assert [x.dtype for x in leaves(got)] == [x.dtype for x in leaves(expected)]

    init, tokens, shared = descent_arguments(B=4, H=4, T=5, d=4)
    call = lambda *args: tttc.scan(descent, args[0], args[1], 2, shared=args[2])  # noqa: E731
    assert_close(compiled(call)(init, tokens, shared), call(init, tokens, shared))


def scaled(anchor, carry, token, shared):
    return carry + shared * token, torch.copysign(token, torch.tensor(shared))


def test_equal_constants_are_different_programs():
    x = torch.ones(2, 3, 4)

    def call(x):
        return [tttc.scan(scaled, torch.zeros(3), x, shared=c)[1] for c in (0.0, -0.0)]

    positive, negative = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(positive, x) and torch.equal(negative, -x)


def test_step_that_closes_over_a_tensor_runs_beside_the_graph():
    scale = torch.full((), 2.0)

    def step(anchor, carry, token, shared):
        return carry + scale * token, carry

    call = lambda x: tttc.scan(step, torch.zeros(3), x)[1] + 1  # noqa: E731
    assert_close(torch.compile(call, backend="aot_eager")(X), call(X))


def test_errors_under_torch_compile():
    call = torch.compile(lambda x: tttc.scan(one_leaf, torch.zeros(5), x)[1], backend="aot_eager")
    with pytest.raises(ValueError, match=r"init: expected .* H = 3, got shape \(5,\)"):
        call(X)


def test_opcheck():
    init, tokens, shared = descent_arguments(T=6)
    graph_key = []

    def keep_key(gm, example_inputs):
        graph_key.extend(n.args[4] for n in gm.graph.nodes if n.target is torch.ops.tttc.scan)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(
        lambda *a: tttc.scan(descent, a[0], a[1], 4, shared=a[2]), fullgraph=True, backend=keep_key
    )(init, tokens, shared)
    (key,) = graph_key
    assert _scan_op.interned(key).step is descent
    anchor = [x.expand(2, *x.shape).contiguous().requires_grad_() for x in init]
    carry = [0.9 * x.detach() for x in anchor]
    token_leaves = [x.requires_grad_() for x in tokens]
    params = [shared["gain"].requires_grad_(), shared["bias"].requires_grad_()]
    transposed = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in tokens]
    torch.library.opcheck(
        torch.ops.tttc.scan.default, (anchor, [], token_leaves, params, key, 4, 0)
    )
    torch.library.opcheck(
        torch.ops.tttc.scan.default, (anchor, carry, transposed, params, key, 4, 3)
    )
    # Within one mini-batch the anchor comes back as it went in, but for its strides.
    turned = [anchor[0].detach().mT.contiguous().mT, anchor[1].detach()]
    torch.library.opcheck(
        torch.ops.tttc.scan.default, (turned, carry, transposed, params, key, 16, 3)
    )
    outputs = torch.ops.tttc.scan(anchor, carry, token_leaves, params, key, 4, 3)
    grads = [torch.randn_like(x) for x in outputs]
    arguments = ([x.detach() for x in group] for group in (anchor, carry, transposed, params))
    torch.library.opcheck(
        torch.ops.tttc.scan_backward.default,
        (grads, *arguments, key, 4, 3),
        test_utils=("test_schema", "test_faketensor"),
    )
