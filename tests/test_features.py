"""Kernels whose warps each hold some features: what they compute, and what they take."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import gluon_on_cpu
import pytest
import torch
from marks import interpreted
from test_gluon import assert_close, exact, forward
from tttc.codegen.schedule import Schedule

from tttc.runtime import launch, triton_scan

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from scans import make_case

FEATURES = Schedule(
    num_warps=2, num_stages=4, feature_major=True, order="on_demand", renderer="features", nan="again",
    repeat_vectors=False,
)  # fmt: skip


def case_of(T=64, dtype=torch.float32, name="ttt_linear_b16", d=32):
    return make_case(name, 1, T, heads=2, d=d, device="cpu", dtype=dtype)


def run(call):
    """Kernels of features as Python; what continues a mini-batch in the interpreter."""
    features = call.kernel.config["schedule"].renderer == "features"
    (gluon_on_cpu.run if features else launch.launch)(call)


def loop_of(case):
    return triton_scan._loop(case.program(), "full", False)


@interpreted
@pytest.mark.parametrize("nan", ["ignored", "product", "again"])
@pytest.mark.parametrize("T", [64, 57])
def test_forward_computes_what_the_program_says(T, nan):
    case = case_of(T)
    assert_close(forward(case, replace(FEATURES, nan=nan), run), exact(case), 1e-5)
