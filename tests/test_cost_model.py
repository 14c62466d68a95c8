"""Estimates of schedules: against what was measured, and as far as arithmetic says what they must be."""

from __future__ import annotations

import doctest
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sympy
import torch
from test_stages import call_of
from tttc.codegen import cost_model
from tttc.codegen.candidates import candidates
from tttc.codegen.cost_model import CostModel
from tttc.codegen.crowding import Crowd
from tttc.codegen.devices import A100, B200, H100, H200, device_of, from_properties, named
from tttc.codegen.schedule import Schedule
from tttc.codegen.work import BATCH, HEADS, LENGTH, work

from tttc.nn import TTTLinear
from tttc.runtime import forward_kernels

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import held

BENCHMARKS = Path(held.__file__).parent
RECORDED = BENCHMARKS / "results" / "2026-11-24-h200-schedules.json"
PICKED = BENCHMARKS / "results" / "2026-11-28-h200-picked.json"
SHAPES = {"B16 T2048": (16, 2048), "B1 T2048": (1, 2048)}


def loop_of(name):
    """The forward loop of a measured case."""
    spec = importlib.util.spec_from_file_location("scans", BENCHMARKS / "scans.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["scans"] = module
    spec.loader.exec_module(module)
    program = module.make_case(name, 1, 128, 2, device="cpu").program()
    return forward_kernels.forward_loop(program, "tokens" if program.sequential else "full", False)


def schedule_of(words):
    """A schedule from what differs from the default: ``num_warps=2 nan=branch``."""
    values = {}
    for word in words.split():
        name, text = word.split("=")
        values[name] = (
            int(text) if text.isdigit() else {"True": True, "False": False}.get(text, text)
        )
    return Schedule(**values)


@pytest.mark.parametrize("case", ["ttt_linear_b16", "ttt_mlp_b16"])
def test_ranks_as_an_h200_did(case):
    loop = loop_of(case)
    for shape, (batch, length) in SHAPES.items():
        rows = [r for r in json.loads(RECORDED.read_text())["rows"]
                if (r["case"], r["shape"]) == (case, shape) and "split" not in r["schedule"]]  # fmt: skip
        measured = {schedule_of(r["schedule"]): r["us"] for r in rows}
        model = CostModel(loop, (batch, 32, length), H200, 2)
        ranked = model.rank(measured)
        estimates = {s: e.seconds for s, e in ranked}
        best = min(measured.values())
        # A search times the first few; the first of all is no bad choice without.
        assert min(measured[s] for s, _ in ranked[:8]) <= 1.02 * best
        assert measured[ranked[0][0]] <= 1.15 * best
        pairs = [(x, y) for x in measured for y in measured if measured[x] < 0.9 * measured[y]]
        right = sum(estimates[x] < estimates[y] for x, y in pairs)
        assert right >= 0.8 * len(pairs)
        # Of the size of the truth, too.
        assert all(0.3 < 1e6 * estimates[s] / measured[s] < 3 for s in measured)


def whole_kernels():
    """Of a record of shapes, the schedules of whole kernels that were timed: loop, sizes of the call, microseconds."""
    for row in json.loads(PICKED.read_text())["rows"]:
        name, *sizes = row["shape"].rsplit("_", 3)
        d, batch, length = (int(x[1:]) for x in sizes)
        loop, tokens = held.forward(name, d)
        part = "scan_full" if loop.tokens else "scan_tokens"
        timed = {schedule_of(s): us for s, us in row["times"].get(part, {}).items()}
        timed = {s: us for s, us in timed.items() if not s.segments}  # two kernels
        calls = batch, held.WIDTH // d, length if loop.tokens else length // tokens
        if len(timed) > 1:
            yield row["shape"], loop, calls, timed


def test_ranks_every_renderer():
    far, renderers = {}, set()
    for shape, loop, sizes, timed in whole_kernels():
        ranked = [s for s, _ in CostModel(loop, sizes, H200, 2).rank(timed)]
        best = min(timed.values())
        far[shape] = timed[ranked[0]] / best
        assert min(timed[s] for s in ranked[:10]) <= 1.1 * best, shape
        renderers |= {s.renderer for s in timed if timed[s] == best}
    assert renderers == {"triton", "features", "warps", "gluon"}
    assert sum(math.log(x) for x in far.values()) / len(far) <= math.log(1.1)
    # Of 32 and 64 tokens, whose tiles take more registers, or spill more, than it says.
    assert sum(x > 1.25 for x in far.values()) <= 4 and max(far.values()) <= 1.7, far


def test_work_is_what_arithmetic_says():
    _, program, _ = call_of(TTTLinear, T=32, d=16, b=8)
    loop = forward_kernels.forward_loop(program, "full", False)
    made = work(loop, Schedule(), 2)
    assert {BATCH, HEADS, LENGTH} <= made.traffic.free_symbols
    table = made.table(loop, 16, 32, 2048)
    d, b, heads, tokens = 16, 8, 32, 2048
    # q, k, v in and z out, learning rate and weight of the token, in two bytes; states and parameters once.
    streams = 2 * 16 * heads * tokens * (4 * d + 2)
    total = float(made.traffic.subs(table))
    assert streams <= total <= 1.1 * streams
    # The dual form: k W and q W, the update of W, k kᵀ or q kᵀ and its product with the errors.
    least = 2 * 16 * heads * tokens * (3 * d * d + 2 * b * d)
    assert least <= float(made.products.subs(table)) <= 3 * least
    doubled = made.table(loop, 32, 32, 2048)
    assert made.products.subs(doubled) == 2 * made.products.subs(table)
    assert isinstance(made.traffic, sympy.Expr)


def test_estimates_move_as_they_must():
    _, program, _ = call_of(TTTLinear, T=32, d=16, b=8)
    loop = forward_kernels.forward_loop(program, "full", False)
    plain = Schedule(num_warps=4, order="products_first")

    def seconds(sizes, device=H200, schedule=plain):
        return CostModel(loop, sizes, device, 2).estimate(schedule).seconds

    assert seconds((1, 32, 4096)) > 1.5 * seconds((1, 32, 2048)), (
        "mini-batches run one after another"
    )
    assert seconds((2, 32, 2048)) < 1.1 * seconds((1, 32, 2048)), (
        "64 programs fit beside each other"
    )
    assert seconds((64, 32, 2048)) > 2 * seconds((16, 32, 2048)), "2048 don't"
    assert seconds((64, 32, 2048), A100) > seconds((64, 32, 2048), B200)
    tight = CostModel(loop, (1, 32, 2048), H200, 2).estimate(Schedule(num_warps=4, maxnreg=32))
    assert tight.spilled > 0
    ranked = CostModel(loop, (4, 32, 2048), H200, 2).rank(candidates(loop, Crowd.ONE))
    assert [e.seconds for _, e in ranked] == sorted(e.seconds for _, e in ranked)


def test_figures_of_devices():
    assert device_of(torch.device("cpu")) == H200
    assert named("NVIDIA H100 80GB HBM3") == H100 and named("GeForce") is None
    h100 = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132
    )
    assert from_properties(h100) == H100.__class__(**{**vars(H100), "name": h100.name})
    # One that is not in the table: what its driver says, the rest in proportion.
    half = SimpleNamespace(
        name="Unheard-of", major=9, minor=0, multi_processor_count=66, clock_rate=1.83e6,
        memory_bus_width=4096, memory_clock_rate=1.6e6, regs_per_multiprocessor=65536,
        shared_memory_per_multiprocessor=100 * 1024, warp_size=32,
    )  # fmt: skip
    found = from_properties(half)
    assert found.half == pytest.approx(H100.half / 2)
    assert found.bandwidth == pytest.approx(2 * 1.6e9 * 4096 / 8)
    assert (found.processors, found.shared) == (66, 100 * 1024)


def test_the_example():
    assert doctest.testmod(cost_model).failed == 0
