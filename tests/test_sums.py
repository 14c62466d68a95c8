"""Sums made of what is known earlier, and sums made together."""

from __future__ import annotations

import pytest
import torch
from test_passes import compiled, layer_arguments
from torch import fx
from tttc.codegen.crowding import Crowd
from tttc.codegen.heuristics import default_schedule
from tttc.codegen.render import render
from tttc.codegen.together import groups_of, in_order
from tttc.codegen.torch_scan_backward import derive
from tttc.passes.backward import backward
from tttc.passes.simplify import simplify
from tttc.passes.sums import sums
from tttc.passes.verify import verify_pass

from tttc.ir import ops
from tttc.ir.body import Body, spec_of
from tttc.ir.build import Builder
from tttc.ir.depth import depths
from tttc.nn import TTTMLP, TTTLinear
from tttc.runtime.triton_scan_backward import backward_loop_of


def body_of(write, **dims):
    """A body of tokens ``x [i]`` and ``y [i]``, its outputs written by ``write(builder, x, y)``."""
    graph = fx.Graph()
    builder = Builder(graph)
    x, y = graph.placeholder("token_0"), graph.placeholder("token_1")
    x.meta["dims"], y.meta["dims"] = dims.get("x", ("t", "i")), dims.get("y", ("t", "i"))
    results = write(builder, x, y)
    graph.output(results)
    return Body.make(
        graph, {"i": 5}, states=0, leaf_shapes={}, output_shapes=[(5,)] * len(results), batched=True
    )


def centred(b, x):
    """A value without its mean, and its sum."""
    total = b.contraction([x], ("t",))
    return b.elementwise("sub", x, b.elementwise("mul", total, 0.2)), total


def agree(before, after):
    torch.manual_seed(0)
    given = torch.randn(2, 3, 5, dtype=torch.float64).unbind()
    for a, b in zip(before.gm(*given), after.gm(*given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_what_is_centred_adds_nothing():
    """sum(y + c (x - mean x)) is sum(y), which waits for nothing."""

    def write(b, x, y):
        c, _ = centred(b, x)
        return (b.contraction([b.elementwise("add", y, b.elementwise("mul", c, 3.0))], ("t",)),)

    before = body_of(write)
    after = sums(before)
    assert [spec_of(n) for n in after.nodes] == ["t i -> t"]
    assert after.nodes[0].args[1].target == "token_1"
    agree(before, after)


def test_factors_without_the_dimension_stand_outside():
    """Of r x, with r made of x, the sum is r times that of x: sooner by one."""

    def write(b, x, y):
        r = b.elementwise("rsqrt", b.elementwise("exp", b.contraction([y], ("t",))))
        return (b.contraction([b.elementwise("mul", x, r)], ("t",)),)

    before = body_of(write)
    after = sums(before)
    assert depths(before.nodes)[before.results[0]] == 2
    assert depths(after.nodes)[after.results[0]] == 1
    agree(before, after)


@pytest.mark.parametrize(
    "write",
    [
        lambda b, x, y: (b.contraction([b.elementwise("mul", x, y)], ("t",)),),
        lambda b, x, y: (b.contraction([b.elementwise("add", x, y)], ("t",)),),
        lambda b, x, y: (b.contraction([centred(b, x)[0]], ("t",)),),
    ],
    ids=["a product", "two sums for one", "nothing at all"],
)
def test_other_sums_stay(write):
    """What adds up to nothing stays too: where x is not finite, so is its sum."""
    before = body_of(write)
    assert [spec_of(n) for n in sums(before).nodes] == [spec_of(n) for n in simplify(before).nodes]


def test_two_sums_that_are_added_are_one():
    def write(b, x, y):
        first = b.contraction([x], ("i",))
        rest = b.elementwise("add", first, b.elementwise("exp", b.contraction([y], ("i",))))
        return (b.elementwise("add", rest, b.contraction([b.elementwise("mul", x, y)], ("i",))),)

    before = body_of(write)
    after = sums(before)
    assert sum(n.target is ops.contraction for n in before.nodes) == 3
    assert sum(n.target is ops.contraction for n in after.nodes) == 2
    agree(before, after)


@torch.no_grad()
@pytest.mark.parametrize("layer", [TTTLinear, TTTMLP])
def test_layers_wait_less(layer):
    """Forward and backward of layers with norms: fewer products and sums one after another, the same results."""
    program = compiled(layer.step, *layer_arguments(layer, b=4, d=4), 4, verify=True)[1]
    full, settled = program.full, program.settled["full"]
    verify_pass("sums", full, settled, 4, True)
    longest = [max(depths(x.nodes).values()) for x in (full, settled)]
    assert longest[1] < longest[0]
    leaves = ("token_0", "token_1", "token_2", "token_3", "token_4", "shared_0", "shared_1")
    made = derive(program, "full", leaves).body
    plain = simplify(backward(full, derive(program, "full", leaves).wanted, None).body)
    assert max(depths(made.nodes).values()) < max(depths(plain.nodes).values())


@torch.no_grad()
def test_sums_are_made_together():
    """A norm's derivative adds up two things that wait for the same: one call makes both."""
    program = compiled(TTTLinear.step, *layer_arguments(TTTLinear, b=16, d=16), 16)[1]
    loop = backward_loop_of(program, "full", ("token_0", "token_1", "token_2"))
    source = render(loop, default_schedule(loop, Crowd.ONE, backward=True)).source
    assert "def sums_2(" in source and source.count(" = sums_") >= 4


def test_what_waits_for_another_is_not_made_with_it():
    graph = fx.Graph()
    b = Builder(graph)
    x = graph.placeholder("x")
    x.meta["dims"] = ("t", "i")
    first = b.contraction([x], ("t",))
    scaled = b.elementwise("mul", x, first)
    second = b.contraction([scaled], ("t",))
    third = b.contraction([b.elementwise("exp", x)], ("t",))
    last = b.contraction([b.elementwise("mul", scaled, third)], ("t",))
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    groups = groups_of(nodes, lambda n: "sum" if n.target is ops.contraction else None)
    assert groups[first] == groups[third] == (first, third)
    assert groups[second] == groups[last] == (second, last)
    order = in_order(nodes, groups)
    flat = [n for x in order for n in (x if isinstance(x, tuple) else (x,))]
    assert sorted(flat, key=nodes.index) == nodes
    for i, node in enumerate(flat):
        assert not set(node.all_input_nodes) & set(flat[i + 1 :])
