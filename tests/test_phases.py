"""Tokens that are tall tiles: kernels over pieces of their rows, forward and backward, against the naive loop."""

from __future__ import annotations

import pytest
import torch
from test_passes import compiled
from test_rules import errors, in_single, results, scan_of, small
from tttc.codegen.phases import PIECE

import tttc

TALL = {"B": 2, "H": 2, "T": 3, "d": 5, "c": PIECE + 11}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs kernels without a GPU")
def test_kernels_of_tall_tiles():
    step, example = small("lact", **TALL)
    scan = scan_of(step, example.mini_batch_size)
    got = results(tttc.compile(scan, backend="triton", strict=True), in_single(example))
    worst = errors(results(scan, example), got)
    assert max(worst.values()) < 1e-3, worst
    with torch.no_grad():
        _, program = compiled(step, *in_single(example), verify=False)
    assert program.no_kernels is None and program.no_backward_kernels is None
