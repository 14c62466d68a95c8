"""Gradients of lookups at places that follow from sizes."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from tttc.passes.few_places import few_places

aten = torch.ops.aten


def rewritten(fn, *inputs):
    gm = make_fx(fn, tracing_mode="symbolic")(*inputs)
    few_places(gm)
    gm.recompile()
    left = gm.graph.find_nodes(op="call_function", target=aten.index_put.default)
    return gm, bool(left)


def into(n, place, accumulate=True):
    def fn(v):
        return torch.full((n,), 0.5, dtype=v.dtype).index_put([place(v.shape[0])], v, accumulate)

    return fn


@pytest.mark.parametrize(
    "place", [lambda n: torch.arange(n) % 16, lambda n: -1 - torch.arange(n) % 7]
)
def test_sums_into_few_places(place):
    v = torch.randn(41, dtype=torch.float64)
    gm, left = rewritten(into(16, place), v)
    assert not left
    for n in (41, 8):
        v = torch.randn(n, dtype=torch.float64)
        torch.testing.assert_close(gm(v), into(16, place)(v))


def test_what_is_not_finite_stays_where_it_belongs():
    def fn(v):
        return into(16, lambda n: torch.arange(n) % 16)(v)

    v = torch.randn(41, dtype=torch.float64)
    v[3], v[20] = torch.inf, torch.nan
    gm, left = rewritten(fn, v)
    assert not left
    torch.testing.assert_close(gm(v), fn(v), equal_nan=True)


@pytest.mark.parametrize(
    "fn",
    [
        into(4096, lambda n: torch.arange(n)),
        into(16, lambda n: torch.arange(n) % 16, False),
        into(16, lambda n: torch.randint(16, (n,))),
        lambda v: torch.zeros(16, 3).index_put([torch.arange(v.shape[0]) % 16], v[:, None], True),
        lambda v: torch.zeros(16).index_put([torch.arange(8) % 16], v[:1], True),
    ],
)
def test_other_writes_stay(fn):
    _, left = rewritten(fn, torch.randn(12))
    assert left
