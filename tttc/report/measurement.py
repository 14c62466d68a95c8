"""Timing contenders in turn on the same inputs, and their errors against the naive loop in float64."""

from __future__ import annotations

import copy
import datetime
import os
import platform
import shutil
import time
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tttc import _tracing
from tttc.compiler import compile
from tttc.progress import doing
from tttc.report import peers
from tttc.report.clock import Clock, OutOfTime
from tttc.report.results import BenchmarkResult, Row
from tttc.report.scans import relative_error

SHORTEST = 5e-3  # seconds a sample takes at least: short calls are repeated inside it
OPAQUE = "the loop inside tttc.scan is opaque to it"


class Measurement:
    """One benchmark of a model on given inputs: what the contenders are, their times, memory and errors."""

    def __init__(
        self,
        model: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        backward: bool,
        backend: str,
        mini_batch_size: int | None,
        budget: float,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.backward, self.backend = backward, backend
        self.mini_batch_size, self.budget = mini_batch_size, budget
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        held = list(model.parameters()) if isinstance(model, nn.Module) else []
        self.device = next((x.device for x in (*tensors, *held)), torch.device("cpu"))
        self.shapes = [f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in tensors]
        self.results: dict[str, list[torch.Tensor]] = {}
        self.outputs = 0

    # -- contenders ----------------------------------------------------------------------------------

    def contender(self, name: str) -> Any:
        if name == "eager":
            return self.model
        if name in peers.NOTES:
            if name not in peers.applicable(self.model, self.device):
                raise RuntimeError(
                    "it is not installed, or the model has no layer it can stand for"
                )
            return peers.make(name, self.model)
        if name == "tttc":
            return compile(self.model, backend=self.backend, mini_batch_size=self.mini_batch_size)
        if self.device.type == "cpu" and not has_compiler():
            raise RuntimeError("no C++ compiler for TorchInductor")
        return torch.compile(self.model)

    def call(self, model: Any, args: Any = None, kwargs: Any = None) -> list[torch.Tensor]:
        """Outputs, then gradients."""
        args, kwargs = args or self.args, self.kwargs if kwargs is None else kwargs
        if not self.backward:
            with torch.no_grad():
                return _tensors(model(*args, **kwargs))
        inputs = [x for x in _tensors((args, kwargs)) if x.requires_grad]
        if isinstance(model, nn.Module):
            inputs += [p for p in model.parameters() if p.requires_grad]
        if not inputs:
            raise ValueError("backward: expected a parameter or an input that requires a gradient")
        outputs = _tensors(model(*args, **kwargs))
        # A fixed direction, the same for each contender.
        loss = sum(
            (
                x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)
            ).sum()
            for x in outputs
            if x.requires_grad
        )
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)  # type: ignore[arg-type]
        self.outputs = len(outputs)
        filled = (
            torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)
        )
        return [x.detach() for x in (*outputs, *filled)]

    def sample(self, model: Any, calls: int) -> float:
        """Seconds a call takes."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            self.call(model)
        self.synchronize()
        return (time.perf_counter() - start) / calls

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak(self, model: Any) -> int | None:
        if self.device.type != "cuda":
            return None
        self.synchronize()
        held = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.call(model)
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - held

    # -- the measurement -----------------------------------------------------------------------------

    def all(self, names: list[str], repeats: int, check: bool) -> BenchmarkResult:
        rows = {name: Row(name) for name in names}
        ready: dict[str, tuple[Any, int]] = {}
        with doing("benchmark") as step:
            for name, row in rows.items():
                step(f"{name}: first call")
                model = self.prepare(name, row, rows.get("eager"))
                if model is not None:
                    ready[name] = model
            spent = dict.fromkeys(ready, 0.0)
            for i in range(repeats):
                for name, (model, calls) in ready.items():
                    if i and spent[name] * (i + 1) / i > self.budget:
                        continue
                    step(f"{name}: {i + 1} of {repeats}")
                    rows[name].times.append(self.sample(model, calls))
                    spent[name] += rows[name].times[-1] * calls
            for name, (model, _) in ready.items():
                if rows[name].first_call is not None and self.device.type == "cuda":
                    rows[name].peak_memory = self.peak(model)
            reference = "none"
            if check:
                step("the reference in float64")
                reference = self.compare(rows)
        return BenchmarkResult(
            list(rows.values()),
            self.shapes,
            self.backward,
            _name_of(self.device),
            reference,
            torch.get_num_threads(),
            {"python": platform.python_version(), "torch": torch.__version__, "triton": _triton()},
            datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )

    def prepare(self, name: str, row: Row, eager: Row | None) -> tuple[Any, int] | None:
        """Compile and warm up; fills in the row, and returns the callable and how often a sample calls it."""
        if name == "torch.compile" and eager is not None and eager.at_least is not None:
            row.note = f"skipped: {OPAQUE}, and eager was stopped"
            return None
        clock = Clock(self.budget)
        start = time.perf_counter()
        try:
            model = self.contender(name)
            with _tracing.before_each_token(clock):
                self.results[name] = self.call(model)
                self.synchronize()
            row.first_call = estimate = time.perf_counter() - start
            if name == "eager" and estimate > self.budget / 2:
                row.times, row.note = [estimate], "one call"
                return None
            clock.restart()
            with _tracing.before_each_token(clock):
                estimate = self.sample(model, 1)
        except OutOfTime:
            row.at_least = clock.spent()
            row.note = f"stopped after {row.at_least:.1f} s in its loop, the budget"
            return None
        except Exception as error:
            if name == "eager":
                raise
            inner = getattr(error, "inner_exception", error)
            first = (str(inner).strip().splitlines() or [""])[0]
            row.note = f"failed: {type(inner).__name__}: {first}"[:200]
            return None
        row.note = peers.NOTES.get(name, "")
        if name == "torch.compile" and clock.tokens:
            row.note = OPAQUE
        if name == "tttc" and clock.tokens:
            row.note = "a scan in it runs eagerly"
        return model, max(1, int(SHORTEST / max(estimate, 1e-6)))

    def compare(self, rows: dict[str, Row]) -> str:
        """Fill in the errors; says what they are measured against."""

        model = self.model
        if isinstance(model, nn.Module):
            model = copy.deepcopy(model).to(torch.float64)
        args, kwargs = pytree.tree_map(_to_float64, (self.args, self.kwargs))
        try:
            with _tracing.before_each_token(Clock(self.budget)):
                expected = self.call(model, args, kwargs)
            reference = "the naive loop in float64"
        except OutOfTime:
            compiled = compile(model, backend="torch", mini_batch_size=self.mini_batch_size)
            expected = self.call(compiled, args, kwargs)
            reference = "the compiled graph in float64 by torch operations"
        n = self.outputs if self.backward else len(expected)
        for name, got in self.results.items():
            if name in peers.NOTES:  # another model: nothing to compare with
                continue
            errors = [relative_error(x, y) for x, y in zip(got, expected, strict=True)]
            rows[name].error = max(errors[:n], default=0.0)
            rows[name].gradient_error = max(errors[n:], default=None)
        return reference


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [
        x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor) and x.is_floating_point()
    ]


def _to_float64(x: Any) -> Any:
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.detach().to(torch.float64).requires_grad_(x.requires_grad)
    return x


def has_compiler() -> bool:
    """Whether TorchInductor has a C++ compiler here."""
    wanted = [os.environ.get("CXX"), "g++", "clang++", "cl"]
    return any(name and shutil.which(name) for name in wanted)


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _triton() -> str:
    import triton

    return triton.__version__
