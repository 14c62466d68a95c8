"""Running products that take in the number of their own token."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_sums import body_of
from tttc.passes.longer_products import longer_products

from tttc.ir import ops
from tttc.ir.body import head_of

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from rule_cases import rule_case

VECTOR = {"x": ("t",), "y": ("t",)}


def relations(body):
    """Of its running products, whether each takes in its token."""
    return [head_of(n) for n in body.nodes if n.target is ops.running_product]


def agree(before, after):
    """On tokens one of which is zero."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 7, dtype=torch.float64).unbind()
    x[3] = 0.0
    for a, b in zip(before.gm(x, y), after.gm(x, y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def pairs(b, x):
    return b.running_product("s<t", x, ("t", "s"))


def test_what_a_token_multiplies_by_its_own_number():
    """Up to each token, between each two, and among other factors, in products of products."""

    def write(b, x, y):
        own = b.contraction([b.running_product("s<t", x, ("t",)), x], ("t",))
        earlier = b.rename(y, {"t": "s"})
        both = b.contraction([x, earlier], ("t", "s"))
        between = b.contraction([both, pairs(b, x)], ("t", "s"))
        return own, b.contraction([between], ("t",))

    before = body_of(write, **VECTOR)
    after = longer_products(before)
    assert relations(before) == ["s<t", "s<t"]
    assert relations(after) == ["s<=t", "s<=t"]
    agree(before, after)


@pytest.mark.parametrize(
    "write",
    [
        lambda b, x, y: b.contraction([y, pairs(b, x)], ("t", "s")),
        lambda b, x, y: b.contraction([b.rename(x, {"t": "s"}), pairs(b, x)], ("t", "s")),
        lambda b, x, y: b.elementwise("add", x, b.running_product("s<t", x, ("t",))),
    ],
    ids=["another number", "the earlier token's", "a sum"],
)
def test_others_stay(write):
    body = body_of(lambda b, x, y: (b.contraction([write(b, x, y)], ("t",)),), **VECTOR)
    assert longer_products(body) is body


def test_axes_stay_where_they_are():
    def write(b, x, y):
        turned = b.contraction([x, pairs(b, x)], ("s", "t"))
        return (b.contraction([turned, b.rename(y, {"t": "s"})], ("t",)), turned)

    before = body_of(write, **VECTOR)
    after = longer_products(before)
    assert relations(after) == ["s<=t"]
    agree(before, after)


def test_numbers_stay_factors():
    def write(b, x, y):
        return (b.contraction([x, b.running_product("s<t", x, ("t",)), 2.0], ("t",)),)

    body = body_of(write, **VECTOR)
    assert longer_products(body) is body


@pytest.mark.parametrize("shared", ["the running product", "a product with it"])
def test_what_others_read_stays_for_them(shared):
    def write(b, x, y):
        short = b.running_product("s<t", x, ("t",))
        part = b.contraction([short, y], ("t",))
        return b.contraction([part, x], ("t",)), short if shared == "the running product" else part

    body = body_of(write, **VECTOR)
    assert longer_products(body) is body


def test_gates_of_the_delta_rule_are_multiplied_once():
    """Up to each token and between each two, for all that a mini-batch does with them."""
    program = rule_case("gated_delta_net", 1, 64, 1, 32, device="cpu").program()
    assert sorted(relations(program.full)) == ["s<=t", "s<=t"]
    assert "s<t" in relations(program.stages["chunkwise"])
