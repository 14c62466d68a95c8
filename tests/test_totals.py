"""Sums over all rows, taken along by the kernels that make what is summed."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from tttc.codegen import rowwise_source
from tttc.codegen.resources import TARGETS, Request, measure
from tttc.codegen.rowwise_launch import lower_regions
from tttc.passes.fuse import decompositions, fuse
from tttc.passes.totals import totals

from tttc.ir.region import FusedRegion
from tttc.ir.total import total

aten = torch.ops.aten


def traced(fn, *inputs):
    def known(*args):
        for x, like in zip(args, inputs, strict=True):
            torch._check(x.shape[-1] == like.shape[-1])
        return fn(*args)

    gm = make_fx(known, decomposition_table=decompositions(), tracing_mode="symbolic")(*inputs)
    totals(gm)
    return gm, fuse(gm)


def results(out):
    return out if isinstance(out, (tuple, list)) else (out,)


def gradients_of_norm(g, x, w):
    """What a backward of an RMS norm gives."""
    r = x.square().mean(-1, True).rsqrt()
    y = g * w
    return r * (y - x * (y * x).mean(-1, True) * r * r), (g * x * r).sum((0, 1))


SUMS = {
    "norm": gradients_of_norm,
    "two": lambda g, x, w: ((g * x).sum((0, 1)), (g + w).sum((0, 1), True), (g - x) * w),
    "alone": lambda g, x, w: (g * x).exp().sum((0, 1)),
    "flat": lambda g, x, w: ((y := (g * x).view(-1, g.shape[-1])).sum(0), y * 2),
    "turned": lambda g, x, w: ((y := (g * x).transpose(0, 1)).sum((0, 1)), y.contiguous() * 2),
    "of sums": lambda g, x, w: (g * x).sum(-1, True).mul(w).sum((0, 1)),
    "of all alike": lambda g, x, w: ((g * x).sum((0, 1)), (w * 2).expand(g.shape).sum((0, 1))),
    "read again": lambda g, x, w: ((s := (g * x).sum((0, 1))), g * s + x),
    "of a sum": lambda g, x, w: ((g * x) * (g * x).sum((0, 1))).sum((0, 1)),
}


@pytest.mark.parametrize("columns", [12, 64, 96, 1536])
@pytest.mark.parametrize("name", SUMS)
def test_sums_over_all_rows(name, columns, interpreter, monkeypatch):
    monkeypatch.setattr(rowwise_source, "_PROGRAMS", 3)  # some rows after others
    fn = SUMS[name]
    g, x, w = torch.randn(3, 13, columns), torch.randn(3, 13, columns), torch.randn(columns)
    _, fused = traced(fn, g, x, w)
    kernels = lower_regions(fused, "triton")
    assert any("add_up" in k.source for k in kernels)
    assert not fused.graph.find_nodes(op="call_function", target=total)
    for rows in ((3, 13), (1, 2), (5, 300 // columns + 1)):
        g, x = torch.randn(*rows, columns), torch.randn(*rows, columns)
        wanted = results(fn(g.double(), x.double(), w.double()))
        for a, b in zip(results(fused(g, x, w)), wanted, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_float64_is_added_up_in_float64(interpreter):
    g, x, w = (torch.randn(*s, 64, dtype=torch.float64) for s in ((2, 9), (2, 9), ()))
    _, fused = traced(gradients_of_norm, g, x, w)
    assert lower_regions(fused, "triton")
    for a, b in zip(fused(g, x, w), gradients_of_norm(g, x, w), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_nothing_to_add_up():
    g, x, w = torch.randn(2, 9, 64), torch.randn(2, 9, 64), torch.randn(64)
    _, fused = traced(gradients_of_norm, g, x, w)
    lower_regions(fused, "triton")
    for a in fused(g[:0], x[:0], w):
        assert not a.any()


def test_sums_are_rounded_once():
    def fn(g, x, w):
        return (g * x).float().sum((0, 1), True).view(-1).to(torch.bfloat16), g * w

    g, x, w = torch.randn(2, 300, 64), torch.randn(2, 300, 64), torch.randn(64)
    gm, fused = traced(fn, g, x, w)
    (node,) = gm.graph.find_nodes(op="call_function", target=total)
    assert node.args[1] is torch.bfloat16
    assert not gm.graph.find_nodes(op="call_function", target=aten._to_copy.default)
    assert torch.equal(fused(g, x, w)[0], (g * x).sum((0, 1)).to(torch.bfloat16))


@pytest.mark.parametrize(
    "fn",
    [
        lambda g: (g * 2).sum(0),
        lambda g: (g * 2).sum((0, 2)),
        lambda g: (g * 2).sum(),
        lambda g: (g * 2).long().sum((0, 1)),
        lambda g: (g * 2).sum((0, 1), dtype=torch.float64),
    ],
)
def test_other_sums_stay(fn):
    gm, _ = traced(fn, torch.randn(2, 9, 64))
    assert not gm.graph.find_nodes(op="call_function", target=total)


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_of_sums_spill_nothing(target):
    inputs = [torch.randn(*s, 768, dtype=torch.bfloat16) for s in ((2, 9), (2, 9), ())]

    def fn(g, x, w):
        return tuple(
            y.to(torch.bfloat16) for y in gradients_of_norm(*(v.float() for v in (g, x, w)))
        )

    _, fused = traced(fn, *inputs)
    (kernel,) = lower_regions(fused, "triton")
    assert sum(isinstance(m, FusedRegion) for m in fused.children()) == 1
    names = kernel.source.partition(f"def {kernel.name}(")[2].partition(")")[0].split(", ")
    kinds = {"x": "*bf16", "y": "*bf16", "t": "*fp32"}
    signature = {n: kinds.get(n[0], "i32") for n in names if ":" not in n}
    constants = {k: v for k, v in kernel.config.items() if k.isupper()}
    options = {"num_warps": kernel.config["num_warps"]}
    (found,) = measure(
        [Request.of(kernel, signature, constexprs=constants, options=options)], target
    )
    assert found.spill_bytes == 0
