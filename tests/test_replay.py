"""What a call did is done again for the next: other values, the same allocations and launches."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from marks import interpreted, on_gpu

import tttc
from tttc.ir.program import Program
from tttc.nn import TTTMLP, TTTLinear
from tttc.runtime import recorder, replay, triton_scan_backward
from tttc.runtime.launch import launch
from tttc.tuning import choose


def at(address: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor laid out as another, at an address."""
    last = sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
    bytes_ = (last + 1) * like.itemsize
    memory = (ctypes.c_byte * bytes_).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


def prepared(call):
    """A launch by addresses, of a kernel that Triton's interpreter runs."""
    arguments = []
    for name, rank in call.kernel.config["arguments"]:
        arguments += [call.tensors[name], *call.tensors[name].stride()[:rank]]
    where = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor)]
    names = [name for name, _ in call.kernel.config["arguments"]]

    def start(grid, given):
        tensors = {n: at(given[i], call.tensors[n]) for n, i in zip(names, where, strict=True)}
        launch(replace(call, tensors=tensors))

    return SimpleNamespace(start=start), (*call.grid, 1, 1)[:3], arguments


@pytest.fixture
def replaying(monkeypatch):
    """Calls are remembered though they run in the interpreter; counts those that were replayed."""
    count = []
    play = replay.Tape.__call__
    monkeypatch.setattr(replay, "_at_hand", lambda device: True)
    monkeypatch.setattr(recorder, "prepared", prepared)
    monkeypatch.setattr(
        replay.Tape, "__call__", lambda tape, inputs: (count.append(1), play(tape, inputs))[1]
    )
    return count


def step_of(layer, x, backend):
    """Output and gradients of a layer."""
    layer.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = tttc.compile(layer, strict=True, backend=backend)(x)
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


@interpreted
@pytest.mark.parametrize("kind", [TTTLinear, TTTMLP])
def test_a_call_is_replayed_on_other_values(kind, replaying):
    torch.manual_seed(0)
    layer = kind(32, 2, mini_batch_size=8)
    for turn in range(4):
        x = torch.randn(2, 21, 32)  # two mini-batches and a part of one
        with torch.no_grad():
            for p in layer.parameters():
                p += 0.01 * torch.randn_like(p)
        found, expected = step_of(layer, x, "triton"), step_of(layer, x, "torch")
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
        assert len(replaying) == 2 * max(0, turn - 1), "forward and backward from the third on"


@interpreted
def test_tensors_that_share_memory_once_need_not_again(replaying):
    """q, k and v are slices of one tensor while the call is recorded, and tensors of their own later."""

    def step(anchor, W, token, shared):
        q, k, v = token
        W = W + torch.outer(k, v - k @ anchor)
        return W, q @ W

    def scan(q, k, v):
        return tttc.scan(step, torch.zeros(2, 16, 16), (q, k, v), 4)[1]

    compiled = tttc.compile(scan, backend="triton", strict=True)
    for turn in range(4):
        together = torch.randn(1, 2, 8, 64) / 4
        parts = [together[..., 16 * i : 16 * i + 16] for i in range(3)]
        if turn >= 2:
            wide = [torch.randn(1, 2, 8, 64) / 4 for _ in range(3)]
            parts = [x[..., 16 * i : 16 * i + 16] for i, x in enumerate(reversed(wide))]
        if turn == 3:
            parts[1] = parts[0]
        torch.testing.assert_close(compiled(*parts), scan(*parts), atol=1e-3, rtol=1e-3)
    assert len(replaying) == 2


@interpreted
def test_results_are_new_each_time(replaying):
    torch.manual_seed(0)
    layer = TTTLinear(32, 2, mini_batch_size=8)
    compiled = tttc.compile(layer, strict=True, backend="triton")
    with torch.no_grad():
        found = [compiled(torch.randn(1, 16, 32)) for _ in range(5)]
    assert len(replaying) == 3
    kept = [x.clone() for x in found]
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))
    assert len({x.untyped_storage().data_ptr() for x in found}) == 5


@interpreted
def test_what_kernels_pass_on_takes_no_more_for_longer_sequences(replaying, monkeypatch):
    """The backward goes over few mini-batches at a time, and replayed it takes the memory of one such turn."""
    monkeypatch.setattr(triton_scan_backward, "ENOUGH_PROGRAMS", 1)
    torch.manual_seed(0)
    layer = TTTLinear(32, 2, mini_batch_size=8)
    compiled = tttc.compile(layer, strict=True, backend="triton")
    found = []
    play = replay.Tape.__call__

    def noted(tape, inputs):
        found.append((tape.workspace, len(tape.placed)))
        return play(tape, inputs)

    monkeypatch.setattr(replay.Tape, "__call__", noted)
    for mini_batches in (16, 32):
        for _ in range(3):
            compiled(torch.randn(1, 8 * mini_batches, 32)).sum().backward()
    (_, _), (short, few), (_, _), (long, many) = found
    assert many > few > 0
    assert short <= long <= 1.1 * short, "as much memory, in other places"


def test_what_torch_operations_run_is_not_remembered(replaying):
    program = Program("none", 1, None)
    x = torch.ones(3)
    for _ in range(4):
        (y,) = replay.remembered(program, "call", [x], lambda inputs, launcher: [inputs[0] + 1])
        assert torch.equal(y, x + 1)
    assert not replaying and list(program.calls.values()) == [False]


def test_a_plan_found_since_is_not_missed(monkeypatch):
    program = Program("none", 1, None)
    program.calls["call"] = "what was done"
    monkeypatch.setattr(choose, "recall", lambda loop, setting: None)
    monkeypatch.setattr(choose, "_means", lambda device: choose._Means(lambda call: 1.0, None))
    monkeypatch.setattr(
        choose, "search", lambda *a: type("F", (), {"plan": 1, "seconds": 1, "times": ()})
    )
    monkeypatch.setattr(choose, "remember", lambda whole, setting, plan, *rest: plan)
    setting = choose.Setting()
    assert choose.plan_for(program, "full", lambda: None, setting, call=object()) == 1
    assert not program.calls


@on_gpu
@pytest.mark.parametrize("kind", [TTTLinear, TTTMLP])
def test_replayed_launches_compute_what_others_do(kind, monkeypatch):
    torch.manual_seed(0)
    layer = kind(128, 2, mini_batch_size=16).cuda().bfloat16()
    inputs = [torch.randn(2, 100, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    count = []
    play = replay.Tape.__call__
    monkeypatch.setattr(
        replay.Tape, "__call__", lambda tape, given: (count.append(1), play(tape, given))[1]
    )

    def results():
        found = []
        for x in inputs:
            layer.zero_grad(set_to_none=True)
            y = tttc.compile(layer, strict=True)(x)
            y.float().square().sum().backward()
            found += [y.detach(), *(p.grad for p in layer.parameters())]
        return found

    found = results()
    assert len(count) == 4, "two forwards, two backwards"
    monkeypatch.setattr(replay, "_at_hand", lambda device: False)
    for x, y in zip(found, results(), strict=True):
        assert torch.equal(x, y)
