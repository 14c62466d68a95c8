"""``tttc.benchmark``: eager, torch.compile, tttc and its peers in turn, on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from torch.utils import _pytree as pytree

from tttc._checks import check_positive
from tttc.compiler import CompiledModule
from tttc.report import peers
from tttc.report.limits import without_recompile_limit
from tttc.report.measurement import Measurement
from tttc.report.results import BenchmarkResult
from tttc.report.sweep import AXES, MINI_BATCH, SweepResult, check_sweep, resized, run_sweep

CONTENDERS = ("eager", "torch.compile", "tttc")
EVERYONE = (*CONTENDERS, peers.ATTENTION, peers.FLA)


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
        run = Measurement(model, args, kwargs, backward, backend or "auto", size, budget)
        there = [*CONTENDERS, *peers.applicable(model, run.device)]
        names = there if contenders is None else [c for c in EVERYONE if c in contenders]
        with without_recompile_limit():
            return run.all(names, repeats, check)

    if sweep is None:
        return measure(args, kwargs, mini_batch_size)
    check_sweep(sweep, axes)

    def point(sizes: dict[str, int]) -> tuple[int, BenchmarkResult]:
        made_args, made_kwargs = resized((args, kwargs), axes, sizes)
        tensors = [
            x for x in pytree.tree_leaves((made_args, made_kwargs)) if isinstance(x, torch.Tensor)
        ]
        tokens = tokens_of(tensors, axes)
        return tokens, measure(made_args, made_kwargs, sizes.get(MINI_BATCH, mini_batch_size))

    return run_sweep(sweep, point)


def tokens_of(tensors: Sequence[torch.Tensor], axes: Mapping[str, int]) -> int:
    """How many tokens inputs hold over the whole batch: the axes B and T of the first tensor that has them."""
    wanted = [axes[n] for n in ("B", "T") if n in axes]
    for x in tensors:
        if x.ndim > max(wanted, default=0):
            return math.prod(x.shape[i] for i in wanted)
    return 1
