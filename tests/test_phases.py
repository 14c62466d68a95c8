"""Tokens that are tall tiles: kernels over pieces of their rows, forward and backward, against the naive loop."""

from __future__ import annotations

import pytest
import torch
from marks import interpreted
from test_passes import compiled
from test_rules import errors, in_single, results, scan_of, small
from tttc.codegen.loop import used
from tttc.codegen.phases import PIECE

import tttc
from tttc.ir.build import dims_of
from tttc.runtime import staged
from tttc.runtime.chunked import Chunked, first_launches, programs_a_tile, run_chunked

TALL = {"B": 2, "H": 2, "T": 3, "d": 5, "c": PIECE + 11}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


@interpreted
def test_kernels_of_tall_tiles(monkeypatch):
    runs = []

    def run(given, tensors, batch, heads, length, dtype, launcher):
        runs.append((given, tensors, batch, heads, length, dtype))
        return run_chunked(*runs[-1], launcher)

    monkeypatch.setattr(staged, "run_chunked", run)
    step, example = small("lact", **TALL)
    scan = scan_of(step, example.mini_batch_size)
    got = results(tttc.compile(scan, backend="triton", strict=True), in_single(example))
    worst = errors(results(scan, example), got)
    assert max(worst.values()) < 1e-3, worst
    with torch.no_grad():
        _, program = compiled(step, *in_single(example), verify=False)
    assert program.no_kernels is None and program.no_backward_kernels is None
    made = [x for x in program.kernels.values() if isinstance(x, Chunked)]
    for x in made:  # whatever has as many rows as a tile is read piece by piece
        assert x.made.rows == TALL["c"]
        assert all(TALL["c"] not in _sides(part) for part in x.made.loops if not part.tokens)
    assert {id(given) for given, *_ in runs} == set(map(id, made)) and len(made) == 2
    for given, *rest in runs:  # all that is to be compiled is known before the first launch
        names = {call.kernel.name for call in first_launches(given, *rest)}
        assert names == {kernel.name for kernel in given.kernels}


@interpreted
@pytest.mark.parametrize("T", [1, 3])
def test_no_kernel_is_run_for_an_update_that_nothing_reads(monkeypatch, T):
    """With no cotangent after the last chunk its kernels are those of its outputs, and zeros for what is learnt."""
    ran = []

    def run(given, tensors, batch, heads, length, dtype, launcher):
        ran.append((given.loop.name, length, sum(part.tokens for part in given.made.loops)))
        return run_chunked(given, tensors, batch, heads, length, dtype, launcher)

    monkeypatch.setattr(staged, "run_chunked", run)
    step, example = small("lact", **{**TALL, "T": T})
    init, tokens, shared = in_single(example)[:3]
    leaves = [x.requires_grad_() for x in tokens]

    def read(init, tokens, shared):
        return tttc.scan(step, init, tokens, 1, shared=shared)[1]

    scan = tttc.compile(read, backend="triton", strict=True)
    outputs = scan(init, type(tokens)(*leaves), shared)
    grads = torch.autograd.grad(outputs.square().sum(), leaves)
    assert all(not x[:, :, -1].any() for x in grads[1:]) and grads[0].all()
    backwards = [x[1:] for x in ran if x[0] == "scan_token_backward"]
    # q's rows and zeros for k, v and the rates; then what is learnt, what is read, and what comes back through it.
    assert backwards == [(1, 4), (T - 1, 3)][: 1 if T == 1 else 2]


@pytest.mark.parametrize(
    "heads, split", [(1, 128), (32, 4), (100, 1), (128, 1), (140, 4), (512, 1)]
)
def test_programs_fill_a_device_and_are_no_more(heads, split):
    assert programs_a_tile(heads, torch.device("cpu")) == split  # the figures of an H200


def decayed(anchor, W, chunk, shared):
    """A chunk whose rows count by their places: a constant that has as many rows as the tile."""
    q, k, v = chunk
    counts = 0.97 ** torch.arange(k.shape[0], dtype=k.dtype, device=k.device)

    def loss(W):
        return 0.5 * (counts[:, None] * (torch.tanh(k @ W) - v).square()).sum() / k.shape[0]

    return W - torch.func.grad(loss)(W), (q @ W) * counts[:, None]


@interpreted
def test_constants_with_rows_come_in_pieces_too():
    g = torch.Generator().manual_seed(0)
    tokens = tuple(
        torch.randn(2, 2, 2, TALL["c"], 5, generator=g, dtype=torch.float64) for _ in range(3)
    )
    init = torch.randn(2, 5, 5, generator=g, dtype=torch.float64)
    example = type(small("lact", **TALL)[1])(init, tokens, None, 1)
    scan = scan_of(decayed, 1)
    got = results(tttc.compile(scan, backend="triton", strict=True), in_single(example))
    worst = errors(results(scan, example), got)
    assert max(worst.values()) < 1e-3, worst
    with torch.no_grad():
        _, program = compiled(decayed, *in_single(example), verify=False)
    assert program.no_kernels is None and program.no_backward_kernels is None
    made = [x for x in program.kernels.values() if isinstance(x, Chunked)]
    assert len(made) == 2
    for x in made:
        assert all(TALL["c"] not in _sides(part) for part in x.made.loops if not part.tokens)


def _sides(part):
    """The sizes of what a kernel without pieces of rows reads and makes."""
    return {part.sizes[d] for n in part.graph.nodes if n in used(part) for d in dims_of(n)}
