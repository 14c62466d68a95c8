"""``tttc.compile`` at the edges: what can't be captured or lowered, odd inputs, bad arguments, threads."""

from __future__ import annotations

import inspect
import re
import threading
import warnings

import pytest
import torch
from test_compile import assert_close, random_input, random_layer

import tttc
from tttc import options
from tttc.ir.errors import NotLowerable
from tttc.nn import TTTMLP, TTTLinear


@pytest.fixture(autouse=True)
def forward_only(monkeypatch):
    import torch._dynamo

    torch._dynamo.reset()
    monkeypatch.setattr(options, "_warned", set())  # each test is told afresh
    with torch.no_grad():
        yield


def linear_attention(anchor, W, token, shared):
    q, k, v = token
    W = W + torch.outer(k, v)
    return W, q @ W


def attend(q, k, v):
    return tttc.scan(linear_attention, torch.zeros(2, 4, 4, dtype=q.dtype), (q, k, v), 4)[1]


def sorts(anchor, W, token, shared):
    q, k, v = token
    W = W + torch.outer(k, v.sort().values)
    return W, q @ W


def sort_and_attend(q, k, v):
    return tttc.scan(sorts, torch.zeros(2, 4, 4, dtype=q.dtype), (q, k, v), 4)[1]


def qkv(T=10, B=3, H=2, d=4, dtype=torch.float64):
    gen = torch.Generator().manual_seed(2)
    return tuple(
        torch.randn(B, H, T, d, generator=gen, dtype=torch.float64).to(dtype) for _ in range(3)
    )


def warned(run):
    """What a call returns, and the messages of the compiler's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, [str(w.message) for w in caught if issubclass(w.category, tttc.TTTCWarning)]


# --- functions, and what can't be lowered --------------------------------------------------------------


def test_a_function():
    compiled = tttc.compile(attend, backend="torch", strict=True)
    got, messages = warned(lambda: compiled(*qkv()))
    assert messages == []
    assert_close(got, attend(*qkv()))
    assert compiled.__name__ == "attend"


def test_a_step_without_a_form_runs_eagerly_with_one_warning():
    compiled = tttc.compile(sort_and_attend, backend="torch")
    got, messages = warned(lambda: (compiled(*qkv()), compiled(*qkv(T=6)), compiled(*qkv())))
    assert_close(got[0], sort_and_attend(*qkv()))
    (message,) = messages
    line = inspect.getsourcelines(sorts)[1] + 2  # the line that sorts
    assert "sorts runs eagerly" in message and "aten.sort" in message
    assert f"{__file__}:{line}" in message


def test_strict_raises_instead():
    with pytest.raises(NotLowerable, match=r"aten\.sort.*test_compile_edges.py:\d+"):
        tttc.compile(sort_and_attend, backend="torch", strict=True)(*qkv())


def closing_over(scale):
    def step(anchor, W, token, shared):
        W = W + scale * torch.outer(token[1], token[2])
        return W, token[0] @ W

    def attend(q, k, v):
        return tttc.scan(step, torch.zeros(2, 4, 4, dtype=q.dtype), (q, k, v), 4)[1] * 2.0

    return attend


def test_a_closure_runs_eagerly_with_one_warning():
    attend = closing_over(torch.tensor(0.5, dtype=torch.float64))
    compiled = tttc.compile(attend, backend="torch")
    got, messages = warned(lambda: (compiled(*qkv()), compiled(*qkv(T=6))))
    assert_close(got[0], attend(*qkv()))
    (message,) = messages
    assert "step runs eagerly" in message and "closes over" in message
    line = inspect.getsourcelines(closing_over)[1] + 1
    assert re.search(rf"{re.escape(__file__)}:{line}\b", message)


def test_a_closure_raises_under_strict():
    attend = closing_over(torch.tensor(0.5, dtype=torch.float64))
    with pytest.raises(NotLowerable, match="closes over"):
        tttc.compile(attend, backend="torch", strict=True)(*qkv())


def breaks_the_graph(q, k, v):
    z = attend(q, k, v)
    torch._dynamo.graph_break()
    return attend(z, k, v)


def test_scans_on_both_sides_of_a_graph_break():
    compiled = tttc.compile(breaks_the_graph, backend="torch")
    got, messages = warned(lambda: compiled(*qkv()))
    assert messages == []
    assert_close(got, attend(attend(*qkv()), *qkv()[1:]))


def test_another_mini_batch_size_is_said_and_done():
    module = random_layer(TTTLinear, b=4)
    compiled = tttc.compile(module, backend="torch", strict=True, mini_batch_size=2)
    x = random_input(8)
    _, messages = warned(lambda: compiled(x))
    assert len(messages) == 1 and "says 4, which this approximates" in messages[0]
    again = tttc.compile(module, backend="torch", mini_batch_size=2)
    assert warned(lambda: again(x))[1] == []
    # The rotary embedding and tau stay the layer's; only the anchors are refreshed more often.
    q, k, v = qkv()
    step_wise = tttc.compile(descent_by_fours, backend="torch", strict=True, mini_batch_size=2)
    assert_close(step_wise(q, k, v), descent(q, k, v, 2))
    assert (compiled(x) - module(x)).abs().max() > 1e-6


def delta_step(anchor, W, token, shared):
    q, k, v = token
    W = W - 0.1 * torch.outer(k, k @ anchor - v)
    return W, q @ W


def descent(q, k, v, b):
    return tttc.scan(delta_step, torch.zeros(2, 4, 4, dtype=q.dtype), (q, k, v), b)[1]


def descent_by_fours(q, k, v):
    return descent(q, k, v, 4)


# --- odd inputs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [TTTLinear, TTTMLP])
def test_no_tokens_and_no_sequences(layer):
    module = random_layer(layer, b=4)
    compiled = tttc.compile(module, backend="torch", strict=True)
    _, state = compiled(random_input(6), return_state=True)
    for x, given in [
        (random_input(0), None),
        (random_input(5, B=0), None),
        (random_input(0), state),
    ]:
        assert_close(compiled(x, given, return_state=True), module(x, given, return_state=True))


def test_inputs_that_are_not_contiguous():
    module = random_layer(TTTLinear, b=4)
    compiled = tttc.compile(module, backend="torch", strict=True)
    x = random_input(20)
    for view in (x[:, ::2], x.mT.contiguous().mT, x.flip(1), x[:1].expand(3, 20, 16)):
        assert_close(compiled(view), module(view))
    q, k, v = qkv()
    run = tttc.compile(attend, backend="torch", strict=True)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert_close(run(*turned), attend(q, k, v))


def test_dtypes_are_those_of_eager():
    run = tttc.compile(attend, backend="torch", strict=True)
    q, k, v = qkv(dtype=torch.float32)
    for given in [(q.bfloat16(), k, v), (q.double(), k, v), (q.half(), k.half(), v.half())]:
        expected, got = attend(*given), run(*given)
        assert got.dtype is expected.dtype
        # Both compute in float32 at least, and round the outputs once to their dtype.
        assert_close(
            got.double(), expected.double(), max(1e-5, 2 * torch.finfo(expected.dtype).eps)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_layers_in_lower_precision(dtype):
    module = random_layer(TTTLinear, b=4, dtype=dtype)
    x = random_input(10, dtype=dtype)
    wide = random_layer(TTTLinear, b=4)
    got, state = tttc.compile(module, backend="torch", strict=True)(x, return_state=True)
    assert got.dtype is dtype and state.scan.carry.weights.W1.dtype is torch.float32
    # As far from float64 as eager is, but for a rounding here and there.
    exact = wide.load_state_dict(module.state_dict()) and wide(x.double())
    error = (got.double() - exact).abs().max()
    assert error <= 1.5 * (module(x).double() - exact).abs().max() + torch.finfo(dtype).eps


@pytest.mark.parametrize("layer", [TTTLinear, TTTMLP])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_goes_where_eager_sends_it(layer, value):
    module = random_layer(layer, b=4)
    compiled = tttc.compile(module, backend="torch", strict=True)
    for token in (0, 2, 5, 9):
        x = random_input(10)
        x[1, token, 3] = value
        (y, state), (expected, end) = compiled(x, return_state=True), module(x, return_state=True)
        assert torch.equal(y.isnan(), expected.isnan())
        assert_close((y.nan_to_num(),), (expected.nan_to_num(),))
        assert_close(state, end) if not end.scan.carry.weights.b1.isnan().any() else None
        for a, b in zip(
            *(torch.utils._pytree.tree_leaves(s.scan[:2]) for s in (state, end)), strict=True
        ):
            assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("which", ["q", "k", "v", "eta"])
@pytest.mark.parametrize("layer", [TTTLinear, TTTMLP])
def test_one_nan_in_one_argument_of_a_scan(layer, which):
    from tttc.nn.inner import Norm, Token

    module = random_layer(layer, b=4)
    q, k, v = qkv(d=8)
    eta = torch.full((3, 2, 10), 0.1, dtype=torch.float64)
    tokens = Token(q, k, v, eta, eta + 0.5)._replace()
    getattr(tokens, which)[1, 0, 6] = float("nan")
    init, shared = module._initial_carry(), Norm(module.norm_weight, module.norm_bias)

    def run(tokens):
        return tttc.scan(layer.step, init, tokens, 4, shared=shared)

    state, z = run(tokens)
    got, y = tttc.compile(run, backend="torch", strict=True)(tokens)
    assert z.isnan().any()
    assert torch.equal(y.isnan(), z.isnan())
    assert_close(y.nan_to_num(), z.nan_to_num())
    for a, b in zip(*(torch.utils._pytree.tree_leaves(s[:2]) for s in (got, state)), strict=True):
        assert torch.equal(a.isnan(), b.isnan())


# --- bad arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"backend": "cuda"},
            ValueError,
            "backend: expected one of auto, triton, torch, got 'cuda'",
        ),
        (
            {"mini_batch_size": 0},
            ValueError,
            "mini_batch_size: expected an int of at least 1, got 0",
        ),
        (
            {"mini_batch_size": 2.0},
            TypeError,
            "mini_batch_size: expected an int of at least 1, got 2.0",
        ),
        (
            {"mini_batch_size": True},
            TypeError,
            "mini_batch_size: expected an int of at least 1, got True",
        ),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        tttc.compile(attend, **options)


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"model: expected an nn.Module or a function, got int"):
        tttc.compile(3)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 16), ValueError, r"x: expected \[B, T, hidden_size\]"),
        (torch.zeros(2, 3, 8), ValueError, r"hidden_size = 16, got shape \(2, 3, 8\)"),
        (torch.zeros(2, 3, 16, dtype=torch.int64), TypeError, "x: expected a floating tensor"),
    ],
)
def test_bad_input_is_told_as_in_eager(x, error, message):
    module = random_layer(TTTLinear, b=4, dtype=torch.float32)
    with pytest.raises(error, match=message):
        module(x)
    with pytest.raises(error, match=message):
        tttc.compile(module, backend="torch")(x)


def forgets_a_leaf(anchor, carry, token, shared):
    return (carry[0],), token


def test_a_bad_step_is_told_as_in_eager():
    def run(x):
        return tttc.scan(forgets_a_leaf, (torch.zeros(2, 4), torch.zeros(2, 4)), x, 4)

    x = torch.randn(3, 2, 5, 4)
    for call in (run, tttc.compile(run, backend="torch")):
        with pytest.raises(
            ValueError, match="expected it to return a carry like the one it was given"
        ):
            call(x)


# --- many models, several threads ------------------------------------------------------------------------------


def test_models_past_the_limit_of_dynamo_are_compiled_too():
    """Dynamo compiles a function eight times and then leaves it to run eagerly; every model goes through it here."""
    for d in range(2, 22, 2):
        module = random_layer(TTTLinear, d=d, b=4)
        before = _graphs()
        x = random_input(6, d=d)
        assert_close(tttc.compile(module, backend="torch", strict=True)(x), module(x))
        assert _graphs() == before + 1


def test_equal_models_are_compiled_once():
    first, second = (random_layer(TTTLinear, b=4, seed=seed) for seed in (0, 1))
    x = random_input(6)
    tttc.compile(first, backend="torch", strict=True)(x)
    before = _graphs()
    assert_close(tttc.compile(second, backend="torch", strict=True)(x), second(x))
    assert _graphs() == before


def _graphs():
    import torch._dynamo.utils

    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_two_threads_call_one_model():
    module = random_layer(TTTLinear, b=4)
    compiled = tttc.compile(module, backend="torch", strict=True)
    inputs = [random_input(6 + i % 3, seed=i) for i in range(12)]
    expected = [module(x) for x in inputs]
    results, errors = {}, []

    def work(mine):
        try:
            with torch.no_grad():
                for i in mine:
                    results[i] = compiled(inputs[i])
        except BaseException as error:  # handed to the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(range(n, 12, 2),)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for i, y in enumerate(expected):
        assert_close(results[i], y)
