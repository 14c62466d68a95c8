"""Gluon kernels: what they compute, as Python on torch tensors; what they take, compiled for a GPU that is not there."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import gluon_on_cpu
import pytest
import torch
from marks import interpreted, on_gpu
from torch.utils import _pytree as pytree
from tttc.codegen import gluon_loop, heuristics
from tttc.codegen.crowding import Crowd
from tttc.codegen.loop import used
from tttc.codegen.pieces import divided
from tttc.codegen.render import render
from tttc.codegen.resources import measure
from tttc.codegen.schedule import Schedule
from tttc.codegen.stages import stages
from tttc.codegen.torch_scan import run_program
from tttc.codegen.torch_scan_backward import live_cotangents, saved_leaves

from tttc._scan_op import scan_info
from tttc.ir.build import dims_of
from tttc.ir.errors import KernelTooLarge, NotLowerable
from tttc.runtime import forward_kernels, fused_scan, launch, triton_scan, triton_scan_backward

sys.path[:0] = [
    str(Path(__file__).parent.parent / place) for place in ("benchmarks", "examples/rules")
]
from scans import Case, make_case  # noqa: E402

GLUON = Schedule(
    num_warps=8, num_stages=1, late_loads=True, order="on_demand", renderer="gluon", widest=128,
    narrow=True, nan="ignored", repeat_vectors=False,
)  # fmt: skip
CHOICES = [
    {},
    {"prefetch": True, "reload": True},
    {"early": True},
    {"order": "graph"},
    {"widest": 64},
]


@torch.no_grad()
def forward(case, schedule, launcher, save=None):
    """Outputs and states of a scan under one schedule."""
    program, call = case.program(), case.flat()
    program.kernels.clear()
    program.schedules["tokens" if program.sequential else "full"] = schedule
    info = scan_info(call.anchor, call.tokens, call.shared)
    made = triton_scan.run_kernels(
        program, call.anchor, call.carry, call.tokens, call.shared, 0, info.output, launcher=launcher,
        save=save,
    )  # fmt: skip
    program.schedules.clear()
    program.kernels.clear()
    return made[2], made[1]


@torch.no_grad()
def exact(case):
    """The same in float64, by torch operations."""
    program, call = case.program(), case.flat()
    anchor, tokens, shared = (
        [x.double() for x in group] for group in (call.anchor, call.tokens, call.shared)
    )
    made = run_program(program, anchor, anchor, tokens, shared, 0)
    return made[2], made[1]


def assert_close(got, wanted, tolerance):
    for group, other in zip(got, wanted, strict=True):
        for x, y in zip(group, other, strict=True):
            assert float((x.double() - y).norm()) <= tolerance * float(y.norm()) + 1e-12


def chunk_case(dtype=torch.float32, **options):
    return make_case("ttt_mlp_chunk64", 1, 192, heads=1, device="cpu", dtype=dtype, **options)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_forward_computes_what_the_program_says(choice):
    case = chunk_case()
    got = forward(case, replace(GLUON, **choice), gluon_on_cpu.run)
    assert_close(got, exact(case), 1e-5)


def test_another_rule_with_many_products():
    """Chunks that are read before they are learnt, weights made orthogonal by a chain of products under new names."""
    rule = importlib.import_module("lact")
    torch.manual_seed(0)
    made = rule.example(rule.Normal(), B=1, H=1, T=2, d=64, c=64)
    init, tokens, shared = (pytree.tree_map(lambda x: x.float(), x) for x in made[:3])
    case = Case("lact", rule.step, init, tokens, shared, 1, {})
    assert_close(forward(case, replace(GLUON, widest=64), gluon_on_cpu.run), exact(case), 1e-5)


def test_operands_of_products_have_the_dtype_of_tokens():
    case = chunk_case(torch.bfloat16)
    assert_close(forward(case, GLUON, gluon_on_cpu.run), exact(case), 1e-2)


@interpreted
def test_pieces_are_for_plain_triton_too():
    case = chunk_case()
    plain = Schedule(widest=64, order="on_demand", late_loads=True)
    assert_close(forward(case, plain, launch.launch), exact(case), 1e-5)


def backward(case, schedule, launcher, before=GLUON, of_stages=None):
    """Cotangents of tokens and initial states under one schedule, and what they should be.

    ``before``: the schedule of the forward. ``of_stages``: schedules of stages of the backward that have their own.
    """
    program, call = case.program(), case.flat()
    program.kernels.clear()
    program.schedules["tokens" if program.sequential else "full"] = before
    program.schedules |= of_stages or {}
    leaves = fused_scan.floating_leaves(call.tokens, call.shared)
    live = saved_leaves(program, leaves)
    info = scan_info(call.anchor, call.tokens, call.shared)
    with torch.no_grad():
        saved = fused_scan._empty_saved(
            program, call.anchor, call.tokens, call.shared, 0, 1, info, "triton"
        )
        z = triton_scan.run_kernels(
            program, call.anchor, call.carry, call.tokens, call.shared, 0, info.output, states=False,
            save=dict(zip(live, saved, strict=True)), launcher=launcher,
        )[2]  # fmt: skip
        torch.manual_seed(0)
        given = [torch.randn_like(x) for x in z]
        nothing = [None] * len(call.anchor)
        out = {n: torch.empty_like(call.tokens[int(n[6:])]) for n in leaves if n[0] == "t"}
        part = "token" if program.sequential else "full"
        program.schedules[f"{part}_backward"] = schedule
        on_anchor, _, sums = triton_scan_backward.run_backward_kernels(
            program, leaves, [x.float() for x in call.anchor], [], call.tokens, call.shared, 0,
            (nothing, nothing, given), live, saved, 1, out, info.output, launcher=launcher,
        )  # fmt: skip
    program.schedules.clear()
    program.kernels.clear()
    groups = [
        [x.double().requires_grad_() for x in g]
        for g in (call.anchor, [], call.tokens, call.shared)
    ]
    z = torch.ops.tttc.fused_scan(
        *groups, call.key, case.mini_batch_size, 0, "torch", False, 1
    )  # fmt: skip
    outputs = [x for x in z if x.requires_grad][: len(given)]
    wanted = torch.autograd.grad(
        outputs,
        [*groups[2], *groups[0], *groups[3]],
        [g.double() for g in given],
        allow_unused=True,
    )
    tokens = len(call.tokens)
    shared = [sums[f"shared_{i}"] for i in range(len(call.shared))]
    return (
        (list(out.values()), on_anchor, shared),
        (wanted[:tokens], wanted[tokens : tokens + len(call.anchor)], wanted[-len(shared) :]),
    )


@pytest.mark.parametrize(
    "choice",
    [{"stages": 3}, {"stages": 3, "prefetch": True, "reload": True, "early": True}, {"stages": 1}],
    ids=str,
)
def test_backward_computes_what_the_program_says(choice, monkeypatch):
    monkeypatch.setattr(gluon_loop, "SHARED_BYTES", 1 << 20)  # values are what matters here
    got, wanted = backward(chunk_case(), replace(GLUON, **choice), gluon_on_cpu.run)
    assert_close(got, wanted, 1e-4)


def loops():
    """The loops of the forward and of the stages of the backward of one case."""
    case = chunk_case(torch.bfloat16)
    program, call = case.program(), case.flat()
    leaves = fused_scan.floating_leaves(call.tokens, call.shared)
    live = live_cotangents(program, leaves, set())
    whole = triton_scan_backward.backward_loop_of(program, "token", leaves, live)
    return {
        s.name: s
        for s in (forward_kernels.forward_loop(program, "tokens", False), *stages(whole, 3))
    }


def test_large_tiles_are_for_warpgroups_where_there_are_some():
    for name, loop in loops().items():
        chosen = heuristics.default_schedule(
            loop, Crowd.ONE, backward="backward" in name, gluon=True
        )
        assert chosen.renderer == "gluon"
        while chosen.instead is not None:
            chosen = chosen.instead
        assert chosen.renderer == "triton"
        assert heuristics.default_schedule(loop, Crowd.ONE).renderer == "triton"


def test_copies_come_ahead_where_a_loop_loads_more_than_it_stores():
    chosen = {
        name: heuristics.default_schedule(loop, Crowd.ONE, backward="backward" in name, gluon=True)
        for name, loop in loops().items()
    }
    ahead = {name.rpartition("_")[-1]: (s.early, s.prefetch) for name, s in chosen.items()}
    assert ahead == {
        "tokens": (True, False),
        "before": (False, True),
        "recurrence": (True, False),
        "outputs": (True, False),
    }


@interpreted
def test_states_are_saved_as_products_read_them():
    """Where all that reads a state rounds it, it is saved rounded, in rows of its wide dimension."""
    case = chunk_case(torch.bfloat16)
    program, call = case.program(), case.flat()
    leaves = fused_scan.floating_leaves(call.tokens, call.shared)
    assert triton_scan_backward.narrow_states(program, leaves) == {0, 2}
    info = scan_info(call.anchor, call.tokens, call.shared)
    saved = fused_scan._empty_saved(
        program, call.anchor, call.tokens, call.shared, 0, 1, info, "triton"
    )
    assert [x.dtype for x in saved] == [torch.bfloat16, torch.float32] * 2
    assert [x.stride()[3:] for x in (saved[0], saved[2])] == [(1, 64), (64, 1)]
    source = render(forward_kernels.forward_loop(program, "tokens", False, tuple(saved_leaves(program, leaves))), GLUON).source  # fmt: skip
    assert "gl.store(saved_carry_0_ptr" in source and "carry_0_s.load(" in source


@pytest.mark.parametrize("name, d", [("ttt_linear_b16", 64), ("ttt_mlp_chunk64", 48)])
def test_what_has_no_gluon_form_stays_plain(name, d):
    case = make_case(name, 1, 128, heads=1, d=d, device="cpu")
    program = case.program()
    part = "tokens" if program.sequential else "full"
    loop = forward_kernels.forward_loop(program, part, False)
    with pytest.raises(NotLowerable):
        render(loop, GLUON)
    assert heuristics.default_schedule(loop, Crowd.ONE, gluon=True).renderer != "gluon"


def test_a_wide_dimension_is_divided():
    loop = next(iter(loops().values()))
    made = divided(loop, 64)
    (wide,) = (d for d, n in loop.sizes.items() if n == 256)
    assert made.sizes[wide] == 64 and made.whole_size(wide) == 256
    per_value = [sum(wide in dims_of(n) for n in used(x)) for x in (loop, made)]
    assert per_value[1] == 4 * per_value[0]
    assert divided(loop, 256) is loop


@interpreted
def test_what_does_not_compile_runs_by_the_next_schedule():
    case = chunk_case()
    refused = replace(GLUON, num_warps=4, instead=Schedule(late_loads=True))
    seen = []

    def launcher(call):
        if call.kernel.config["schedule"].renderer == "gluon":
            call.kernel._function = Broken()
        launch.launch(call)
        seen.append(call.kernel)

    assert_close(forward(case, refused, launcher), exact(case), 1e-5)
    assert seen[0].refused and seen[0].instead().config["schedule"].renderer == "triton"
    alone = replace(refused, instead=None)
    with pytest.raises(KernelTooLarge):
        forward(case, alone, launcher)


class Broken:
    """A kernel that asks for more than any device has."""

    def __getitem__(self, grid):
        from triton.runtime.errors import OutOfResources

        raise OutOfResources(1 << 20, gluon_loop.SHARED_BYTES, "shared memory")


def test_resources_on_hopper():
    case = chunk_case(torch.bfloat16)
    calls = []
    forward(case, GLUON, calls.append)
    (got,) = measure([calls[0].request(fast=True)], "sm_90")
    assert got.shared_bytes <= gluon_loop.SHARED_BYTES
    assert got.spill_bytes <= 640  # plain Triton spills several times that
    assert (
        calls[0].kernel.source.count("warpgroup_mma(") == 14
    )  # seven products, in two pieces each


@on_gpu
def test_on_a_gpu():
    case = make_case("ttt_mlp_chunk64", 1, 512)
    if not heuristics.hopper(case.raw["q"].device):
        pytest.skip("Gluon kernels need a Hopper GPU to run")
    assert_close(forward(case, GLUON, launch.launch), exact(case), 1e-2)
