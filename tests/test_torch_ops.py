"""The torch backend: where its operators write, and what numbers and products become."""

from __future__ import annotations

import pytest
import torch
from tttc.codegen import torch_scan
from tttc.codegen.torch_memory import place, write_over

import tttc

B, H, T, D, MINI_BATCH = 2, 3, 23, 5, 4


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Two mini-batches a group: what a group leaves in memory the next one meets."""
    monkeypatch.setattr(torch_scan, "_group_size", lambda state: 2)


def hands_out_states(anchor, carry, token, shared):
    """Outputs that are the states themselves, and the same value twice."""
    x, step = token
    weights = carry["W"] - 0.3 * shared * torch.outer(torch.tanh(anchor["W"] @ x), x)
    return {"W": weights, "rest": carry["rest"]}, (
        anchor["W"],
        weights @ x,
        carry["rest"],
        x + step,
    )


def reads_again(anchor, carry, token, shared):
    """Values that are read after what is made of them was, and products and sums of all shapes."""
    x, step = token
    y = anchor["W"] @ x
    hidden = torch.exp(-(y * y) * 0.5 + 1.0) - y * shared
    error = hidden * (1.0 - y) + (y + step * 2) - (2.0 - hidden * y)
    scale = (error * error).sum() * 0.25 + 1e-3
    error = error / scale - error.mean()
    return {"W": carry["W"] - torch.outer(error, x) * 0.01, "rest": carry["rest"]}, (
        carry["W"] @ x + hidden,
        y,
    )


def inputs(dtype=torch.float64):
    gen = torch.Generator().manual_seed(0)
    state = {
        "W": torch.randn(B, H, D, D, generator=gen, dtype=dtype) / 4,
        "rest": torch.randn(B, H, D, generator=gen, dtype=dtype),
    }
    x = torch.randn(B, H, T, D, generator=gen, dtype=dtype)
    steps = torch.randint(-3, 3, (B, H, T), generator=gen)
    return state, (x, steps), torch.rand(H, generator=gen, dtype=dtype)


def leaves(result):
    return [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("step", [hands_out_states, reads_again])
def test_what_groups_leave_in_memory_is_not_written_over(step):
    def run(state, tokens, shared):
        return tttc.scan(step, state, tokens, mini_batch_size=MINI_BATCH, shared=shared)

    compiled = tttc.compile(run, backend="torch", strict=True)
    with torch.no_grad():
        arguments = inputs()
        before = [x.clone() for x in leaves(arguments)]
        expected = run(*arguments)
        got = compiled(*arguments)
        kept = [x.clone() for x in leaves(got)]
        compiled(*inputs(torch.float64))
        (state, tokens, shared) = inputs()
        compiled(state, (tokens[0] * 3, tokens[1]), shared)
    for x, y in zip(leaves(got), leaves(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    # Neither what a caller holds nor what it gave changes.
    assert all(torch.equal(x, y) for x, y in zip(leaves(got), kept, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(leaves(arguments), before, strict=True))


def test_final_states_keep_no_more_memory_than_their_own():
    def run(state, tokens, shared):
        return tttc.scan(reads_again, state, tokens, mini_batch_size=MINI_BATCH, shared=shared)

    state, tokens, shared = inputs()
    with torch.no_grad():
        got, _ = tttc.compile(run, backend="torch", strict=True)(state, tokens, shared)
    for x in leaves(got):
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


def test_operators_write_over_what_nobody_reads_again():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    nodes = {}

    def call(name, function, *operands):
        nodes[name] = graph.call_function(function, operands)
        nodes[name].meta |= {"owned": True, "dims": ("t",)}
        return nodes[name]

    a = call("a", torch.exp, x)
    b = call("b", torch.neg, a)
    turned = graph.call_function(torch.transpose, (b, -1, -2))
    c = call("c", torch.exp, b)  # not over b, of which there is a view
    d = call("d", torch.mul, c, turned)
    e = call("e", torch.exp, d)
    graph.output((e,))
    fresh = {torch.exp, torch.neg, torch.mul}
    write_over(graph, fresh, fresh, fresh)
    assert nodes["b"].kwargs == {"out": a}
    assert nodes["c"].kwargs == {}
    assert nodes["d"].kwargs == {"out": c}
    spaces = place(graph, fresh, fresh)
    assert [nodes[n].kwargs["out"].name for n in "ac"] == ["space_0", "space_1"]
    assert spaces == [("t",), ("t",)]
