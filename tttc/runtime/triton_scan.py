"""The Triton backend of a scan: which kernels a call takes, on which tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from tttc.codegen.heuristics import hopper
from tttc.codegen.loop import constant_tensors
from tttc.codegen.torch_scan import run_program, squeeze_features
from tttc.ir.errors import KernelTooLarge
from tttc.ir.program import Program
from tttc.runtime.chunked import Chunked, programs_a_tile
from tttc.runtime.forward_kernels import scan_kernels
from tttc.runtime.launch import launch
from tttc.runtime.segmented_scan import by_segments
from tttc.runtime.staged import Launcher, Staged, mini_batches_at_once, run_staged
from tttc.tuning.plan import setting_of
from tttc.tuning.search import Call

Tensor = torch.Tensor


def suits_gluon(
    program: Program, tokens: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether kernels for warpgroups take tokens, on a device.

    It has to be a Hopper GPU, and tiles must have the 16-bit dtype of the products and rows that can be copied 16 bytes
    at a time.
    """
    if dtype not in (torch.bfloat16, torch.float16) or not hopper(device):
        return False
    axes = 2 if program.sequential else 1  # of a token that make its tile a matrix
    matrices = [x for x in tokens if sum(n > 1 for n in x.shape[3:]) >= axes]
    return all(
        x.dtype == dtype
        and x.data_ptr() % 16 == 0
        and x.stride(-1) == 1
        and all(n % 16 == 0 for n in x.stride()[:-1])
        for x in matrices
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
    tune: bool = False,
    device: torch.device | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Scan by kernels; arguments and results as :func:`tttc.codegen.torch_scan.run_program`.

    Tokens keep their dtypes. Outputs are laid out ``[B, T, H, ...]`` in memory, as projections take them.
    ``states=False`` leaves the states out; the lists are then empty. ``launcher`` gets every launch there is:
    one that only records them, on meta tensors, tells what a call would run. ``save`` has a tensor
    ``[B, H, N, ...]`` for each state leaf to store at every mini-batch that starts at its anchor. ``tune`` searches for
    the schedules of mini-batches where none are remembered. ``device`` is what they are chosen for, None for that of
    the tensors.
    """
    batch, heads, length = tokens[0].shape[:3]
    shapes = [x.shape for x in anchor]
    mini_batches = -(-length // program.unit)
    device = device or anchor[0].device
    gluon = suits_gluon(program, tokens, output_dtype, device)
    setting = setting_of(batch * heads, mini_batches, output_dtype, device, gluon)
    split = programs_a_tile(batch * heads, device)
    named: dict[str, Tensor] = constant_tensors(program, anchor[0].device)
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

    def arguments(start: int, count: int) -> dict[str, Tensor]:
        given = dict(named)
        given |= {f"token_{i}": x[:, :, start : start + count] for i, x in enumerate(rows)}
        given |= {f"output_{i}": x[:, :, start : start + count] for i, x in enumerate(results)}
        given |= {f"anchor_{i}": x for i, x in enumerate(now_anchor)}
        given |= {f"carry_{i}": x for i, x in enumerate(now_carry)}
        return given

    def run(part: str, start: int, count: int, place: int, states: bool) -> None:
        """A part of the sequence, in pieces where too much would pass between kernels."""
        nonlocal now_anchor, now_carry
        given = arguments(start, count) | saved
        searched = tune and part != "continued" and launcher is launch
        call = Call(given, batch, heads, count, place, output_dtype) if searched else None
        stored = tuple(save or ()) if part in ("full", "tokens") else ()
        if part == "full":
            made = by_segments(program, given, batch, heads, count, setting, states, stored, interval, call, launcher)  # fmt: skip
            if made is not None:
                now_carry = [made.get(f"new_anchor_{i}", x) for i, x in enumerate(now_carry)]
                now_anchor = now_carry
                return
        kernels_of = partial(
            scan_kernels,
            program,
            part,
            save=stored,
            setting=setting,
            interval=interval,
            split=split,
        )
        kernels = kernels_of(states=states, call=call)
        if part == "continued":
            try:
                run_piece(kernels, part, given, count, place, states)
            except KernelTooLarge:
                by_operations(start, count, place)
            return
        b = program.unit if part == "full" else 1
        size = b * mini_batches_at_once(kernels, given, batch * heads, -(-count // b), output_dtype)
        if size < count:
            states = True  # the next piece starts from them
            kernels = kernels_of(states=states)
        for first in range(0, count, size):
            piece = min(size, count - first)
            given = arguments(start + first, piece)
            given |= {name: x[:, :, first // (b * interval) :] for name, x in saved.items()}
            run_piece(kernels, part, given, piece, place + first, states)

    def run_piece(
        kernels: Staged | Chunked,
        part: str,
        given: dict[str, Tensor],
        count: int,
        place: int,
        states: bool,
    ) -> None:
        nonlocal now_anchor, now_carry
        made = run_staged(kernels, given, batch, heads, count, place, output_dtype, launcher)
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
