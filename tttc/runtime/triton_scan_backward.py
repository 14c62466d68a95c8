"""The Triton backend of a scan's backward: which kernels it takes, on which tensors."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import torch

from tttc.codegen.heuristics import default_schedule
from tttc.codegen.kernel import Kernel
from tttc.codegen.loop import backward_loop, constant_tensors
from tttc.codegen.schedule import Schedule
from tttc.codegen.torch_scan import squeeze_features
from tttc.codegen.torch_scan_backward import Leaves, derive, live_cotangents
from tttc.codegen.triton_loop import render
from tttc.ir.program import Program
from tttc.runtime.launch import Launch, launch
from tttc.runtime.triton_scan import Launcher

Tensor = torch.Tensor
_lock = threading.Lock()


def backward_kernel(
    program: Program,
    part: str,
    leaves: Leaves,
    live: tuple[int, ...] | None = None,
    schedule: Schedule | None = None,
) -> Kernel:
    """The kernel of the VJP of a body ("full", "continued" or "token"), rendered once.

    ``live``: the states that have cotangents, all where None.

    Raises:
        NotLowerable: where an operator has no derivative or no Triton form.
    """
    with _lock:
        schedule = schedule or program.schedules.get(f"{part}_backward")
        key = ("backward", part, leaves, live, schedule)
        if key not in program.kernels:
            made = derive(program, part, leaves, live)
            handed_on = "anchor" if part == "full" else "carry"
            b = program.mini_batch_size
            loop = backward_loop(f"scan_{part}_backward", made, b, handed_on)
            # What is not finite makes the loss so: it is not traced token by token through cotangents.
            chosen = schedule or replace(default_schedule(loop, False), nan="ignored")
            program.kernels[key] = render(loop, chosen)
        return program.kernels[key]


def run_backward_kernels(
    program: Program,
    leaves: Leaves,
    anchor: Sequence[Tensor],
    carry: Sequence[Tensor],
    tokens: Sequence[Tensor],
    shared: Sequence[Tensor],
    place: int,
    given: tuple[Sequence[Tensor | None], Sequence[Tensor | None], Sequence[Tensor | None]],
    live: Sequence[int],
    saved: Sequence[Tensor],
    out: dict[str, Tensor],
    dtype: torch.dtype,
    launcher: Launcher = launch,
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """The cotangents of a scan's arguments, by kernels.

    Arguments and results as :func:`tttc.codegen.torch_scan_backward.run_backward`; states are ``saved`` at every
    mini-batch. ``out`` holds the tensors ``[B, H, T, ...]`` for the cotangents of the wanted tokens.
    """
    batch, heads, length = tokens[0].shape[:3]
    b = program.mini_batch_size
    named = constant_tensors(program.token, anchor[0].device)
    named |= {f"shared_{i}": squeeze_features(x, 1) for i, x in enumerate(shared)}
    now_anchor = [squeeze_features(x, 2) for x in anchor]
    now_carry = [squeeze_features(x, 2) for x in carry] if carry else now_anchor
    rows = {f"token_{i}": squeeze_features(x, 3) for i, x in enumerate(tokens)}
    rows |= {f"g{name}": squeeze_features(x, 3) for name, x in out.items()}
    for i, (x, shape) in enumerate(zip(given[2], program.token.output_shapes, strict=True)):
        if x is None:
            x = tokens[0].new_zeros((batch, heads, length, *shape))
        rows[f"goutput_{i}"] = squeeze_features(x, 3)

    def cotangent(x: Tensor | None, like: Tensor) -> Tensor:
        return torch.zeros_like(like) if x is None else x.reshape(like.shape).to(like.dtype)

    on_anchor = [
        None if x is None else cotangent(x, y) for x, y in zip(given[0], now_anchor, strict=True)
    ]
    on_carry = [cotangent(x, y) for x, y in zip(given[1], now_carry, strict=True)]
    sums: dict[str, Tensor] = {}
    known = {i for group in given[:2] for i, x in enumerate(group) if x is not None}
    given_states = live_cotangents(program, leaves, known)

    def refresh() -> None:
        """The anchor was set to the carry here: the carry takes both cotangents."""
        nonlocal on_anchor, on_carry
        pairs = zip(on_carry, on_anchor, strict=True)
        on_carry = [g if a is None else g + a for g, a in pairs]
        on_anchor = [None] * len(on_anchor)

    def run(part: str, start: int, count: int, states: dict[str, Tensor]) -> None:
        nonlocal on_anchor, on_carry
        kernel = backward_kernel(program, part, leaves, given_states)
        tensors = named | states | {k: x[:, :, start : start + count] for k, x in rows.items()}
        for i, g in enumerate(on_carry):
            tensors[f"gstate_{i}"] = g
            tensors[f"new_gstate_{i}"] = torch.empty_like(g)
        for i, x in enumerate(now_anchor):
            tensors[f"ganchor_{i}"] = torch.empty_like(x)
            tensors[f"gcarry_{i}"] = torch.empty_like(x)
        for i, _ in enumerate(shared):
            x = named[f"shared_{i}"]
            tensors[f"gshared_{i}"] = x.new_empty((batch, *x.shape), dtype=on_carry[0].dtype)
        launcher(Launch(kernel, tensors, (batch * heads,), count, heads, 0, dtype))
        used = {name for name, _ in kernel.config["arguments"]}
        for i, _ in enumerate(on_carry):
            made = [name for name in (f"new_gstate_{i}", f"gcarry_{i}") if name in used]
            on_carry[i] = tensors[made[0]] if made else on_carry[i]
        if f"ganchor_{0}" in used:
            got = [tensors[f"ganchor_{i}"] for i in range(len(on_anchor))]
            on_anchor = [x if a is None else a + x for a, x in zip(on_anchor, got, strict=True)]
        for name in leaves:
            if name.startswith("shared"):
                x = tensors[f"g{name}"].sum(0)
                sums[name] = sums[name] + x if name in sums else x

    if (place + length) % b == 0:
        refresh()
    kind = "carry" if program.sequential else "anchor"
    first = min((-place) % b, length)
    start, part = first, "token" if program.sequential else "full"
    kept = {f"saved_{kind}_{i}": squeeze_features(x, 3) for i, x in zip(live, saved, strict=True)}
    rest = (length - first) % b
    if rest and any(a is not None for a in on_anchor):
        # Its anchor is a result of the scan: the cotangent of that joins before the mini-batches that made it.
        run(part, length - rest, rest, {k: x[:, :, -1:] for k, x in kept.items()})
        refresh()
    else:
        rest = 0
    if length - rest > start:
        run(part, start, length - rest - start, kept)
        refresh()
    if first:
        states = {f"saved_anchor_{i}": x.unsqueeze(2) for i, x in enumerate(now_anchor)}
        states |= {f"saved_carry_{i}": x.unsqueeze(2) for i, x in enumerate(now_carry)}
        run("continued", 0, first, states)
    if not carry:
        refresh()
        return [g.reshape(x.shape) for g, x in zip(on_carry, anchor, strict=True)], [], out | sums
    to_anchor = [
        torch.zeros_like(x) if g is None else g.reshape(x.shape)
        for g, x in zip(on_anchor, anchor, strict=True)
    ]
    return to_anchor, [g.reshape(x.shape) for g, x in zip(on_carry, carry, strict=True)], out | sums
