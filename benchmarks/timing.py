"""Timing contenders in turn, so that whatever the machine does meets all of them."""

from __future__ import annotations

import datetime
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import torch

PACKAGES = ("tttc", "torch", "triton", "flash-linear-attention", "fla-core", "mamba-ssm")
SAMPLE = 2e-3  # seconds of calls between two readings of the clock, about
ROUNDS = 60


def record() -> dict[str, Any]:
    """What every record says of itself: command, date, device, versions."""
    installed = {n for n in PACKAGES if any(True for _ in metadata.distributions(name=n))}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {n: metadata.version(n) for n in PACKAGES if n in installed},
    }


def once(run: Callable[[], Any], calls: int = 1) -> float:
    """Seconds a call takes, over ``calls`` in a row."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls / 1e3


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A call as a CUDA graph, and what it returned: tensors that every replay writes anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run()
    return graph, made


def interleaved(
    contenders: Mapping[str, Callable[[], Any]], seconds: float = 3.0, sample: float = SAMPLE
) -> dict[str, dict[str, float]]:
    """Median and quartiles of each contender's time in microseconds, all measured in turn, for about ``seconds`` in all.

    ``sample``: seconds of calls in a row, about; the longer, the less of the first call's way to the device is in them.
    """
    calls: dict[str, int] = {}
    for name, run in contenders.items():
        once(run)
        once(run)
        calls[name] = max(1, min(20, round(sample / max(once(run), 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    while len(next(iter(samples.values()))) < 3 or (
        time.perf_counter() - start < seconds and len(next(iter(samples.values()))) < ROUNDS
    ):
        for name, run in contenders.items():
            samples[name].append(1e6 * once(run, calls[name]))
    made = {}
    for name, found in samples.items():
        low, middle, high = statistics.quantiles(found, n=4)
        made[name] = {"us": middle, "q25": low, "q75": high, "rounds": len(found)}
    return made


def bandwidth(size: int = 1 << 30) -> float:
    """Bytes a second that a copy of ``size`` bytes moves through the memory of the device at hand, reads and writes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.zeros(size if device == "cuda" else size >> 6, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    y.copy_(x)
    return 2 * x.numel() / min(once(lambda: y.copy_(x), 5) for _ in range(5))


def matrix_rate(size: int = 8192) -> float:
    """Operations a second of a product of bf16 matrices of random numbers on the device at hand."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = size if device == "cuda" else size >> 5
    x, y = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    x @ y
    return 2 * size**3 / min(once(lambda: x @ y, 5) for _ in range(5))


def relative(x: torch.Tensor, exact: torch.Tensor) -> float:
    """``|x - exact| / |exact|``."""
    return float((x.double() - exact.double()).norm() / exact.double().norm())
