"""Kernels whose warps each hold a piece of the widest dimension: what they compute, and what they take."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import gluon_on_cpu
import pytest
import torch
from marks import interpreted, on_gpu
from test_gluon import assert_close, exact, forward
from tttc.codegen import gluon_loop, heuristics
from tttc.codegen.crowding import Crowd
from tttc.codegen.render import render
from tttc.codegen.resources import measure
from tttc.codegen.schedule import Schedule

from tttc.ir.errors import NotLowerable
from tttc.runtime import forward_kernels, launch, triton_scan

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from scans import make_case

WARPS = Schedule(num_warps=8, num_stages=1, renderer="warps", nan="again", repeat_vectors=False)


def case_of(T=64, dtype=torch.float32, name="ttt_mlp_b16", d=32):
    return make_case(name, 1, T, heads=2, d=d, device="cpu", dtype=dtype)


def run(call):
    """Kernels of warps as Python; what continues a mini-batch in the interpreter."""
    warps = call.kernel.config["schedule"].renderer == "warps"
    (gluon_on_cpu.run if warps else launch.launch)(call)


def loop_of(case):
    return forward_kernels.forward_loop(case.program(), "full", False)


@interpreted
@pytest.mark.parametrize("nan", ["ignored", "product", "again"])
@pytest.mark.parametrize("T", [64, 57])
def test_forward_computes_what_the_program_says(T, nan):
    case = case_of(T)
    assert_close(forward(case, replace(WARPS, nan=nan), run), exact(case), 1e-5)


@pytest.mark.parametrize("warps, b", [(4, 16), (8, 32)])
def test_other_pieces(warps, b):
    case = case_of(name=f"ttt_mlp_b{b}")
    assert_close(forward(case, replace(WARPS, num_warps=warps), run), exact(case), 1e-5)


def test_operands_of_products_have_the_dtype_of_tokens():
    case = case_of(dtype=torch.bfloat16)
    assert_close(forward(case, WARPS, run), exact(case), 1e-2)


def test_states_are_saved_on_the_way():
    case = case_of()
    program, call = case.program(), case.flat()
    states = range(len(call.anchor))
    saved = {i: torch.full((1, 2, 4, *call.anchor[i].shape[-(call.anchor[i].ndim - 2) :]), float("nan"))
             for i in states if call.anchor[i].abs().sum() > 0}  # fmt: skip
    forward(case, WARPS, run, save=saved)
    _, after = exact(make_case_of_first(case, 48))
    for i, x in saved.items():
        assert_close([[x[:, :, 3]]], [[after[i].double()]], 1e-5)
        assert_close([[x[:, :, 0]]], [[call.anchor[i].double().expand_as(x[:, :, 0])]], 1e-6)
    assert program is case.program()


def make_case_of_first(case, T):
    """The same case with its first tokens alone."""
    tokens = type(case.tokens)(*(x[:, :, :T] for x in case.tokens))
    return replace(case, tokens=tokens)


@pytest.mark.parametrize("argument", ["q", "k", "v", "eta"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_after_its_token(argument, value):
    case = case_of()
    getattr(case.tokens, argument)[0, 1, 22] = value
    careless = forward(case, replace(WARPS, nan="ignored"), run)
    (z,), _ = forward(case, WARPS, run)
    (wanted,), _ = exact(case)
    assert torch.equal(z.isnan(), wanted.isnan())
    assert wanted.isnan().any() and not wanted[:, :, :22].isnan().any()
    seen = argument in ("k", "v")  # by sums over tokens, also those before
    assert bool(careless[0][0][0, 1, 16:22].isnan().any()) == seen


def test_a_wide_state_is_shared_by_warps():
    loop = loop_of(case_of(d=64))
    chosen = heuristics.default_schedule(loop, Crowd.ONE, gluon=True)
    assert chosen.renderer == "warps" and chosen.instead.renderer == "triton"
    assert heuristics.default_schedule(loop, Crowd.ONE).renderer == "triton"
    larger = forward_kernels.forward_loop(
        case_of(d=64).program(), "full", True
    )  # with sums that nobody else reads
    assert heuristics.default_schedule(larger, Crowd.ONE, gluon=True).renderer == "triton"


@pytest.mark.parametrize(
    "name, d", [("ttt_linear_b16", 64), ("ttt_mlp_b16", 48), ("ttt_mlp_b8", 64)]
)
def test_what_warps_cannot_share_stays_plain(name, d):
    with pytest.raises(NotLowerable):
        render(loop_of(case_of(name=name, d=d)), WARPS)


def test_resources_on_hopper():
    calls = []
    case = case_of(d=64, dtype=torch.bfloat16)
    program, call = case.program(), case.flat()
    program.schedules["full"] = replace(WARPS, nan="ignored")
    triton_scan.run_kernels(
        program, call.anchor, call.carry, call.tokens, call.shared, 0, torch.bfloat16, states=False,
        launcher=calls.append,
    )  # fmt: skip
    program.schedules.clear()
    (got,) = measure([calls[0].request(fast=True)], "sm_90")
    assert got.shared_bytes <= gluon_loop.SHARED_BYTES
    assert got.spill_bytes <= 160  # plain Triton spills 400
    assert calls[0].kernel.source.count("= mma_v2(") == 11


@on_gpu
def test_on_a_gpu():
    case = make_case("ttt_mlp_b16", 1, 512)
    if not heuristics.hopper(case.raw["q"].device):
        pytest.skip("Gluon kernels need a Hopper GPU to run")
    assert_close(forward(case, WARPS, launch.launch), exact(case), 1e-2)
