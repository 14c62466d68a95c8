"""Which backwards are one kernel over features, and what kernels take where they are not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_gluon import backward, forward
from tttc.codegen.crowding import Crowd, crowding
from tttc.codegen.feature_layouts import FeatureLayouts
from tttc.codegen.heuristics import default_schedule
from tttc.codegen.ordering import most_live
from tttc.codegen.resources import measure
from tttc.codegen.schedule import Schedule
from tttc.codegen.stages import stages
from tttc.codegen.torch_scan_backward import live_cotangents

from tttc.runtime import forward_kernels, fused_scan, triton_scan_backward

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from rule_cases import rule_case
from scans import make_case


def case_of(b, d, dtype=torch.bfloat16):
    return make_case(f"ttt_linear_b{b}", 1, 4 * b, heads=2, d=d, device="cpu", dtype=dtype)


ATTENTION = ("token_0", "token_1", "token_2")  # queries, keys and values


def backward_of(b, d, leaves=None):
    """The loop of a backward to some leaves, or to all."""
    return backward_loop(case_of(b, d), leaves)


def backward_loop(case, leaves=None):
    program, call = case.program(), case.flat()
    leaves = leaves or fused_scan.floating_leaves(call.tokens, call.shared)
    live = live_cotangents(program, leaves, set())
    return triton_scan_backward.backward_loop_of(program, "full", leaves, live)


def chosen(loop, crowd, gluon=True):
    return default_schedule(loop, crowd, backward=True, gluon=gluon)


def test_how_full_a_device_is_follows_from_its_multiprocessors(monkeypatch):
    h200 = torch.device("cpu")  # what kernels are only looked at for
    found = [crowding(n, 128, h200) for n in (1, 59, 60, 131, 132, 263, 264)]
    few, some, one, two = Crowd
    assert found == [few, few, some, some, one, one, two]
    assert crowding(1, 7, h200) == one


@pytest.mark.parametrize(
    "b, d, leaves, warps, depth",
    [
        (16, 32, None, 2, 4),
        (16, 64, None, 4, 4),
        (16, 128, ATTENTION, 8, 3),
        (32, 32, ATTENTION, 2, 3),
    ],
)
def test_a_backward_that_fits_into_registers_is_one_kernel(b, d, leaves, warps, depth):
    loop = backward_of(b, d, leaves)
    schedule = chosen(loop, Crowd.TWO)
    assert (schedule.renderer, schedule.stages) == ("features", 1)
    assert (schedule.num_warps, schedule.num_stages) == (warps, depth)
    assert schedule.few_shuffles
    assert chosen(loop, Crowd.ONE).stages == 1
    assert chosen(loop, Crowd.SOME).stages == 1  # it is as fast where it is alone
    assert chosen(loop, Crowd.FEW).stages == 3
    assert chosen(loop, Crowd.TWO, gluon=False).renderer == "triton"
    assert chosen(loop, Crowd.SOME, gluon=False).stages == 3


@pytest.mark.parametrize("b, d", [(16, 128), (32, 64), (64, 64)])
def test_a_backward_that_would_spill_is_not(b, d):
    loop = backward_of(b, d)
    assert chosen(loop, Crowd.TWO).renderer == "triton"
    assert chosen(loop, Crowd.SOME).stages == 3


@pytest.mark.parametrize("name", ["gated_delta_net", "titans", "several_steps"])
def test_a_loop_without_such_a_kernel_is_plain(name):
    loop = backward_loop(rule_case(name, 1, 64, 2, 32, device="cpu"))
    for crowd in Crowd:
        for part in stages(loop, chosen(loop, crowd).stages):
            assert chosen(part, crowd).renderer == "triton"


def requests_of(b, d, crowd, name):
    """The kernels of a backward as rules have them, to be compiled."""
    case, loop, calls = case_of(b, d), backward_of(b, d), []
    own = {x.name: chosen(x, crowd) for x in stages(loop, chosen(loop, crowd).stages)}
    backward(case, chosen(loop, crowd), calls.append, before=Schedule(), of_stages=own)
    return [call.request(fast=True) for call in calls if call.kernel.name.endswith(name)]


def test_a_backward_in_one_kernel_spills_nothing():
    requests = [x for d in (32, 64) for x in requests_of(16, d, Crowd.TWO, "backward")]
    assert [x.spill_bytes for x in measure(requests, "sm_90")] == [0, 0]


def test_a_forward_takes_more_warps_before_it_spills():
    """In four warps it was 8 kB."""
    case = case_of(32, 128)
    loop = forward_kernels.forward_loop(case.program(), "full", False)
    schedule, calls = default_schedule(loop, Crowd.TWO, gluon=True), []
    assert (schedule.renderer, schedule.num_warps) == ("features", 8)
    forward(case, schedule, calls.append)
    (found,) = measure([calls[0].request(fast=True)], "sm_90")
    assert found.spill_bytes < 256


def test_parallel_kernels_of_many_features_spill_little():
    """With 16 features to each warp as rows of products; with tokens as rows it was 12 kB."""
    (found,) = measure(requests_of(16, 128, Crowd.FEW, "before"), "sm_90")
    assert found.spill_bytes < 256


@pytest.mark.parametrize("columns, together", [(16, 1), (32, 2), (32, 1), (64, 1)])
@pytest.mark.parametrize("warps", [1, 2, 4, 8])
def test_halving_leaves_a_lane_as_few_numbers_as_there_are(columns, together, warps):
    layouts = FeatureLayouts(warps)
    names = layouts.halving(columns, together)
    numbers = columns // 4  # of a lane, eight of which have the same columns
    assert len(names) == min(3, numbers.bit_length() - 1)
    for step, name in enumerate(names):
        (line,) = (x for x in layouts.lines() if x.startswith(f"{name} "))
        bases = eval(line.partition("reg_bases=")[2].partition(", lane_bases")[0])
        assert 2 ** len(bases) == numbers >> step
        assert bases[0] == [0, 4 >> step, 0]  # two rows that are added up next


def test_what_lives_at_a_time_is_counted_until_it_is_read_last():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.sin, (x,))
    b = graph.call_function(torch.cos, (x,))
    c = graph.call_function(torch.add, (a, b))
    d = graph.call_function(torch.mul, (c, a))
    sizes = {a: 3, b: 5, c: 7, d: 11}
    assert most_live([a, b, c, d], sizes.__getitem__) == 3 + 7 + 11
    assert most_live([a, b, c], sizes.__getitem__) == 3 + 5 + 7
    assert most_live([], sizes.__getitem__) == 0
