"""What the rules share when they run as scripts: small inputs, and a comparison with the naive loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

import tttc


class Example(NamedTuple):
    """The arguments of a scan: state ``[H, ...]``, tokens ``[B, H, T, ...]``, parameters ``[H, ...]``."""

    init: Any
    tokens: Any
    shared: Any
    mini_batch_size: int


class Normal:
    """Random float64 numbers, the same at every run: ``normal(2, 3)`` is ``[2, 3]``."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 0.5) -> torch.Tensor:
        return scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def gate(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """Numbers between ``low`` and ``high``."""
        return low + (high - low) * torch.sigmoid(2.0 * self(*shape, scale=1.0))


def results(scan: Callable[..., Any], example: Example) -> dict[str, list[torch.Tensor]]:
    """States, outputs and the gradients of all arguments."""
    leaves, spec = pytree.tree_flatten(example[:3])
    leaves = [
        x if x is None else x.detach().clone().requires_grad_(x.is_floating_point()) for x in leaves
    ]
    state, z = scan(*pytree.tree_unflatten(leaves, spec))
    leaves = [x for x in leaves if x is not None and x.requires_grad]
    named = {"state": pytree.tree_leaves(state.carry), "output": pytree.tree_leaves(z)}
    flat = [x for xs in named.values() for x in xs if x.requires_grad]
    # A sum with weights that differ, so that no gradient cancels by symmetry.
    total = sum((x * torch.linspace(0.5, 1.5, x.numel()).view(x.shape).to(x)).sum() for x in flat)
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return {k: [x.detach() for x in xs] for k, xs in named.items()} | {"gradient": list(gradients)}


def errors(
    expected: dict[str, list[torch.Tensor]], got: dict[str, list[torch.Tensor]]
) -> dict[str, float]:
    """The largest difference of each kind, relative to the largest value of its tensor where that exceeds 1."""

    def error(x: torch.Tensor, y: torch.Tensor) -> float:
        found = float((x.double() - y.double()).abs().max()) / max(1.0, float(x.abs().max()))
        return (
            found if math.isfinite(found) else math.inf
        )  # which is larger than any other, as nan is not

    return {
        k: max(error(x, y) for x, y in zip(xs, got[k], strict=True)) for k, xs in expected.items()
    }


def run(step: Callable[..., Any], example: Example) -> None:
    """Compile a rule, forward and backward, and print how long it takes and how far it is from the naive loop."""

    def scan(init: Any, tokens: Any, shared: Any) -> Any:
        return tttc.scan(step, init, tokens, example.mini_batch_size, shared=shared)

    def timed() -> tuple[float, dict[str, list[torch.Tensor]]]:
        torch._dynamo.reset()
        start = time.perf_counter()
        got = results(tttc.compile(scan, strict=True), example)
        return time.perf_counter() - start, got

    cold, _ = timed()
    warm, got = timed()
    print(f"first forward and backward, from nothing:       {cold:.1f} s")
    print(f"again, the step known to the process:           {warm:.1f} s")
    for kind, error in errors(results(scan, example), got).items():
        print(f"largest error of {kind + 's':<10} against the naive loop: {error:.1e} (float64)")
