"""The Triton backend of a scan: which kernels a call takes, on which tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from tttc.codegen.heuristics import default_schedule, processors
from tttc.codegen.kernel import Kernel
from tttc.codegen.loop import Loop, anchors_read, constant_tensors, scan_loop
from tttc.codegen.schedule import Schedule
from tttc.codegen.torch_scan import run_program, squeeze_features
from tttc.codegen.triton_loop import render
from tttc.ir.errors import KernelTooLarge
from tttc.ir.program import Program
from tttc.passes.prune_state import live_states
from tttc.runtime.launch import Launch, launch

Tensor = torch.Tensor
Launcher = Callable[[Launch], None]
_lock = threading.Lock()


def scan_kernel(
    program: Program,
    part: str,
    states: bool = True,
    schedule: Schedule | None = None,
    save: tuple[int, ...] = (),
    many: bool = False,
) -> Kernel:
    """One kernel of a program, rendered once.

    Args:
        part: "full" (all mini-batches), "recurrence" and "outputs" (the same in two), "continued" (one
            mini-batch from any carry) or "tokens" (token after token).
        states: whether final states are wanted.
        schedule: None for the one chosen for the part, else the default.
        save: state leaves to store at every mini-batch.
        many: whether there are at least two programs for each multiprocessor, which the default depends on.

    Raises:
        NotLowerable: where an operator has no Triton form.
    """
    with _lock:
        schedule = schedule or program.schedules.get(part)
        key = (part, states, save, schedule or many)
        if key not in program.kernels:
            loop = _loop(program, part, states, save)
            program.kernels[key] = render(loop, schedule or default_schedule(loop, many))
        return program.kernels[key]


def is_split(program: Program) -> bool:
    """Whether the schedule chosen for the full mini-batches makes states and outputs apart."""
    chosen = program.schedules.get("full")
    return chosen is not None and chosen.split


def _loop(program: Program, part: str, states: bool, save: tuple[int, ...] = ()) -> Loop:
    body = {"tokens": program.token, "continued": program.continued}.get(part, program.full)
    assert body is not None
    b, name = program.mini_batch_size, f"scan_{part}"
    wanted = range(body.states) if states else save
    live = live_states(body, wanted, range(len(body.results) - body.states))
    if part == "outputs":
        return scan_loop(name, body, b, live, states=False, parallel=True, store_state=False)
    if part == "recurrence":
        read = anchors_read(_loop(program, "outputs", False))
        stored = {*read, *save}
        return scan_loop(name, body, b, live, outputs=False, save=stored, store_state=states)
    continued = part == "continued"
    return scan_loop(name, body, b, live, save=set(save), continued=continued, store_state=states)


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
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Scan by kernels; arguments and results as :func:`tttc.codegen.torch_scan.run_program`.

    Tokens keep their dtypes. Outputs are laid out ``[B, T, H, ...]`` in memory, as projections take them.
    ``states=False`` leaves the states out; the lists are then empty. ``launcher`` gets every launch there is:
    one that only records them, on meta tensors, tells what a call would run. ``save`` has a tensor
    ``[B, H, N, ...]`` for each state leaf to store at every mini-batch that starts at its anchor.
    """
    batch, heads, length = tokens[0].shape[:3]
    shapes = [x.shape for x in anchor]
    many = batch * heads >= 2 * processors(anchor[0].device)
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
        stored = tuple(save or ()) if part in ("full", "recurrence", "tokens") else ()
        kernel = scan_kernel(program, part, states, save=stored, many=many)
        given = dict(named)
        given |= {f"token_{i}": x[:, :, start : start + count] for i, x in enumerate(rows)}
        given |= {f"output_{i}": x[:, :, start : start + count] for i, x in enumerate(results)}
        given |= {f"anchor_{i}": x for i, x in enumerate(now_anchor)}
        given |= {f"carry_{i}": x for i, x in enumerate(now_carry)}
        made = {
            name: torch.empty_like(given[name[4:]], memory_format=torch.contiguous_format)
            for name, _ in kernel.config["arguments"]
            if name.startswith("new_")
        }
        batches = -(-count // program.mini_batch_size)
        if part == "recurrence":
            for index, products in anchors_read(_loop(program, "outputs", False)).items():
                # What only matrix products read is saved as they read it.
                x = now_anchor[index]
                narrow = products and output_dtype.itemsize < x.dtype.itemsize
                shape = (*x.shape[:2], batches, *x.shape[2:])
                empty = x.new_empty(shape, dtype=output_dtype if narrow else x.dtype)
                saved.setdefault(f"saved_anchor_{index}", empty)
        grid = (batch * heads, batches) if part == "outputs" else (batch * heads,)
        tensors = {**given, **made, **saved}
        try:
            launcher(Launch(kernel, tensors, grid, count, heads, place, output_dtype))
        except KernelTooLarge:
            if part != "continued":
                raise
            by_operations(start, count, place)
            return
        if not states:
            return
        new = "new_anchor_" if part in ("full", "recurrence") else "new_carry_"
        now_carry = [made.get(f"{new}{i}", x) for i, x in enumerate(now_carry)]
        if part == "tokens":
            now_anchor = [made.get(f"new_anchor_{i}", x) for i, x in enumerate(now_anchor)]
        if (place + count) % program.mini_batch_size == 0:
            now_anchor = now_carry

    if program.sequential:
        run("tokens", 0, length, place, states)
    else:
        b = program.mini_batch_size
        start = min((-place) % b, length)
        # A mini-batch that stays unfinished leaves its anchor as state: it is run by itself.
        whole = (length - start) // b * b if states else length - start
        rest = length - start - whole
        if start:
            run("continued", 0, start, place, states or whole > 0)
        if whole and is_split(program):
            run("recurrence", start, whole, 0, states)
            run("outputs", start, whole, 0, False)
        elif whole:
            run("full", start, whole, 0, states)
        if rest:
            for i in save or {}:
                saved[f"saved_anchor_{i}"][:, :, -1] = now_carry[i]
            run("continued", start + whole, rest, 0, states)
    if not states:
        return [], [], outputs
    return (
        [x.reshape(s) for x, s in zip(now_anchor, shapes, strict=True)],
        [x.reshape(s) for x, s in zip(now_carry, shapes, strict=True)],
        outputs,
    )
