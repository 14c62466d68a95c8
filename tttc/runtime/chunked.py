"""Running a loop over tall tiles of tokens in phases: chunk after chunk, each over pieces of its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from tttc.codegen.devices import device_of
from tttc.codegen.heuristics import phase_schedule
from tttc.codegen.kernel import Kernel
from tttc.codegen.loop import Loop
from tttc.codegen.phases import TALLEST, Phases, outputs_alone, phases
from tttc.codegen.render import render
from tttc.ir.body import role
from tttc.ir.build import dims_of
from tttc.ir.program import Program
from tttc.runtime.launch import Launch, compile_ahead, launch

Tensor = torch.Tensor
ALL_WEIGHTS = 1 / 32  # what a program takes beside its rows, of what a whole tile's rows take


@dataclass(frozen=True)
class Chunked:
    """The kernels of a loop in phases.

    Attributes:
        loop: what they do together, chunk after chunk.
        made: its phases.
        kernels: of each phase, in order.
    """

    loop: Loop
    made: Phases
    kernels: tuple[Kernel, ...]


def is_tall(program: Program) -> bool:
    """Whether tokens are tiles of more rows than one program holds."""
    if program.tall is None:
        body = program.token
        by_row = ("token", "constant")
        kept = {d for p in body.placeholders if role(p)[0] not in by_row for d in dims_of(p)}
        tokens = [p for p in body.placeholders if role(p)[0] == "token"]
        program.tall = any(
            d not in kept and body.sizes[d] > TALLEST for p in tokens for d in dims_of(p)
        )
    return program.tall


def chunked(loop: Loop, split: int) -> Chunked | None:
    """The kernels of a loop over tall tiles, of each ``split`` programs; None where its tiles are not tall.

    Raises:
        NotLowerable: where rows meet otherwise than in sums, or an operator has no Triton form.
    """
    made = phases(loop)
    if made is None:
        return None

    def group(part: Loop) -> int:
        """Pieces that a program handles."""
        return max(1, -(-made.rows // part.mini_batch_size) // split)

    kernels = tuple(render(part, phase_schedule(part, group(part))) for part in made.loops)
    return Chunked(loop, made, kernels)


def programs_a_tile(heads: int, device: torch.device) -> int:
    """Programs that share a tile's rows, a power of two: as many as fill a device, ``heads`` tiles in all, and no more.

    A program takes a multiprocessor to itself, and loads all weights before its first row and stores sums of their size
    after the last; those are added up afterwards.
    """
    processors = device_of(device).processors

    def time(split: int) -> float:
        return -(-max(heads, 1) * split // processors) * (1 / split + ALL_WEIGHTS)

    return min((1 << i for i in range(8)), key=time)


def run_chunked(
    given: Chunked,
    tensors: Mapping[str, Tensor],
    batch: int,
    heads: int,
    length: int,
    dtype: torch.dtype,
    launcher: Callable[[Launch], None],
) -> dict[str, Tensor]:
    """Launch the kernels for ``length`` chunks; arguments and results as :func:`tttc.runtime.staged.run_staged`."""
    loop = given.loop
    device = next(iter(tensors.values())).device
    if device.type == "cuda" and launcher is launch and not any(k.compiled for k in given.kernels):
        for call in first_launches(given, tensors, batch, heads, length, dtype):
            compile_ahead(call, device)
    by_token = {s.name for s in loop.sources.values() if s.kind == "token"}
    by_token |= {s.name for _, s in loop.sinks if s.kind == "token"}
    by_chunk = {f"saved_{s.name}" for s in loop.sources.values() if s.kind == "saved"}
    tensors = dict(tensors)
    for source in loop.sources.values():
        if source.kind == "constant" and _by_row(given, source.name):
            x = tensors[source.name]
            tensors[source.name] = x.expand(batch, heads, *x.shape)
    states = {name: tensors[name] for name in loop.states}
    totals: dict[str, Tensor] = {}
    every = tuple(zip(given.made.loops, given.kernels, strict=True))
    alone = set(map(id, outputs_alone(given.made)))
    for step in range(length):
        n = length - 1 - step if loop.reverse else step
        for name in loop.save:
            if n % loop.interval == 0:
                tensors[f"saved_{name}"][:, :, n // loop.interval].copy_(states[name])
        have = dict(tensors) | states
        have |= {name: tensors[name][:, :, n] for name in by_token | by_chunk if name in tensors}
        last = step == length - 1 and not loop.store_state and not loop.reverse
        for part, kernel in every:
            if not last or id(part) in alone:
                _launch(part, kernel, have, given.made.rows, batch, heads, dtype, device, launcher)
        if last:
            break
        for sink, name in given.made.results.items():
            if sink.kind == "state":
                states[sink.name] = have[name]
            else:
                totals[sink.name] = totals[sink.name] + have[name] if sink.name in totals else have[name]  # fmt: skip
    return {f"new_{name}": x for name, x in states.items()} | totals


def _by_row(given: Chunked, name: str) -> bool:
    """Whether the kernels read an argument piece of rows by piece of rows."""
    return any(
        s.kind == "token" and s.name == name for p in given.made.loops for s in p.sources.values()
    )


def first_launches(
    given: Chunked,
    tensors: Mapping[str, Tensor],
    batch: int,
    heads: int,
    length: int,
    dtype: torch.dtype,
) -> list[Launch]:
    """The launches of the first chunks, none of them made: of tensors without values."""
    abstract = {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        for name, x in tensors.items()
    }
    found: list[Launch] = []
    run_chunked(given, abstract, batch, heads, min(length, 2), dtype, found.append)
    return found


def _launch(
    part: Loop,
    kernel: Kernel,
    have: dict[str, Tensor],
    rows: int,
    batch: int,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
    launcher: Callable[[Launch], None],
) -> None:
    """One kernel on one chunk; what it makes joins ``have``."""
    config = kernel.config
    grid = (batch * heads, 1)
    if part.tokens:
        grid = (batch * heads, -(-rows // (part.mini_batch_size * config["schedule"].group)))
    given = {}
    for source in part.sources.values():
        x = have[source.name]
        once = source.kind == "token" and not part.tokens
        given[source.name] = x.unsqueeze(2) if once else x
    sizes = {n: tuple(part.sizes[d] for d in n.meta["dims"] if d in part.sizes) for n, _ in part.sinks}  # fmt: skip
    for node, sink in part.sinks:
        lead = (batch, heads)
        if part.tokens and sink.kind == "token":
            given[sink.name] = have[sink.name]
            continue
        axis = grid[1] if part.tokens else 1
        given[sink.name] = torch.empty((*lead, axis, *sizes[node]), dtype=torch.float32, device=device)  # fmt: skip
        have[sink.name] = given[sink.name]
    length = rows if part.tokens else 1
    launcher(Launch(kernel, given, grid, length, heads, 0, dtype))
    for _, sink in part.sinks:
        if part.tokens and sink.kind == "token":
            continue
        x = have[sink.name]
        have[sink.name] = x.sum(2) if x.shape[2] > 1 else x.squeeze(2)
