"""One loop as one, two or three kernels, loads ahead, states in segments: the same gradients, in the interpreter."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from marks import interpreted
from test_kernels import arguments, launches
from tttc.codegen.crowding import Crowd
from tttc.codegen.heuristics import default_schedule
from tttc.codegen.resources import measure
from tttc.codegen.schedule import Schedule

import tttc
from tttc import _tracing
from tttc._checks import check_scan_inputs
from tttc._scan_op import interned
from tttc.nn import TTTMLP, TTTLinear
from tttc.pipeline import build_program
from tttc.runtime import forward_kernels, replay, staged, triton_scan_backward
from tttc.runtime.launch import launch
from tttc.scan import _flatten

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from scans import make_case

pytestmark = interpreted


@torch.no_grad()
def call_of(layer, T=38, d=16, b=8):
    """A scan of a layer on random arguments, and its program."""
    tokens, init, shared = arguments(layer, T, d, b, torch.float64)
    anchor, _, tokens, info = check_scan_inputs(layer.step, init, None, 0, tokens, b, shared)
    structure = _tracing.describe((init, None, tokens, shared))
    call = _flatten(layer.step, anchor, None, tokens, shared, structure, info)
    return call, build_program(interned(call.key), b), b


def gradients(call, b, dtype, backend, interval):
    """Of every floating argument, with cotangents of outputs alone."""
    groups = [[x.detach().to(dtype).requires_grad_() for x in g]
              for g in (call.anchor, [], call.tokens, call.shared)]  # fmt: skip
    z = torch.ops.tttc.fused_scan(*groups, call.key, b, 0, backend, False, interval)[0]
    torch.manual_seed(1)
    g = torch.randn(z.shape, dtype=torch.float64).to(z.dtype)
    leaves = [x for group in groups for x in group]
    return torch.autograd.grad(z, leaves, g, allow_unused=True)


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("cls", [TTTLinear, TTTMLP])
@pytest.mark.parametrize("prefetch", [False, True])
def test_any_number_of_kernels(cls, interval, prefetch):
    call, program, b = call_of(cls)
    exact = gradients(call, b, torch.float64, "torch", 1)
    for count in (1, 2, 3):
        program.kernels.clear()
        program.schedules["full_backward"] = Schedule(
            stages=count, group=2, prefetch=prefetch, nan="ignored", repeat_vectors=False
        )
        got = gradients(call, b, torch.float32, "triton", interval)
        assert program.no_backward_kernels is None
        made = {k.name for x in program.kernels.values() for k in x.kernels}
        names = [name for name in made if "full_backward" in name]
        assert len(names) == count
        for x, y in zip(got, exact, strict=True):
            if y is not None:
                assert float((x.double() - y).norm()) <= 1e-5 * float(y.norm()) + 1e-12
    program.schedules.clear()
    program.kernels.clear()


def chunks():
    """A scan of a rule whose tokens are tiles."""
    case = make_case("ttt_mlp_chunk16", 1, 80, 2, 16, device="cpu", dtype=torch.float32)
    return case.flat(), case.program(), 1


@torch.no_grad()
@pytest.mark.parametrize("interval", [0, 1])
@pytest.mark.parametrize("made", [partial(call_of, TTTLinear), partial(call_of, TTTMLP), chunks])
def test_a_forward_in_pieces(made, interval, monkeypatch):
    """Where states between kernels would take much memory, few mini-batches run at a time."""
    call, program, b = made()

    def run(backend, dtype):
        groups = [[x.to(dtype) for x in g] for g in (call.anchor, [], call.tokens, call.shared)]
        return torch.ops.tttc.fused_scan(*groups, call.key, b, 0, backend, bool(interval), interval)

    exact = run("torch", torch.float64)
    launched = []
    monkeypatch.setattr(replay, "launch", lambda x: (launched.append(x.kernel.name), launch(x)))
    counts = []
    for stages, passed in ((1, 1), (2, 1 << 30), (2, 1)):
        monkeypatch.setattr(staged, "PASSED", passed)
        program.kernels.clear()
        for part in ("full", "tokens"):
            program.schedules[part] = Schedule(stages=stages, group=2, repeat_vectors=False)
        launched.clear()
        for x, y in zip(run("triton", torch.float32), exact, strict=True):
            assert float((x.double() - y).norm()) <= 1e-5 * float(y.norm()) + 1e-12
        counts.append(len(launched))
    assert program.no_kernels is None
    program.schedules.clear()
    program.kernels.clear()
    one, two, pieces = counts
    assert one + 1 == two < pieces


def test_few_mini_batches_together(monkeypatch):
    call, program, b = call_of(TTTLinear, T=70)
    exact = gradients(call, b, torch.float64, "torch", 1)
    monkeypatch.setattr(triton_scan_backward, "ENOUGH_PROGRAMS", 1)
    program.schedules["full_backward"] = Schedule(
        stages=3, group=2, nan="ignored", repeat_vectors=False
    )
    got = gradients(call, b, torch.float32, "triton", 1)
    assert program.no_backward_kernels is None
    for x, y in zip(got, exact, strict=True):
        if y is not None:
            assert float((x.double() - y).norm()) <= 1e-5 * float(y.norm()) + 1e-12
    program.schedules.clear()
    program.kernels.clear()


def test_the_stages_of_a_forward_are_the_one_kernel():
    layer = TTTLinear(32, num_heads=2, mini_batch_size=8)
    x = torch.randn(1, 80, 32)
    compiled = tttc.compile(layer, backend="triton", strict=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_large_tiles_have_warps_that_hold_them():
    """Where programs fill the device few warps are enough for small tiles alone."""
    schedules = {}
    for b in (16, 64, 128):
        _, program, _ = call_of(TTTLinear, T=b, d=64, b=b)
        loop = forward_kernels.forward_loop(program, "full", False)
        schedules[b] = default_schedule(loop, crowd=Crowd.TWO)
    assert schedules[16].num_warps < schedules[64].num_warps <= schedules[128].num_warps
    found = [x for b, s in schedules.items() for x in launches(TTTLinear, b, 128, schedule=s)]
    # In two warps 64 tokens spill 10 KB, 128 tokens 15.
    assert all(x.spill_bytes < 1024 for x in measure([x.request() for x in found], "sm_90"))
