"""Three hundred random programs, compiled and compared: other ones in every run, reproduced by what a failure prints."""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest
import torch
from generator.check import Outcome, check
from generator.description import Program
from generator.limits import documented, has_closed_form
from generator.strategies import loops, scans
from hypothesis import HealthCheck, given, note, settings
from marks import interpreted

# Beyond this a run of the tests would be about the generator: TTTC_RANDOM_PROGRAMS=10 draws ten times as many.
SCALE = float(os.environ.get("TTTC_RANDOM_PROGRAMS", "1"))


def run(strategy, count: int) -> Counter:
    """Check programs of a strategy; what became of them."""
    seen: Counter = Counter()
    same: dict[str, Outcome] = {}  # hypothesis draws one program in six again

    @settings(
        max_examples=max(1, round(count * SCALE)), deadline=None, database=None, print_blob=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def every(program: Program) -> None:
        outcome = same.get(program.digest) or check(program)
        note(outcome.source)
        note(f"as a test of its own: Program.from_json({json.dumps(program.to_json())})")
        note(f"errors: {outcome.errors}")
        assert not outcome.failed, f"{outcome.status} {outcome.reason} {outcome.errors}"
        if outcome.status == "eager":
            assert documented(outcome.reason), outcome.reason
        if outcome.status == "same" and has_closed_form(program):
            assert outcome.form in ("dual", "chunkwise"), outcome.reason
        same[program.digest] = outcome
        seen[outcome.status] += 1
        seen[outcome.form] += 1

    with torch.enable_grad():
        every()
    return seen


def assert_compiled(seen: Counter, share: float, left: float = 0.0) -> None:
    """Most are compiled and compared, at least ``share`` of them many tokens at a time: else this proves nothing.

    At most ``left`` of all run as they are; hypothesis draws programs that resemble each other, so that shares vary.
    """
    compared = seen["same"]
    total = compared + seen["eager"] + seen["wild"] + seen["ill"]
    assert compared + seen["eager"] >= 0.5 * total, seen
    assert seen["eager"] <= left * total, seen
    assert seen["dual"] + seen["chunkwise"] >= share * compared, seen


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", range(4))
def test_scans(part):
    assert_compiled(run(scans(), 60), share=0.1)


@pytest.mark.timeout(1200)
def test_scans_in_single_precision():
    assert_compiled(run(scans(dtypes=("float32", "bfloat16")), 25), share=0.05)


@pytest.mark.timeout(1200)
def test_scans_in_a_larger_model():
    assert_compiled(run(scans("dynamo", largest=4, small=True), 10), share=0.0)


@pytest.mark.timeout(1200)
def test_loops():
    assert_compiled(run(loops(), 10), share=0.0, left=0.7)


@pytest.mark.timeout(1200)
@interpreted
def test_kernels_in_the_interpreter():
    assert_compiled(run(scans("triton", ("float32",), largest=4, small=True), 15), share=0.0)
