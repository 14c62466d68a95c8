"""The schedules that rules give, against the times of a record."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import held
from tttc.codegen.devices import H200
from tttc.codegen.staging import Call, Passing, forward_split

RECORD = max((Path(held.__file__).parent / "results").glob("*-h200-picked.json"))
FAR, FARTHEST = 1.1, 1.12
MISSED = 1  # shapes whose number of kernels the estimate gets wrong


@pytest.fixture(scope="module")
def ratios():
    return held.ratios(json.loads(RECORD.read_text()))


def test_rules_are_near_the_fastest(ratios):
    timed = {shape: x for shape, x in ratios.items() if x is not None}
    far = {shape: x for shape, x in timed.items() if x > FAR}
    assert len(far) <= MISSED and max(timed.values()) <= FARTHEST, far
    assert len(timed) > 0.9 * len(ratios), "rules of another time"


# Sequences times heads, and mini-batches.
@pytest.mark.parametrize(
    "case, d, programs, mini_batches, kernels",
    [
        ("ttt_linear_b16", 64, 32, 16, 1),  # a launch takes longer than what it saves
        ("ttt_linear_b16", 64, 32, 2048, 2),
        ("ttt_linear_b16", 64, 128, 2048, 1),  # nearly as many programs as multiprocessors
        ("ttt_linear_b16", 128, 16, 2048, 1),  # a state four times as large
        ("ttt_linear_b64", 64, 32, 32, 2),
        ("ttt_linear_b64", 64, 512, 32, 1),  # programs that fill the device
        ("ttt_linear_b64", 128, 256, 32, 2),  # and programs that are alone on a multiprocessor
        ("ttt_mlp_b16", 64, 512, 128, 1),
        ("ttt_mlp_chunk64", 64, 512, 32, 2),
    ],
)
def test_a_second_kernel_where_it_pays(case, d, programs, mini_batches, kernels):
    loop, _ = held.forward(case, d)
    assert forward_split(loop, Call(programs, mini_batches, H200, 2)).stages == kernels


def test_states_that_are_saved_anyway_cost_less():
    loop, _ = held.forward("ttt_linear_b16", 64)
    plain, saving = (Passing.of(x, 2) for x in (loop, replace(loop, save=tuple(loop.states))))
    assert saving.stored < plain.stored and saving.traffic < plain.traffic
    call = Call(64, 128, H200, 2)
    assert saving.seconds(call) > plain.seconds(call)


def test_every_multiprocessor_has_programs():
    loop, _ = held.forward("ttt_linear_b64", 64)
    for mini_batches, group in ((8, 1), (32, 4), (64, 8), (4096, 16)):
        split = forward_split(loop, Call(32, mini_batches, H200, 2))
        assert split.group(warps=4, most=16) == group
    assert split.group(warps=4, most=4) == 4
