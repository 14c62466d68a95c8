"""The Triton backend of a scan: which kernels a call takes, on which tensors."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from tttc.codegen.heuristics import crowding, default_schedule
from tttc.codegen.loop import Loop, constant_tensors, scan_loop
from tttc.codegen.schedule import Schedule
from tttc.codegen.torch_scan import run_program, squeeze_features
from tttc.ir.errors import KernelTooLarge
from tttc.ir.program import Program
from tttc.passes.prune_state import live_states
from tttc.runtime.chunked import Chunked, chunked, is_tall, programs_a_tile
from tttc.runtime.launch import launch
from tttc.runtime.staged import Launcher, Staged, run_staged, staged

Tensor = torch.Tensor
_lock = threading.Lock()


def scan_kernels(
    program: Program,
    part: str,
    states: bool = True,
    schedule: Schedule | None = None,
    save: tuple[int, ...] = (),
    crowd: int = 1,
    interval: int = 1,
    split: int = 1,
) -> Staged | Chunked:
    """The kernels of a part of a program, rendered once.

    Args:
        part: "full" (all mini-batches), "continued" (one mini-batch from any carry) or "tokens" (token after
            token).
        states: whether final states are wanted.
        schedule: None for the one chosen for the part, else the default.
        save: state leaves to store at every ``interval``-th mini-batch.
        crowd: how full the device is of programs (:func:`tttc.codegen.heuristics.crowding`), which the default
            depends on.
        interval: of the mini-batches at which states are stored.
        split: programs that share a tile, where tokens are tall ones (:mod:`tttc.runtime.chunked`).

    Raises:
        NotLowerable: where an operator has no Triton form.
    """
    with _lock:
        schedule = schedule or program.schedules.get(part)
        key = (part, states, save, interval, schedule or crowd, split if is_tall(program) else 1)
        if key not in program.kernels:
            loop = _loop(program, part, states, save, interval)
            if part == "tokens" and (made := chunked(loop, split)) is not None:
                program.kernels[key] = made
                return made
            # Outputs made in parallel need the state of every mini-batch.
            count = 1 if interval > 1 else (schedule or default_schedule(loop, crowd)).stages
            program.kernels[key] = staged(
                loop,
                count,
                lambda stage: schedule or default_schedule(stage, crowd),
            )
        return program.kernels[key]


def _loop(
    program: Program, part: str, states: bool, save: tuple[int, ...] = (), interval: int = 1
) -> Loop:
    body = {"tokens": program.token, "continued": program.continued}.get(part, program.full)
    assert body is not None
    wanted = range(body.states) if states else save
    live = live_states(body, wanted, range(len(body.results) - body.states))
    return scan_loop(
        f"scan_{part}",
        body,
        program.unit,
        live,
        save=set(save),
        interval=interval,
        continued=part == "continued",
        store_state=states,
    )


def run_kernels(
    program: Program,
    anchor: Sequence[Tensor],
    carry: Sequence[Tensor],
    tokens: Sequence[Tensor],
    shared: Sequence[Tensor],
    place: int,
    output_dtype: torch.dtype,
    states: bool = True,
    launcher: Launcher = launch,
    save: dict[int, Tensor] | None = None,
    interval: int = 1,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Scan by kernels; arguments and results as :func:`tttc.codegen.torch_scan.run_program`.

    Tokens keep their dtypes. Outputs are laid out ``[B, T, H, ...]`` in memory, as projections take them.
    ``states=False`` leaves the states out; the lists are then empty. ``launcher`` gets every launch there is:
    one that only records them, on meta tensors, tells what a call would run. ``save`` has a tensor
    ``[B, H, N, ...]`` for each state leaf to store at every mini-batch that starts at its anchor.
    """
    batch, heads, length = tokens[0].shape[:3]
    shapes = [x.shape for x in anchor]
    crowd = crowding(batch * heads, -(-length // program.unit), anchor[0].device)
    split = programs_a_tile(batch * heads, anchor[0].device)
    named: dict[str, Tensor] = constant_tensors(program.token, anchor[0].device)
    named |= {f"shared_{i}": squeeze_features(x, 1) for i, x in enumerate(shared)}
    now_anchor = [squeeze_features(x, 2) for x in anchor]
    now_carry = [squeeze_features(x, 2) for x in carry] if carry else now_anchor
    rows = [squeeze_features(x, 3) for x in tokens]
    outputs = [
        torch.empty(
            batch, length, heads, *shape, dtype=output_dtype, device=tokens[0].device
        ).transpose(1, 2)
        for shape in program.token.output_shapes
    ]
    results = [squeeze_features(x, 3) for x in outputs]

    carried = "carry" if program.sequential else "anchor"
    saved = {f"saved_{carried}_{i}": squeeze_features(x, 3) for i, x in (save or {}).items()}

    def by_operations(start: int, count: int, place: int) -> None:
        """A part of a mini-batch by torch operations: too small a share for its kernel's size to matter."""
        nonlocal now_anchor, now_carry
        part_tokens = [x[:, :, start : start + count] for x in rows]
        now_anchor, now_carry, z = run_program(
            program, now_anchor, now_carry, part_tokens, shared, place
        )
        for x, y in zip(results, z, strict=True):
            x[:, :, start : start + count] = squeeze_features(y, 3)

    def run(part: str, start: int, count: int, place: int, states: bool) -> None:
        nonlocal now_anchor, now_carry
        stored = tuple(save or ()) if part in ("full", "tokens") else ()
        kernels = scan_kernels(
            program, part, states, save=stored, crowd=crowd, interval=interval, split=split
        )
        given = named | saved
        given |= {f"token_{i}": x[:, :, start : start + count] for i, x in enumerate(rows)}
        given |= {f"output_{i}": x[:, :, start : start + count] for i, x in enumerate(results)}
        given |= {f"anchor_{i}": x for i, x in enumerate(now_anchor)}
        given |= {f"carry_{i}": x for i, x in enumerate(now_carry)}
        try:
            made = run_staged(kernels, given, batch, heads, count, place, output_dtype, launcher)
        except KernelTooLarge:
            if part != "continued":
                raise
            by_operations(start, count, place)
            return
        if not states:
            return
        new = "new_anchor_" if part == "full" else "new_carry_"
        now_carry = [made.get(f"{new}{i}", x) for i, x in enumerate(now_carry)]
        if part == "tokens":
            now_anchor = [made.get(f"new_anchor_{i}", x) for i, x in enumerate(now_anchor)]
        if (place + count) % program.mini_batch_size == 0:
            now_anchor = now_carry

    if program.sequential:
        run("tokens", 0, length, place, states)
    else:
        b = program.unit
        start = min((-place) % b, length)
        # A mini-batch that stays unfinished leaves its anchor as state: it is run by itself.
        alone = states and program.continued is not None
        whole = (length - start) // b * b if alone else length - start
        rest = length - start - whole
        if start:
            run("continued", 0, start, place, states or whole > 0)
        if whole:
            run("full", start, whole, 0, states)
        if rest:
            begun, offset = divmod(whole // b, interval)
            for i in save or {} if offset == 0 else ():
                saved[f"saved_anchor_{i}"][:, :, begun] = now_carry[i]
            run("continued", start + whole, rest, 0, states)
    if not states:
        return [], [], outputs
    return (
        [x.reshape(s) for x, s in zip(now_anchor, shapes, strict=True)],
        [x.reshape(s) for x, s in zip(now_carry, shapes, strict=True)],
        outputs,
    )
