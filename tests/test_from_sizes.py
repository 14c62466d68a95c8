"""Values that follow from sizes alone are made once, and only where nobody can tell."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from tttc.codegen.rowwise_launch import lower_regions
from tttc.passes.from_sizes import remember
from tttc.passes.fuse import fuse

import tttc
from tttc.ir import remembered
from tttc.ir.region import FusedRegion
from tttc.ir.remembered import Remembered


@pytest.fixture(autouse=True)
def nothing_remembered():
    remembered._made.clear()
    yield
    remembered._made.clear()


class Ran(TorchDispatchMode):
    """The operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def turned(x):
    """``[B, H, T, d]`` with positions modulo 16."""
    half = x.shape[-1] // 2
    position = torch.arange(x.shape[-2], device=x.device) % 16
    angle = position.to(x.dtype)[:, None] * 100.0 ** (torch.arange(half).to(x.dtype) / -half)
    cos, sin, a, b = angle.cos(), angle.sin(), x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def traced(fn, *inputs, given_out=()):
    """The graph of a function of any sizes (but for a last one that is not 40), with what it remembers, and fused."""

    def known(*args):
        for x, like in zip(args, inputs, strict=True):
            if like.shape[-1] != 40:
                torch._check(x.shape[-1] == like.shape[-1])
        return fn(*args)

    gm = make_fx(known, tracing_mode="symbolic")(*inputs)
    outputs = gm.graph.output_node().all_input_nodes
    remember(gm, [outputs[i] for i in given_out])
    return gm, fuse(gm)


def of_kind(gm, kind):
    return [m for m in gm.children() if isinstance(m, kind)]


def test_a_table_of_angles_is_made_once_for_each_size():
    x = torch.randn(2, 3, 40, 64, dtype=torch.float64)
    _, fused = traced(turned, x)
    (table,) = of_kind(fused, Remembered)
    (region,) = of_kind(fused, FusedRegion)
    assert not any("cos" in n.name or "arange" in n.name for n in region.graph_module.graph.nodes)
    for T in (40, 24, 40):
        x = torch.randn(2, 3, T, 64, dtype=torch.float64)
        torch.testing.assert_close(fused(x), turned(x), rtol=0, atol=0)
    assert len(remembered._made) == 2
    assert table(40)[0] is table(40)[0] and table(40)[0] is not table(24)[0]


def test_equal_tables_are_one():
    x = torch.randn(2, 3, 40, 64)
    tables = [of_kind(traced(turned, x)[1], Remembered)[0] for _ in range(2)]
    assert tables[0](40)[0] is tables[1](40)[0]
    (other,) = of_kind(traced(lambda x: turned(x[..., :32]), x)[1], Remembered)
    assert other(40)[0] is not tables[0](40)[0]


def test_halves_of_a_row_are_read_once(interpreter):
    x = torch.randn(2, 3, 40, 64)
    _, fused = traced(lambda x: turned(x.exp()), x)
    (kernel,) = lower_regions(fused, "triton")
    assert "tl.where" not in kernel.source and kernel.config["COLS"] == 32
    assert kernel.source.count("tl.exp(") == 2 and kernel.source.count("tl.load(") == 4
    wide = x.double()
    torch.testing.assert_close(fused(x).double(), turned(wide.exp()), rtol=1e-5, atol=1e-5)


CUTS = {
    "thirds": lambda x: torch.cat([x[..., 32:], x[..., :32].exp(), x[..., :32]], -1) * 2,
    "a half of a third": lambda x: torch.cat([x[..., :32], x], -1)[..., :64].exp() * 2,
    "scattered": lambda x: torch.slice_scatter(x, x[..., :32].exp(), -1, 32, 64) * 2,
    "results of both": lambda x: (
        (y := torch.cat([x[..., 32:].exp(), x[..., :32]], -1)) * 2,
        (y * 2).transpose(0, 1).contiguous() + 1,
    ),
    "statistics of rows": lambda x: torch.cat([x[..., 32:], x[..., :32]], -1).sum(-1, True) * x,
    "along rows": lambda x: torch.cat([x[:1].exp(), x[1:]], 0) * 2,
    "too thin": lambda x: torch.cat([x[..., :8].exp(), x[..., 8:]], -1) * 2,
}  # fmt: skip


@pytest.mark.parametrize("name", CUTS)
def test_rows_cut_into_parts(name, interpreter):
    x = torch.randn(3, 5, 64)
    _, fused = traced(CUTS[name], x)
    assert lower_regions(fused, "triton")
    found, wanted = fused(x), CUTS[name](x.double())
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, wanted)), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [0, 3])
def test_a_lookup_at_known_places_is_a_read(shift, interpreter):
    def fn(x, w):
        return (w * 2)[(torch.arange(x.shape[0]) + shift) % 16] * 3

    x, w = torch.randn(40), torch.randn(16)
    _, fused = traced(fn, x, w)
    (kernel,) = lower_regions(fused, "triton")
    assert not of_kind(fused, Remembered)
    torch.testing.assert_close(fused(x, w), fn(x, w))
    assert "% 16" in kernel.source


@pytest.mark.parametrize(
    "places",
    [
        lambda n: torch.arange(n) % 17,  # beyond the end
        lambda n: torch.arange(n) % 16 - 16,  # from the end
        lambda n: (torch.arange(n) % 4) ** 2,
        lambda n: torch.randint(16, (n,)),
    ],
)
def test_other_lookups_stay(places):
    def fn(x, w):
        return (w * 2)[places(x.shape[0])] * 3

    x, w = torch.randn(40), torch.randn(16)
    _, fused = traced(fn, x, w)
    assert any(n.target is torch.ops.aten.index.Tensor for n in fused.graph.nodes)


def test_what_is_given_out_is_a_tensor_of_its_own():
    def fn(x):
        table = torch.arange(x.shape[0]).sin()
        return x * table, table, table.view(-1, 1)

    x = torch.ones(40)
    _, fused = traced(fn, x, given_out=(0, 1, 2))
    for _ in range(2):
        out = fused(x)
        torch.testing.assert_close(out[1], torch.arange(40).sin())
        out[1].zero_()


def test_what_is_written_into_stays():
    def fn(x):
        table = torch.arange(x.shape[0]).sin()
        return torch.ops.aten.add_(table, x)

    _, fused = traced(fn, torch.ones(40))
    assert not of_kind(fused, Remembered)


def test_random_numbers_are_drawn_again():
    _, fused = traced(lambda x: x * torch.rand(x.shape[0]).cos(), torch.ones(40))
    x = torch.ones(40)
    assert not torch.equal(fused(x), fused(x))


@torch.library.custom_op("tttc_test::today", mutates_args=())
def today(n: int) -> torch.Tensor:
    """Not the same every day."""
    today.days += 1
    return torch.full((n,), float(today.days))


today.days = 0


@today.register_fake
def _(n):
    return torch.empty(n)


def test_operators_of_others_run_each_time():
    _, fused = traced(lambda x: x * torch.ops.tttc_test.today(x.shape[0]), torch.ones(40))
    x = torch.ones(40)
    assert not torch.equal(fused(x), fused(x))


def test_nothing_large_is_kept(monkeypatch):
    _, fused = traced(turned, torch.randn(2, 3, 40, 64))
    monkeypatch.setattr(remembered, "MOST_BYTES", 4 * 40 * 32 * 4)
    for T in (8, 16, 40, 80):
        x = torch.randn(2, 3, T, 64)
        torch.testing.assert_close(fused(x), turned(x))
    kept = sum(remembered._bytes(v) for v in remembered._made.values())
    assert 0 < kept <= remembered.MOST_BYTES
    assert not any(key[1] == (80,) for key in remembered._made)


def test_not_every_size_is_kept(monkeypatch):
    _, fused = traced(turned, torch.randn(2, 3, 40, 64))
    monkeypatch.setattr(remembered, "MOST_KEPT", 3)
    for T in range(2, 9):
        x = torch.randn(2, 3, T, 64)
        torch.testing.assert_close(fused(x), turned(x))
    assert [sizes for _, sizes, _ in remembered._made] == [(6,), (7,), (8,)]


def test_what_looks_at_operators_sees_all_of_them():
    _, fused = traced(turned, torch.randn(2, 3, 40, 64))
    x = torch.randn(2, 3, 40, 64)
    for _ in range(2):
        with Ran() as ran:
            fused(x)
        assert "sin" in ran.names
    assert not remembered._made


def test_a_backward_makes_positions_again():
    layer = tttc.nn.TTTLinear(32, 2, mini_batch_size=4).double()
    compiled = tttc.compile(layer, strict=True)
    with torch.inference_mode():  # what is made here a backward may keep
        compiled(torch.randn(2, 41, 32, dtype=torch.float64))
    for T in (41, 24):
        x = torch.randn(2, T, 32, dtype=torch.float64, requires_grad=True)
        y = compiled(x)
        assert all(t.dtype is torch.float64 for t in y.grad_fn.saved_tensors)
        inputs = [x, layer.q_proj.weight, layer.tau_offset]
        found = torch.autograd.grad(y.square().sum(), inputs)
        wanted = torch.autograd.grad(layer(x).square().sum(), inputs)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)
