"""Garbage is not collected while something compiles, and again afterwards."""

from __future__ import annotations

import gc

import pytest
import torch

import tttc
import tttc.compiler
from tttc import pipeline
from tttc._garbage import not_collected
from tttc.nn import TTTLinear
from tttc.runtime import fused_scan_backward


def test_collected_again_whatever_happens():
    assert gc.isenabled()
    with pytest.raises(KeyError), not_collected():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_who_turned_it_off_keeps_it_off():
    gc.disable()
    try:
        with not_collected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_only_the_first_call_of_a_model_compiles(monkeypatch):
    seen = []
    outline = tttc.compiler.outline
    monkeypatch.setattr(
        tttc.compiler, "outline", lambda gm: seen.append(gc.isenabled()) or outline(gm)
    )
    running = []

    @torch._dynamo.disable
    def run(x):
        running.append(gc.isenabled())
        return x

    def model(x):
        return run(x.sin()).cos()

    compiled = tttc.compile(model, backend="torch")
    for _ in range(2):
        compiled(torch.randn(3, 4))
    assert seen and not any(seen)
    assert running == [False, True] and gc.isenabled()


def test_only_the_first_backward_of_a_program_derives_it(monkeypatch):
    monkeypatch.setattr(pipeline, "_programs", {})  # of what ran before
    seen = []
    run = fused_scan_backward.run_backward
    monkeypatch.setattr(
        fused_scan_backward, "run_backward", lambda *args: seen.append(gc.isenabled()) or run(*args)
    )
    layer = TTTLinear(8, 2, mini_batch_size=4)
    compiled = tttc.compile(layer, backend="torch", strict=True)
    for _ in range(2):
        compiled(torch.randn(1, 8, 8)).sum().backward()
    assert seen == [False, True] and gc.isenabled()
