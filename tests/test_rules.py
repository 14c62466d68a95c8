"""The rules of examples/rules: forward and backward of both backends against the naive loop, and what form they take."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch
from marks import interpreted
from test_passes import compiled
from torch.utils import _pytree as pytree

import tttc

FOLDER = Path(__file__).parents[1] / "examples" / "rules"
sys.path.append(str(FOLDER))
from _run import Normal, errors, results  # noqa: E402

MINI_BATCHES = [
    "linear_attention",
    "gated_linear_attention",
    "titans",
    "miras_lp",
    "miras_huber",
    "several_steps",
    "deep_mlp",
    "swiglu",
    "ttt_linear_channels",
    "vector_weights",
]
CHUNKS = ["lact"]
RULES = MINI_BATCHES + CHUNKS
SMALL = {"B": 2, "H": 2, "T": 7, "d": 5, "b": 4}
SMALL_CHUNKS = {"B": 2, "H": 2, "T": 2, "d": 5, "c": 6}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


def small(name, **changes):
    """A rule's step and small inputs."""
    module = importlib.import_module(name)
    sizes = {**(SMALL if name in MINI_BATCHES else SMALL_CHUNKS), **changes}
    return module.step, module.example(Normal(), **sizes)


def scan_of(step, b, cut=None):
    """The scan in one call, or in two that share a mini-batch."""

    def scan(init, tokens, shared):
        if cut is None:
            return tttc.scan(step, init, tokens, b, shared=shared)
        head, rest = (
            pytree.tree_map(lambda x, part=part: x[:, :, part], tokens)
            for part in (slice(None, cut), slice(cut, None))
        )
        state, first = tttc.scan(step, init, head, b, shared=shared)
        state, second = tttc.scan(step, state, rest, b, shared=shared)
        return state, torch.cat([first, second], 2)

    return scan


def in_single(example):
    cast = lambda x: None if x is None else x.float()  # noqa: E731
    return example._replace(**{
        name: pytree.tree_map(cast, getattr(example, name)) for name in ("init", "tokens", "shared")
    })  # fmt: skip


@pytest.mark.parametrize("name", MINI_BATCHES)
def test_a_dual_form_that_every_pass_keeps(name):
    step, example = small(name)
    with torch.no_grad():
        _, program = compiled(step, *example)
    assert program.verified and not program.sequential, program.reason


@pytest.mark.parametrize("name", RULES)
def test_torch_operations(name):
    step, example = small(name)
    scan = scan_of(step, example.mini_batch_size)
    got = results(tttc.compile(scan, backend="torch", strict=True), example)
    worst = errors(results(scan, example), got)
    assert max(worst.values()) < 1e-8, worst


@pytest.mark.parametrize("name", ["titans", "vector_weights", "gated_linear_attention"])
def test_two_calls_within_a_mini_batch(name):
    step, example = small(name)
    scan = scan_of(step, example.mini_batch_size, cut=6)
    got = results(tttc.compile(scan, backend="torch", strict=True), example)
    worst = errors(results(scan, example), got)
    assert max(worst.values()) < 1e-8, worst


@interpreted
@pytest.mark.parametrize("name", RULES)
def test_kernels(name):
    step, example = small(name)
    scan = scan_of(step, example.mini_batch_size)
    got = results(tttc.compile(scan, backend="triton", strict=True), in_single(example))
    worst = errors(results(scan, example), got)
    assert max(worst.values()) < 1e-3, worst
    # Neither direction fell back to torch operations.
    with torch.no_grad():
        _, program = compiled(step, *in_single(example), verify=False)
    assert program.no_kernels is None and program.no_backward_kernels is None


@pytest.mark.parametrize("name", RULES)
def test_rules_are_short_and_name_their_paper(name):
    module = importlib.import_module(name)
    assert "arXiv" in module.__doc__
    lines = inspect.getsource(module.step).splitlines()
    assert len(lines) < 40
