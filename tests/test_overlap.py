"""A recurrence beside what does not wait for it: as early and as late as it may run, the same gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from marks import interpreted, on_gpu
from test_cuda_graphs import warmed_up
from test_replay import replaying  # noqa: F401
from test_stages import call_of, gradients
from tttc.codegen.crowding import Crowd
from tttc.codegen.schedule import Schedule

import tttc
from tttc.nn import TTTMLP, TTTLinear
from tttc.runtime import beside, overlap, triton_scan_backward


@pytest.fixture
def few(monkeypatch):
    """Programs are few, and so are the mini-batches of a group."""
    of = triton_scan_backward.setting_of
    monkeypatch.setattr(
        triton_scan_backward, "setting_of", lambda *args: replace(of(*args), crowd=Crowd.FEW)
    )
    monkeypatch.setattr(beside, "pays", lambda: True)
    monkeypatch.setattr(triton_scan_backward, "ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(overlap, "LEAST", 1)


@pytest.fixture(params=["at once", "when it is waited for"])
def started(request, monkeypatch):
    """What runs aside, in the order it does; either as early or as late as may be."""
    seen = []
    if request.param == "at once":
        start = beside.Aside.start
        monkeypatch.setattr(
            beside.Aside, "start", lambda self, run: (seen.append(self), start(self, run))
        )
    else:
        waiting = {}

        def join(self):
            seen.append(self)
            waiting.pop(self)()

        monkeypatch.setattr(beside.Aside, "start", lambda self, run: waiting.update({self: run}))
        monkeypatch.setattr(beside.Aside, "join", join)
    yield seen
    if request.param != "at once":
        assert not waiting, "each is waited for"


@interpreted
@pytest.mark.parametrize("cls, interval", [(TTTLinear, 1), (TTTLinear, 3), (TTTMLP, 1)])
def test_groups_of_mini_batches(cls, interval, few, started, replaying):  # noqa: F811
    call, program, b = call_of(cls, T=38)
    exact = gradients(call, b, torch.float64, "torch", 1)
    program.schedules["full_backward"] = Schedule(
        stages=3, group=2, nan="ignored", repeat_vectors=False
    )
    for turn in range(3):  # as it is, recorded, replayed
        got = gradients(call, b, torch.float32, "triton", interval)
        assert program.no_backward_kernels is None
        assert len(started) >= 2 * (turn + 1)
        for x, y in zip(got, exact, strict=True):
            if y is not None:
                assert float((x.double() - y).norm()) <= 1e-5 * float(y.norm()) + 1e-12
    assert len(replaying) == 2
    program.schedules.clear()
    program.kernels.clear()
    program.calls.clear()


@on_gpu
def test_beside_each_other_on_a_gpu(monkeypatch):
    torch.manual_seed(0)
    layer = TTTLinear(256, 4, device="cuda", dtype=torch.bfloat16)
    compiled = tttc.compile(layer, strict=True)
    x = torch.randn(1, 16384, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    begun = []
    start = beside.Aside.start
    monkeypatch.setattr(
        beside.Aside, "start", lambda self, run: (begun.append(self), start(self, run))
    )

    def step():
        y = compiled(x)
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        return gradient

    wanted = step()
    assert not begun, "launched one by one it does not pay"
    warmed_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = step()
    assert begun
    for _ in range(10):
        gradient.zero_()
        graph.replay()
        assert torch.equal(gradient, wanted)
