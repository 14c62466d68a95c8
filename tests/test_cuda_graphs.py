"""CUDA graphs of compiled models: nothing waits for the device, and replays compute what calls do."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from marks import on_gpu
from test_stages import call_of
from torch import nn
from tttc.codegen.loop import constant_tensors
from tttc.codegen.torch_scan_backward import saved_leaves

import tttc
from tttc._scan_op import scan_info
from tttc.nn import TTTMLP, TTTLinear
from tttc.runtime import cuda_graphs, fused_scan, triton_scan_backward
from tttc.runtime.triton_scan import run_kernels
from tttc.runtime.triton_scan_backward import run_backward_kernels


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


def trained(model, mode, inputs, targets):
    """The losses and all gradients of a few steps of training, and what the model then makes of the inputs."""
    model = copy.deepcopy(model)
    compiled = tttc.compile(model, strict=True, mode=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for given, target in zip(inputs, targets, strict=True):
        x = given.clone().requires_grad_()
        loss = (compiled(x).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        found += [
            loss.detach().clone(),
            x.grad.clone(),
            *(p.grad.clone() for p in model.parameters()),
        ]
        optimizer.step()
    with torch.no_grad():
        return found + [compiled(x).clone() for x in (*inputs, inputs[0][:, :100])]


@on_gpu
def test_reduce_overhead_computes_what_calls_do(caplog, monkeypatch):
    monkeypatch.setattr(
        triton_scan_backward, "_zeros", {}
    )  # as in a process that does nothing else
    model, inputs = model_and_inputs()
    inputs = [*inputs, *(x.flip(0) for x in inputs)]
    targets = [x.float().roll(1, 1) for x in inputs]
    with caplog.at_level(logging.INFO, "tttc.graphs"):
        found = trained(model, "reduce-overhead", inputs, targets)
    expected = trained(model, None, inputs, targets)
    assert not [r for r in caplog.records if r.name == "tttc.graphs"], "something was not recorded"
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@on_gpu
def test_reduce_overhead_leaves_a_backward_as_it_is_where_it_can_not_be_recorded(monkeypatch):
    model, inputs = model_and_inputs()
    targets = [x.float() for x in inputs]
    expected = trained(model, None, inputs, targets)
    check = cuda_graphs.check_for_skip

    def only_forwards(gm, fixed):
        backward = any("tangents" in node.name for node in gm.graph.nodes)
        return "asked not to" if backward else check(gm, fixed)

    monkeypatch.setattr(cuda_graphs, "check_for_skip", only_forwards)
    for x, y in zip(trained(model, "reduce-overhead", inputs, targets), expected, strict=True):
        assert torch.equal(x, y)


# --- what a machine without a GPU can show ----------------------------------------------------------------


def test_reduce_overhead_without_a_gpu_says_why_it_records_nothing(caplog):
    torch.manual_seed(0)
    layer, x = TTTLinear(32, 2, mini_batch_size=4), torch.randn(2, 9, 32)
    with caplog.at_level(logging.INFO, "tttc.graphs"):
        y = tttc.compile(layer, strict=True, mode="reduce-overhead")(x)
    y.sum().backward()
    assert "forward runs without CUDA graphs: no tensor on a GPU" in caplog.text
    assert torch.equal(y, tttc.compile(layer, strict=True)(x))
    with pytest.raises(ValueError, match="mode: expected one of default, reduce-overhead"):
        tttc.compile(layer, mode="fastest")


def test_parameters_stay_where_they_are_and_inputs_are_copied(monkeypatch):
    """What is recorded, and which arguments it may take to lie where they lay: with a recorder that is none."""
    asked = []

    def recorder(run, inputs, static, **given):
        asked.append(
            (
                given,
                [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)],
                list(static),
                list(inputs),
            )
        )
        return run

    monkeypatch.setattr("torch._inductor.cudagraph_trees.cudagraphify_impl", recorder)
    monkeypatch.setattr(cuda_graphs, "_on_gpu", lambda gm: True)
    monkeypatch.setattr(cuda_graphs, "check_for_skip", lambda gm, fixed: None)
    monkeypatch.setattr(cuda_graphs, "get_device_index", lambda gm: 0)
    monkeypatch.setattr(cuda_graphs, "_bring_constants", lambda gm, device: None)
    layer, x = TTTLinear(32, 2, mini_batch_size=4), torch.randn(2, 9, 32, requires_grad=True)
    compiled = tttc.compile(layer, strict=True, mode="reduce-overhead")
    for _ in range(2):
        compiled(x).sum().backward()
    (forward, tensors, static, inputs), (backward, *_) = asked  # once each
    assert not forward["is_backward"] and backward["is_backward"]
    assert {id(inputs[i]) for i in tensors if i not in static} == {id(x)}
    with torch.no_grad():
        compiled(x)
    assert asked[2][0]["is_inference"]


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
