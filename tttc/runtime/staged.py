"""Running a loop as the kernels it is made of: what passes between them is allocated here."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from tttc.codegen.kernel import Kernel
from tttc.codegen.loop import Loop, only_products_read
from tttc.codegen.render import render
from tttc.codegen.schedule import Schedule
from tttc.codegen.stages import stages
from tttc.ir.build import dims_of
from tttc.runtime.chunked import Chunked, run_chunked
from tttc.runtime.launch import Launch, compile_ahead, launch
from tttc.runtime.saved_states import empty_states

Tensor = torch.Tensor
Launcher = Callable[[Launch], None]
PASSED = 1 << 30  # bytes between kernels that are there at a time, about


@dataclass(frozen=True)
class Staged:
    """The kernels of a loop, in the order they run.

    Attributes:
        kernels: one a stage.
        narrow: the tensors that pass between kernels in the dtype of the tokens.
        saved: shapes of the states stored for a later kernel, ``[B, H, N, ...]`` without the leading axes.
    """

    kernels: tuple[Kernel, ...]
    narrow: frozenset[str]
    saved: Mapping[str, tuple[int, ...]]


def tensor_name(kind: str, name: str) -> str:
    """The argument of a kernel that holds a source."""
    return f"saved_{name}" if kind == "saved" else name


def narrow_sources(loop: Loop) -> set[str]:
    """The tensors of saved states and values that only matrix products read."""
    return {
        tensor_name(s.kind, s.name)
        for n, s in loop.sources.items()
        if s.kind in ("saved", "value") and only_products_read(loop, n)
    }


def staged(loop: Loop, count: int, schedule: Callable[[Loop], Schedule]) -> Staged:
    """The kernels of a loop in ``count`` stages, each under the schedule that ``schedule`` gives its own loop.

    Raises:
        NotLowerable: where an operator has no Triton form.
    """
    parts = stages(loop, count)
    chosen = [schedule(part) for part in parts]
    kernels = tuple(render(part, s) for part, s in zip(parts, chosen, strict=True))
    read = {
        tensor_name(s.kind, s.name)
        for part in parts
        for s in part.sources.values()
        if s.kind in ("saved", "value")
    }
    narrow = any(its.narrow for its in chosen)  # all kernels take what one of them asks for
    wide = {
        tensor_name(s.kind, s.name)
        for part in parts
        for n, s in part.sources.items()
        if s.kind in ("saved", "value")
        and not (narrow and len(dims_of(n)) > 1)
        and not only_products_read(part, n)
    }
    given = {s.name for s in loop.sources.values() if s.kind == "saved"}
    shapes = {
        f"saved_{s.name}": tuple(part.sizes[d] for d in dims_of(n))
        for part in parts
        for n, s in part.sources.items()
        if s.kind == "saved" and s.name not in given
    }
    return Staged(kernels, frozenset(read - wide), shapes)


def mini_batches_at_once(
    made: Staged | Chunked,
    given: Collection[str],
    heads: int,
    mini_batches: int,
    dtype: torch.dtype,
) -> int:
    """The mini-batches of ``heads`` sequences that kernels run together: as many as pass about :data:`PASSED` bytes.

    ``given``: the tensors that are there for all mini-batches.
    """
    if isinstance(made, Chunked):
        return mini_batches
    passed = dict(made.saved)
    for kernel in made.kernels:
        passed |= kernel.config["values"]
    each = sum(
        math.prod(shape) * (dtype if name in made.narrow else torch.float32).itemsize
        for name, shape in passed.items()
        if name not in given
    )
    pieces = max(round(heads * mini_batches * each / PASSED), 1)
    return -(-mini_batches // pieces)


def in_words(x: Tensor, step: int) -> Tensor:
    """The tensor so that its numbers can be copied by words of four bytes, :mod:`tttc.codegen.words`.

    In float32, if it has to be: numbers of two bytes come with their neighbours where all mini-batches, ``step`` along the third axis from each other, begin
    alike. What is repeated is computed once.
    """
    two_bytes = x.dtype in (torch.bfloat16, torch.float16)
    if x.dtype == torch.float32 or (two_bytes and x.stride(2) * step % 2 == 0):
        return x
    once = x
    for axis, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if stride == 0 and size > 1:
            once = once.narrow(axis, 0, 1)
    return once.to(torch.float32).expand(x.shape)


def run_staged(
    made: Staged | Chunked,
    tensors: Mapping[str, Tensor],
    batch: int,
    heads: int,
    length: int,
    place: int,
    dtype: torch.dtype,
    launcher: Launcher,
) -> dict[str, Tensor]:
    """Launch the kernels of a loop one after another.

    Returns the new states (``new_<state>``, ``[B, H, ...]``) and sums over mini-batches (``[B, H, ...]``) by name.
    """
    if isinstance(made, Chunked):
        return run_chunked(made, tensors, batch, heads, length, dtype, launcher)
    launches, results = staged_launches(made, tensors, batch, heads, length, place, dtype)
    compiled_ahead(made, launches, launcher)
    for call in launches:
        launcher(call)
    return added_up(made, results)


def staged_launches(
    made: Staged,
    tensors: Mapping[str, Tensor],
    batch: int,
    heads: int,
    length: int,
    place: int,
    dtype: torch.dtype,
) -> tuple[list[Launch], dict[str, Tensor]]:
    """The launches of the kernels of a loop, and the results they write.

    ``tensors``: by argument; what passes between kernels, new states and sums are made here.
    """
    have = dict(tensors)
    device = next(iter(tensors.values())).device
    mini_batches = -(-length // made.kernels[0].config["mini_batch_size"])
    results: dict[str, Tensor] = {}
    launches: list[Launch] = []

    def kind(name: str, *, wide: bool = False) -> torch.dtype:
        return dtype if name in made.narrow and not wide else torch.float32

    def empty(name: str, shape: tuple[int, ...], *, wide: bool = False) -> Tensor:
        return torch.empty(shape, dtype=kind(name, wide=wide), device=device)

    for name, shape in made.saved.items():
        if name not in have:
            have[name] = empty_states((batch, heads, mini_batches), shape, kind(name), device)
    for kernel in made.kernels:
        config = kernel.config
        programs = -(-mini_batches // config["schedule"].group) if config["parallel"] else 1
        for name, shape in config["values"].items():
            if name not in have:
                have[name] = empty(name, (batch, heads, mini_batches, *shape))
        for name, shape in config["new"].items():
            results[name] = have[name] = empty(name, (batch, heads, *shape), wide=True)
        for name, shape in config["sums"].items():
            lead = (batch, heads, programs) if config["parallel"] else (batch, heads)
            results[name] = have[name] = empty(name, (*lead, *shape), wide=True)
        given = have | {name: in_words(have[name], step) for name, step in config["words"].items()}
        grid = (batch * heads, programs)
        launches.append(Launch(kernel, given, grid, length, heads, place, dtype))
    return launches, results


def compiled_ahead(made: Staged, launches: Sequence[Launch], launcher: Launcher) -> None:
    """Before the first launches, compile their kernels beside each other."""
    device, last = launches[0].device, made.kernels[-1]
    new = not (last.compiled or last.refused)
    if device.type == "cuda" and launcher is launch and new:
        for call in launches:
            compile_ahead(call, device)


def added_up(made: Staged, results: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The results, sums of programs that ran in parallel added up."""
    parallel = {n for k in made.kernels if k.config["parallel"] for n in k.config["sums"]}
    return {name: x.sum(2) if name in parallel else x for name, x in results.items()}
