"""Kernels whose warps each hold some features: what they compute, and what they take."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import gluon_on_cpu
import pytest
import torch
from marks import interpreted
from test_gluon import assert_close, backward, exact, forward
from tttc.codegen.feature_layouts import FeatureLayouts
from tttc.codegen.schedule import Schedule

from tttc.runtime import forward_kernels, launch, segmented_scan

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from rule_cases import any_case
from scans import Case, make_case

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
    return forward_kernels.forward_loop(case.program(), "full", False)


@interpreted
@pytest.mark.parametrize("nan", ["ignored", "product", "again"])
@pytest.mark.parametrize("T", [64, 57])
def test_forward_computes_what_the_program_says(T, nan):
    case = case_of(T)
    assert_close(forward(case, replace(FEATURES, nan=nan), run), exact(case), 1e-5)


@interpreted
@pytest.mark.parametrize("warps, d, b", [(1, 32, 16), (4, 64, 16), (2, 64, 32), (2, 32, 64)])
def test_other_pieces(warps, d, b):
    case = case_of(name=f"ttt_linear_b{b}", d=d)
    for few in (False, True):
        schedule = replace(FEATURES, num_warps=warps, few_shuffles=few)
        assert_close(forward(case, schedule, run), exact(case), 1e-5)


def test_operands_of_products_have_the_dtype_of_tokens():
    case = case_of(dtype=torch.bfloat16)
    launches = []

    def note(call):
        launches.append(call)
        run(call)

    assert_close(forward(case, FEATURES, note), exact(case), 1e-2)
    (call,) = launches
    assert call.kernel.config["words"] == {
        "token_3": 16,
        "token_4": 16,
    }  # copied with their neighbours
    assert call.tensors["token_3"].dtype == torch.bfloat16


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [64, 57])
def test_numbers_of_two_bytes_come_with_their_neighbours(dtype, T):
    case = case_of(T, dtype)
    there, _ = forward(case, FEATURES, run)
    assert not there[0].isnan().any()
    rates = case.tokens.eta
    B, H, T = rates.shape[:3]
    wide = torch.full((B, T, H + 1, *rates.shape[3:]), float("nan"), dtype=dtype)
    wide[:, :, 1:] = rates.transpose(1, 2)
    odd = wide[:, :, 1:].transpose(1, 2)  # every second one begins a word
    assert odd.stride(2) == 3
    again = replace(case, tokens=case.tokens._replace(eta=odd))
    assert torch.equal(forward(again, FEATURES, run)[0][0], there[0])


@pytest.mark.parametrize("argument", ["q", "k", "v", "eta"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_after_its_token(argument, value):
    case = case_of()
    getattr(case.tokens, argument)[0, 1, 22] = value
    careless = forward(case, replace(FEATURES, nan="ignored"), run)
    (z,), _ = forward(case, FEATURES, run)
    (wanted,), _ = exact(case)
    assert torch.equal(z.isnan(), wanted.isnan())
    assert wanted.isnan().any() and not wanted[:, :, :22].isnan().any()
    seen = argument in ("k", "v")  # by sums over tokens, also those before
    assert bool(careless[0][0][0, 1, 16:22].isnan().any()) == seen


class Written(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rate: torch.Tensor


WRITES = {
    "values": lambda t: torch.outer(t.k, t.rate * t.v),
    "keys": lambda t: torch.outer(t.rate * t.k, t.v),
    "both": lambda t: t.rate * torch.outer(t.k, t.v),
}


@interpreted
@pytest.mark.parametrize("nan", ["again", "product"])
@pytest.mark.parametrize("scaled", WRITES)
def test_a_number_that_scales_is_seen_after_its_token(scaled, nan):
    def step(anchor, W, t, shared):
        W = W + WRITES[scaled](t)
        return W, t.q @ W

    torch.manual_seed(0)
    tokens = Written(*torch.randn(3, 1, 2, 64, 32), torch.rand(1, 2, 64))
    tokens.rate[0, 1, 22] = float("inf")
    case = Case(scaled, step, torch.randn(2, 32, 32), tokens, None, 16, {})
    (z,), _ = forward(case, replace(FEATURES, nan=nan), run)
    (wanted,), _ = exact(case)
    assert torch.equal(z.isfinite(), wanted.isfinite())
    assert wanted[:, :, :22].isfinite().all() and not wanted[0, 1, 22].isfinite().all()


@pytest.fixture
def between_parallel_kernels(monkeypatch):
    """Of three kernels the one that makes states holds features in warps; the renderers of all that ran."""
    renderers = []

    def staged(whole, count, schedule):
        made = forward_kernels_staged(
            whole,
            count,
            lambda part: FEATURES if part.name.endswith("recurrence") else schedule(part),
        )
        renderers.extend(k.config["schedule"].renderer for k in made.kernels)
        return made

    forward_kernels_staged = forward_kernels.staged
    monkeypatch.setattr(forward_kernels, "staged", staged)
    yield
    assert renderers[:3] == ["triton", "features", "triton"]


IN_THREE = Schedule(num_stages=1, order="least_live", stages=3, nan="branch", repeat_vectors=False)


@interpreted
@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net"])
@pytest.mark.parametrize("T", [64, 57])
def test_states_of_the_delta_rule(name, T, between_parallel_kernels):
    case = any_case(name, 1, T, 2, 32, device="cpu", dtype=torch.float32)
    assert_close(forward(case, IN_THREE, run), exact(case), 1e-5)


@interpreted
@pytest.mark.parametrize("argument", ["q", "k", "v", "alpha", "beta"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_outlives_gates(argument, value, between_parallel_kernels):
    """A gate of zero takes no part of a state away that is not finite: the end of it tells."""
    case = any_case("gated_delta_net", 1, 96, 2, 32, device="cpu", dtype=torch.float32)
    case.tokens.alpha[0, 1, 70] = 0.0
    getattr(case.tokens, argument)[0, 1, 42] = value
    (z,), _ = forward(case, IN_THREE, run)
    (wanted,), _ = exact(case)
    assert torch.equal(z.isfinite(), wanted.isfinite())
    assert not wanted.isfinite().all() and wanted[:, :, :42].isfinite().all()


@pytest.mark.parametrize("columns", [16, 32, 64, 128])
@pytest.mark.parametrize("size", [2, 4])
def test_eight_rows_are_read_without_bank_conflicts(columns, size):
    layouts = FeatureLayouts(4)
    name = layouts.shared(columns, size)
    (line,) = (x for x in layouts.lines() if x.startswith(f"{name} "))
    each, phase, lines = map(int, re.findall(r"\d+", line.partition("Layout(")[2])[:3])
    for chunk in range(columns // each):  # of 16 bytes
        at = [r * columns // each + (chunk ^ (r // phase % lines)) for r in range(8)]
        assert len({x % 8 for x in at}) == 8


@interpreted
@pytest.mark.parametrize(
    "batch, T, kernels",
    [
        (1, 256, ["full_states", "full"]),
        (2, 256, ["full_states", "full"]),
        (1, 263, ["full_states", "full", "continued"]),
        (1, 288, ["full_states", "full", "full"]),
        (2, 288, ["full"]),  # segments of two sequences do not follow each other alike
    ],
)
def test_segments_beside_each_other(batch, T, kernels, monkeypatch):
    monkeypatch.setattr(segmented_scan, "mini_batches_of", lambda *_: 4)
    case = make_case("ttt_linear_b16", batch, T, heads=2, d=32, device="cpu", dtype=torch.float32)
    launches = []

    def note(call):
        launches.append(call.kernel.name)
        run(call)

    assert_close(forward(case, replace(FEATURES, segments=True), note), exact(case), 1e-5)
    assert launches == [f"scan_{name}" for name in kernels]


@interpreted
@pytest.mark.parametrize("choice", [{}, {"few_shuffles": True}, {"order": "least_live"}], ids=str)
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("T", [64, 57])
def test_backward_computes_what_the_program_says(T, stages, choice):
    case = case_of(T)
    schedule = replace(FEATURES, nan="ignored", stages=stages, **choice)
    plain = Schedule(num_warps=4, num_stages=1, repeat_vectors=False, nan="ignored", stages=stages)
    own = {"scan_full_backward_recurrence": schedule}
    renderers = []

    def note(call):
        renderers.append(call.kernel.config["schedule"].renderer)
        run(call)

    whole = plain if stages == 3 else schedule
    got, wanted = backward(case, whole, note, before=replace(FEATURES), of_stages=own)
    for x, y in zip(got, wanted, strict=True):
        assert_close([x], [y], 1e-4)
    assert renderers.count("features") == 2
