"""What is made once a process: by whom, and that others wait for it."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from tttc.codegen import triton_ready

import tttc
from tttc.ir.apart import apart


@pytest.fixture
def a_gpu_in_use(monkeypatch):
    monkeypatch.setattr(triton_ready, "_thread", None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)


def test_triton_is_asked_once_and_waited_for(a_gpu_in_use, monkeypatch):
    let_go, asked = threading.Event(), []

    def find_out(device):
        let_go.wait()
        triton_ready.wait_for_triton()  # kernels of its own wait for nothing
        asked.append(device)

    monkeypatch.setattr(triton_ready, "_find_out", find_out)
    try:
        triton_ready.begin_triton()
        triton_ready.begin_triton()
        assert not asked
    finally:
        let_go.set()
    triton_ready.wait_for_triton()
    assert asked == [3]


def test_what_triton_does_not_say_is_left_to_whoever_compiles(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(device) or 1 / 0)
    triton_ready._find_out(3)
    assert asked == [3]


def test_without_a_gpu_in_use_nothing_is_begun(monkeypatch):
    monkeypatch.setattr(triton_ready, "_thread", None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    layer = tttc.nn.TTTLinear(32, num_heads=2)
    with torch.no_grad():
        tttc.compile(layer, strict=True)(torch.randn(1, 16, 32))
    assert triton_ready._thread is None


def test_tensors_that_stay_are_made_by_another_thread_on_a_gpu(monkeypatch):
    settled, gpu = [], torch.device("cuda", 0)
    stream = SimpleNamespace(synchronize=lambda: settled.append(threading.current_thread()))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    made_by = apart(gpu, threading.current_thread)
    assert made_by is not threading.current_thread()
    assert settled == [made_by]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert apart(gpu, threading.current_thread) is threading.current_thread()
    assert apart(torch.device("cpu"), threading.current_thread) is threading.current_thread()
