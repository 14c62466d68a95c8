"""What is not finite in causal sums of numbers: seen from its token on, as the naive loop has it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from marks import interpreted
from test_gluon import exact, forward
from tttc.codegen.schedule import Schedule

from tttc.runtime.launch import launch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from scans import Case


class Counted(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    gate: torch.Tensor
    count: torch.Tensor


def normalised(anchor, state, t, shared):
    """A vector that adds up, and a number that decays, by which what is read of it is divided."""
    w, n = state
    w, n = w + t.k, t.gate * n + t.count
    return (w, n), w * t.q / (1 + n * n)


@interpreted
@pytest.mark.parametrize("nan", ["branch", "product"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("b", [1, 16])
def test_a_sum_of_numbers_is_not_seen_before_its_token(b, value, nan):
    torch.manual_seed(0)
    tokens = Counted(*torch.randn(2, 1, 1, 32, 16), torch.rand(1, 1, 32), torch.randn(1, 1, 32))
    tokens.count[0, 0, 22] = value
    case = Case("normalised", normalised, (torch.randn(1, 16), torch.randn(1)), tokens, None, b, {})
    schedule = Schedule(num_stages=1, nan=nan, repeat_vectors=False)
    (z,), _ = forward(case, schedule, launch)
    (wanted,), _ = exact(case)
    assert torch.equal(z.isnan(), wanted.isnan())
    assert bool(wanted.isnan().any()) == (value != value)
