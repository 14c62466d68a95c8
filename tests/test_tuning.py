"""Schedules searched for, remembered, chosen: on a clock of the test's own, in the interpreter."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tttc.codegen.candidates import CHOICES, candidates, neighbours, plans, shortlist
from tttc.codegen.resources import ResourceError, Resources
from tttc.codegen.schedule import Schedule
from tttc.codegen.stages import stages

import tttc
from tttc.nn import TTTLinear
from tttc.runtime import triton_scan
from tttc.runtime.triton_scan import scan_kernels
from tttc.tuning import choose, remembered, search
from tttc.tuning.choose import timed_by
from tttc.tuning.plan import Plan, Setting, digest, setting_of

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is what runs kernels without a GPU"
)
WANTED = {"num_warps": 1, "order": "graph", "prefetch": True}


class Clock:
    """A timer by which schedules with the wanted choices are fastest; it keeps what it was asked."""

    def __init__(self, **wanted):
        self.wanted, self.asked = wanted, []

    def __call__(self, run):
        schedule = run.__defaults__[0].kernel.config["schedule"]
        self.asked.append(schedule)
        run()
        missed = sum(getattr(schedule, k) != v for k, v in self.wanted.items())
        return 1e-3 * (1 + missed + 0.001 * len(self.asked))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache of its own, and nothing remembered in the process."""
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(search, "TRIED", 4)
    monkeypatch.setattr(search, "CHANGED", 2)
    remembered._damaged.clear()
    return tmp_path


def fresh_layer():
    torch._dynamo.reset()
    torch.manual_seed(0)
    return TTTLinear(32, 2, mini_batch_size=4)


def program_of(layer):
    """The program that compiled calls of such layers share."""
    from tttc.pipeline import _programs

    (found,) = [p for (key, b), p in _programs.items() if "linear_step" in key and b == 4 and p.token.sizes and max(p.token.sizes.values()) == 16]  # fmt: skip
    return found


def forget(layer):
    """As a process that has just started."""
    program = program_of(layer)
    program.plans.clear()
    program.searched.clear()
    program.kernels.clear()


def used_schedules(layer):
    return [k.config["schedule"] for s in program_of(layer).kernels.values() for k in s.kernels]


@torch.no_grad()
def test_the_fastest_is_picked_remembered_and_used_without_a_search(folder):
    layer, x = fresh_layer(), torch.randn(1, 12, 32)
    expected = layer(x)
    clock = Clock(num_warps=1, nan="branch")
    with timed_by(clock):
        compiled = tttc.compile(layer, backend="triton", tune=True, strict=True)
        torch.testing.assert_close(compiled(x), expected, atol=1e-4, rtol=1e-4)
        asked = len(clock.asked)
        assert asked > 4 and len({(s.num_warps, s.nan) for s in clock.asked}) > 2
        compiled(x)
        assert len(clock.asked) == asked, "once a size class"
    (file,) = (folder / "schedules").glob("*.json")
    found = json.loads(file.read_text())
    chosen = found["plan"][0]["schedule"]
    assert (chosen["num_warps"], chosen["nan"]) == (1, "branch")
    assert found["timed"] == asked and found["seconds"] < 2e-3 * len(found["plan"])
    forget(layer)
    torch._dynamo.reset()
    plain = tttc.compile(layer, backend="triton", strict=True)
    torch.testing.assert_close(plain(x), expected, atol=1e-4, rtol=1e-4)
    (used,) = [s for s in used_schedules(layer) if s.origin.startswith("measured: ")]
    assert used.choices() == chosen
    forget(layer)
