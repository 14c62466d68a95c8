"""``tttc.benchmark``: eager, torch.compile, tttc and its peers in turn, on the same inputs."""

from __future__ import annotations

import copy
import datetime
import json
import math
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tttc import _tracing
from tttc._checks import check_positive
from tttc.compiler import CompiledModule, compile
from tttc.progress import doing
from tttc.report import peers
from tttc.report.limits import without_recompile_limit
from tttc.report.scans import relative_error
from tttc.report.sweep import AXES, MINI_BATCH, SweepResult, check_sweep, resized, run_sweep

CONTENDERS = ("eager", "torch.compile", "tttc")
EVERYONE = (*CONTENDERS, peers.ATTENTION, peers.FLA)
SHORTEST = 5e-3  # seconds a sample takes at least: short calls are repeated inside it
OPAQUE = "the loop inside tttc.scan is opaque to it"


class OutOfTime(Exception):
    """A naive loop used up its share of the time."""


@dataclass
class Row:
    """One way to run the model. Times in seconds; memory in bytes above what was held before."""

    name: str
    times: list[float] = field(default_factory=list)
    first_call: float | None = None  # compilation included
    peak_memory: int | None = None
    error: float | None = None  # of outputs against float64, relative to the largest value
    gradient_error: float | None = None
    at_least: float | None = None  # where it was stopped: it takes longer than this
    note: str = ""

    @property
    def median(self) -> float | None:
        """The median time of a call."""
        return statistics.median(self.times) if self.times else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """The fastest and the slowest call."""
        return (min(self.times), max(self.times)) if self.times else None


@dataclass
class BenchmarkResult:
    """What :func:`benchmark` measured; ``print`` shows a table."""

    rows: list[Row]
    inputs: list[str]
    backward: bool
    device: str
    reference: str
    threads: int
    versions: dict[str, str]
    date: str

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"row: expected one of {', '.join(r.name for r in self.rows)}, got {name!r}")

    def speed_up(self, name: str) -> tuple[float, bool] | None:
        """How many times faster than eager, and whether that is only a lower bound (eager was stopped)."""
        eager, row = self.rows[0], self[name]
        if row.median is None or eager.name != "eager":
            return None
        if eager.median is not None:
            return eager.median / row.median, False
        return None if eager.at_least is None else (eager.at_least / row.median, True)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """All of it as JSON, also written to ``path`` if given."""
        text = json.dumps(asdict(self), indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def __str__(self) -> str:
        from tttc.report.render import benchmark as shown
        from tttc.report.text import plain

        return plain(*shown(self))

    def __rich__(self) -> Any:
        from rich.console import Group

        from tttc.report.render import benchmark as shown

        return Group(*shown(self))


@overload
def benchmark(
    model: Callable[..., Any], *args: Any, sweep: None = None, **rest: Any
) -> BenchmarkResult: ...
@overload
def benchmark(
    model: Callable[..., Any], *args: Any, sweep: Mapping[str, Sequence[int]], **rest: Any
) -> SweepResult: ...
def benchmark(
    model: Callable[..., Any],
    *args: Any,
    sweep: Mapping[str, Sequence[int]] | None = None,
    axes: Mapping[str, int] = AXES,
    backward: bool = False,
    backend: str | None = None,
    mini_batch_size: int | None = None,
    contenders: Sequence[str] | None = None,
    repeats: int = 10,
    budget: float = 20.0,
    check: bool = True,
    **kwargs: Any,
) -> BenchmarkResult | SweepResult:
    """Time a model run eagerly (the naive loop), by ``torch.compile`` and by tttc, interleaved, on the same inputs.

    Where the model has TTT layers of :mod:`tttc.nn`, peers join: causal attention in their place, and
    flash-linear-attention's kernel where it is installed and can run.

    Args:
        model: an ``nn.Module`` or function, compiled or not.
        args, kwargs: what it is called with.
        sweep: sizes to measure at, ``{"T": [512, 1024], "mini_batch_size": [16, 64]}``: every combination. The
            tensors of ``args`` and ``kwargs`` are cut, or repeated, along the axes that ``axes`` names. Errors are
            those against the model as it stands, so a mini-batch size shows what the approximation costs.
        axes: which axis of the inputs each size is, ``{"B": 0, "T": 1}``; a tensor without it stays as it is.
        backward: also take gradients of the parameters and the floating inputs.
        backend, mini_batch_size: as for :func:`tttc.compile`.
        contenders: which of "eager", "torch.compile", "tttc", "attention", "flash-linear-attention"; None for all
            that apply.
        repeats: timed samples of each.
        budget: seconds each contender may take for them. A naive loop that needs longer for one call is stopped;
            its row then says that it takes longer than that.
        check: compare outputs (and gradients) with the naive loop in float64. Where that takes longer than
            ``budget`` the reference is the compiled graph in float64, which agrees with the naive loop to 1e-9 in
            the tests; the result says which it was.

    Returns:
        A :class:`BenchmarkResult`; a contender that fails says so in its row. With ``sweep`` a
        :class:`~tttc.report.sweep.SweepResult`, which saves JSON and pictures (``to_json``, ``to_png``).

    Raises:
        ValueError, TypeError: naming the argument; whatever the model raises when it is run eagerly.

    Example:
        >>> import torch, tttc
        >>> layer = tttc.nn.TTTLinear(32, num_heads=2)
        >>> r = tttc.benchmark(layer, torch.randn(1, 64, 32), contenders=["eager", "tttc"], repeats=3)
        >>> r["tttc"].median < r["eager"].median
        True
        >>> s = tttc.benchmark(layer, torch.randn(1, 64, 32), sweep={"T": [32, 64]}, contenders=["tttc"], repeats=1)
        >>> [p.sizes for p in s.points]
        [{'T': 32}, {'T': 64}]
    """
    check_positive(repeats, "repeats")
    if not budget > 0:
        raise ValueError(f"budget: expected more than 0 seconds, got {budget!r}")
    if isinstance(contenders, str):
        contenders = [contenders]
    if contenders is not None and (not contenders or any(c not in EVERYONE for c in contenders)):
        raise ValueError(f"contenders: expected some of {', '.join(EVERYONE)}, got {contenders!r}")
    if isinstance(model, CompiledModule):
        options = model._tttc_options
        model, backend = model._tttc_module, backend or options.backend
        mini_batch_size = mini_batch_size or options.mini_batch_size

    def measure(args: Any, kwargs: Any, size: int | None) -> BenchmarkResult:
        run = _Run(model, args, kwargs, backward, backend or "auto", size, budget)
        there = [*CONTENDERS, *peers.applicable(model, run.device)]
        names = there if contenders is None else [c for c in EVERYONE if c in contenders]
        with without_recompile_limit():
            return run.all(names, repeats, check)

    if sweep is None:
        return measure(args, kwargs, mini_batch_size)
    check_sweep(sweep, axes)

    def point(sizes: dict[str, int]) -> tuple[int, BenchmarkResult]:
        made_args, made_kwargs = resized((args, kwargs), axes, sizes)
        tensors = [x for x in pytree.tree_leaves((made_args, made_kwargs)) if _is_tensor(x)]
        tokens = tokens_of(tensors, axes)
        return tokens, measure(made_args, made_kwargs, sizes.get(MINI_BATCH, mini_batch_size))

    return run_sweep(sweep, point)


class _Clock:
    """Stops naive loops that run for longer than a budget, from their first token on."""

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.tokens = 0
        self.restart()

    def restart(self) -> None:
        self.start: float | None = None

    def spent(self) -> float:
        return 0.0 if self.start is None else time.perf_counter() - self.start

    def __call__(self) -> None:
        self.tokens += 1
        if self.start is None:
            self.start = time.perf_counter()
        if self.spent() > self.budget:
            raise OutOfTime


class _Run:
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
        if self.device.type == "cpu" and not _has_compiler():
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
            _device_name(self.device),
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
        clock = _Clock(self.budget)
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
            with _tracing.before_each_token(_Clock(self.budget)):
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


def tokens_of(tensors: Sequence[torch.Tensor], axes: Mapping[str, int]) -> int:
    """How many tokens inputs hold over the whole batch: the axes B and T of the first tensor that has them."""
    wanted = [axes[n] for n in ("B", "T") if n in axes]
    for x in tensors:
        if x.ndim > max(wanted, default=0):
            return math.prod(x.shape[i] for i in wanted)
    return 1


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [
        x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor) and x.is_floating_point()
    ]


def _to_float64(x: Any) -> Any:
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.detach().to(torch.float64).requires_grad_(x.requires_grad)
    return x


def _has_compiler() -> bool:
    wanted = [os.environ.get("CXX"), "g++", "clang++", "cl"]
    return any(name and shutil.which(name) for name in wanted)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _triton() -> str:
    import triton

    return triton.__version__
