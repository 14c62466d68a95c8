"""CUDA graphs of compiled models: nothing waits for the device, and replays compute what calls do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_stages import call_of
from torch import nn
from tttc.codegen.loop import constant_tensors
from tttc.codegen.torch_scan_backward import saved_leaves

import tttc
from tttc._scan_op import scan_info
from tttc.nn import TTTMLP, TTTLinear
from tttc.runtime import fused_scan
from tttc.runtime.triton_scan import run_kernels
from tttc.runtime.triton_scan_backward import run_backward_kernels

on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA graphs are captured on a GPU of NVIDIA's"
)


class Two(nn.Module):
    """A layer of either kind between norms, as in a language model."""

    def __init__(self):
        super().__init__()
        self.first, self.second = TTTLinear(128, 2, mini_batch_size=16), TTTMLP(128, 2, mini_batch_size=16)  # fmt: skip
        self.norms = nn.ModuleList(nn.LayerNorm(128) for _ in range(2))

    def forward(self, x):
        x = x + self.first(self.norms[0](x))
        return x + self.second(self.norms[1](x))


def model_and_inputs():
    torch.manual_seed(0)
    model = Two().cuda().bfloat16()
    return model, [torch.randn(2, 256, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def warmed_up(run):
    """As graphs ask for: everything is compiled, on a stream beside the default one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)


@on_gpu
@torch.no_grad()
def test_a_forward_is_captured_and_replayed():
    model, inputs = model_and_inputs()
    compiled = tttc.compile(model, strict=True)
    x = inputs[0].clone()
    warmed_up(lambda: compiled(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = compiled(x)
    for given in inputs:
        x.copy_(given)
        graph.replay()
        assert torch.equal(y, compiled(given))


@on_gpu
def test_a_training_step_is_captured_and_replayed():
    model, inputs = model_and_inputs()
    compiled = tttc.compile(model, strict=True)
    x = inputs[0].clone()

    def step():
        model.zero_grad(set_to_none=True)
        loss = compiled(x).float().square().mean()
        loss.backward()
        return loss

    warmed_up(step)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = compiled(x).float().square().mean()
        loss.backward()
    captured = [p.grad for p in model.parameters()]
    for given in inputs:
        x.copy_(given)
        graph.replay()
        got = [loss.clone(), *(g.clone() for g in captured)]
        expected = [step(), *(p.grad for p in model.parameters())]
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
        for p, g in zip(model.parameters(), captured, strict=True):
            p.grad = g


# --- what a machine without a GPU can show ----------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("layer", [TTTLinear, TTTMLP])
def test_nothing_between_launches_reads_a_value(layer, interval):
    """On tensors without values whatever asked for one would raise."""
    call, program, _ = call_of(layer, T=38, d=16, b=8)
    info = scan_info(call.anchor, call.tokens, call.shared)
    leaves = fused_scan.floating_leaves(call.tokens, call.shared)
    anchor, tokens, shared = (
        [x.float().to("meta") for x in g] for g in (call.anchor, call.tokens, call.shared)
    )
    program.kernels.clear()
    launches = []
    out = run_kernels(
        program, anchor, [], tokens, shared, 3, torch.float32, launcher=launches.append
    )
    assert len(launches) >= 3, "a part of a mini-batch, whole ones, a part"
    saved = fused_scan._empty_saved(program, anchor, tokens, shared, 0, interval, info, "torch")
    nothing = [None] * len(anchor)
    rows = {n: torch.empty_like(tokens[int(n[6:])]) for n in leaves if n.startswith("token")}
    forward = len(launches)
    run_backward_kernels(
        program, leaves, anchor, [], tokens, shared, 0, (nothing, nothing, out[2]),
        saved_leaves(program, leaves), saved, interval, rows, torch.float32,
        launcher=launches.append,
    )  # fmt: skip
    assert any("backward" in x.kernel.name for x in launches[forward:])
    program.kernels.clear()


def test_constants_are_brought_to_a_device_once():
    program = SimpleNamespace(constants={}, token=SimpleNamespace(constants=[torch.ones(2)]))
    first = constant_tensors(program, torch.device("meta"))
    first["more"] = torch.zeros(1)
    again = constant_tensors(program, torch.device("meta"))
    assert set(again) == {"constant_0"} and again["constant_0"] is first["constant_0"]
