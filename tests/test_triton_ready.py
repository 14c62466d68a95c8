"""What is made once a process: by whom, and that others wait for it."""

from __future__ import annotations

import threading

import torch
from tttc.codegen import triton_ready

from tttc.ir.apart import apart


def test_triton_is_asked_once_and_waited_for(monkeypatch):
    monkeypatch.setattr(triton_ready, "_thread", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    let_go, asked = threading.Event(), []

    def find_out():
        let_go.wait()
        asked.append(threading.current_thread())
        triton_ready.wait_for_triton()  # its own kernels wait for nothing

    monkeypatch.setattr(triton_ready, "_find_out", find_out)
    triton_ready.begin_triton()
    triton_ready.begin_triton()
    assert not asked
    let_go.set()
    triton_ready.wait_for_triton()
    assert len(asked) == 1


def test_nothing_is_asked_without_a_gpu(monkeypatch):
    monkeypatch.setattr(triton_ready, "_thread", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    triton_ready.begin_triton()
    assert triton_ready._thread is None
    triton_ready.wait_for_triton()


def test_tensors_that_stay_are_made_by_another_thread_on_a_gpu(monkeypatch):
    settled = []
    monkeypatch.setattr(torch.cuda, "synchronize", settled.append)
    gpu = torch.device("cuda", 0)
    assert apart(gpu, threading.current_thread) is not threading.current_thread()
    assert settled == [gpu]
    assert apart(torch.device("cpu"), threading.current_thread) is threading.current_thread()
