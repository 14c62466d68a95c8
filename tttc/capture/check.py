"""A re-rolled loop against the loop itself, on small random numbers: what was proved on graphs, shown on values."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from tttc import _tracing
from tttc.capture.layout import Joined
from tttc.capture.places import Copier
from tttc.ir.errors import NotLowerable

Env = dict[str, Any]
_log = logging.getLogger(__name__)
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
_SEED = 0


def check_run(
    run: Callable[[Any, Any], Any],
    body: Callable[..., Env],
    env: Env,
    names: list[str],
    inputs: list[str],
    results: list[str],
    kept: list[str],
    shapes: dict[str, tuple[int, ...]],
    bounds: tuple[int, int, int],
) -> None:
    """Run a few iterations of a loop, and what stands in its place, in float64 on the CPU.

    Args:
        run: what stands in its place.
        results: the variables it gives.
        kept: those that the loop may change in place, but binds to nothing else.
        body: one iteration: the loop variable and the variables in, the variables out.
        env: the variables before the loop; their tensors need no values.
        shapes: of tensors that shall have another shape here, by place.

    Raises:
        NotLowerable: where results differ, with the variable that does.
    """
    with _disable_current_modes(), _tracing.use_backend(None), torch.enable_grad():
        try:
            expected = _values(env, shapes)
            for n in range(*bounds):
                bound = {name: expected.get(name, ...) for name in names}
                after = body(n, **bound)
                expected |= {k: v for k, v in after.items() if k in names}
        except (
            Exception
        ) as error:  # of other sizes, or in another dtype, a program may not run at all
            _log.info("a re-rolled loop was not compared with the loop itself: %r", error)
            return
        given = _values(env, shapes)
        out = run(bounds, tuple(given[name] for name in inputs))
        for name, x in zip(results, out, strict=True):
            given[name] = x
        dtype = _narrowest(env)
        for name in dict.fromkeys((*results, *kept)):
            want, got = _tensors(expected.get(name)), _tensors(given.get(name))
            if len(want) != len(got) or not all(
                _close(x, y, dtype) for x, y in zip(want, got, strict=True)
            ):
                raise NotLowerable(f"{name} comes out otherwise than by the loop itself")


def _values(env: Env, shapes: dict[str, tuple[int, ...]]) -> Env:
    """The variables with random numbers, the same at every call."""
    generator = torch.Generator().manual_seed(_SEED)
    made: dict[int, torch.Tensor] = {}

    def value(path: str, x: torch.Tensor) -> torch.Tensor:
        if id(x) not in made:
            shape = shapes.get(path, tuple(x.shape))
            if x.is_floating_point():
                new = 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
                new.requires_grad_()
            else:
                new = torch.zeros(shape, dtype=x.dtype)
            made[id(x)] = new
        # Copies, so that what requires gradients may be written to as in the middle of a program.
        return made[id(x)].clone() if made[id(x)].requires_grad else made[id(x)]

    copier = Copier(value)
    return {name: copier.copy(x, name) for name, x in env.items()}


def _tensors(x: Any) -> list[torch.Tensor]:
    if isinstance(x, Joined):
        return list(x.values.unbind(0))
    return [y for y in pytree.tree_leaves(x) if isinstance(y, torch.Tensor)]


def _narrowest(env: Env) -> torch.dtype:
    found: list[torch.dtype] = []

    def note(path: str, x: torch.Tensor) -> torch.Tensor:
        found.append(x.dtype)
        return x

    copier = Copier(note)
    for name, x in env.items():
        copier.copy(x, name)
    return min((d for d in found if d.is_floating_point), key=lambda d: d.itemsize)


def _close(x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> bool:
    tolerance = _TOLERANCES.get(dtype, 3e-2)
    x, y = x.detach().double(), y.detach().double()
    return x.shape == y.shape and torch.allclose(x, y, tolerance, tolerance, equal_nan=True)
