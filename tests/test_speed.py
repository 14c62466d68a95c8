"""The torch backend on a CPU against the naive loop, in float32, at a size of use."""

from __future__ import annotations

import time

import pytest
import torch

import tttc
from tttc.nn import TTTMLP, TTTLinear

TIMES = 30
NAIVE_TOKENS = 64  # of the naive loop, whose time is proportional to its tokens


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.mark.parametrize("layer", [TTTLinear, TTTMLP])
def test_thirty_times_faster_than_the_naive_loop(layer):
    torch.manual_seed(0)
    module = layer(256, num_heads=4, mini_batch_size=16)
    compiled = tttc.compile(module, backend="torch", strict=True)
    x = torch.randn(2, 1024, 256)
    torch.testing.assert_close(compiled(x[:, :64]), module(x[:, :64]), rtol=1e-3, atol=1e-3)
    naive, fast = [], []
    # In turn, and the best of each: another process that takes a core for a while slows neither alone.
    for _ in range(3):
        naive.append(seconds(lambda: module(x[:, :NAIVE_TOKENS])) * x.shape[1] / NAIVE_TOKENS)
        fast += [seconds(lambda: compiled(x)) for _ in range(3)]
    times = min(naive) / min(fast)
    print(
        f"{layer.__name__}: naive {min(naive):.2f} s, compiled {min(fast):.4f} s, {times:.0f} times"
    )
    assert times >= TIMES
