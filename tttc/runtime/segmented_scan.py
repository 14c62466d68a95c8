"""A scan of few sequences in segments: the states that segments begin with first, then all of them beside each other."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tttc.codegen.devices import device_of
from tttc.ir.program import Program
from tttc.runtime.forward_kernels import forward_loop, plan_by_rules, scan_kernels
from tttc.runtime.segments import mini_batches_of, segments
from tttc.runtime.staged import Launcher, run_staged
from tttc.tuning.plan import Setting, setting_of
from tttc.tuning.search import Call

Tensor = torch.Tensor


def by_segments(
    program: Program,
    given: Mapping[str, Tensor],
    batch: int,
    heads: int,
    length: int,
    setting: Setting,
    states: bool,
    save: tuple[int, ...],
    interval: int,
    call: Call | None,
    launcher: Launcher,
) -> dict[str, Tensor] | None:
    """The states of every so many mini-batches, then segments beside each other; None where that is not done.

    Returns the new states.
    """
    b, dtype, device = program.unit, setting.dtype, setting.device
    warps = 0 if interval > 1 else warps_of_segments(program, states, save, setting)
    processors = device_of(device).processors
    each = mini_batches_of(batch * heads, length // b, processors, warps) if warps else 0
    if not each:
        return None
    count, tokens = length // (each * b), each * b
    rest = length - count * tokens
    parts = {}
    for name, x in given.items():
        if name.startswith(("token_", "output_")):
            part = segments(x, count, tokens, copy=x.ndim == 3 and name.startswith("token_"))
        elif name.startswith("saved_"):
            part = segments(x, count, each)
        else:
            continue
        if part is None:
            return None
        parts[name] = part
    if batch > 1 and rest:
        return None
    full = forward_loop(program, "full", states, save)
    begun = {
        f"saved_{name}": torch.empty(
            (batch, count + bool(rest), heads, *given[name].shape[2:]), device=given[name].device
        ).transpose(1, 2)
        for name in sorted({s.name for _, s in full.sinks if s.kind == "state"})
    }
    leaves = tuple(int(name.rpartition("_")[2]) for name in begun)

    def told(given: Mapping[str, Tensor], batch: int, length: int) -> Call | None:
        return None if call is None else Call(given, batch, heads, length, 0, dtype)

    first = {n: x for n, x in given.items() if not n.startswith(("output_", "saved_"))} | begun
    # Where nobody asks for the last state, as far as the last segment begins: that state is stored by its first mini-batch.
    until = length if states else min(length, (count + bool(rest) - 1) * tokens + b)
    kernels = scan_kernels(
        program, "full", states, save=leaves, setting=setting, interval=each, call=told(first, batch, until),
        outputs=False,
    )  # fmt: skip
    new = run_staged(kernels, first, batch, heads, until, 0, dtype, launcher)

    def anchors(at: slice, of: int) -> dict[str, Tensor]:
        """Where segments begin."""
        found = {}
        for name, x in given.items():
            if f"saved_{name}" in begun:
                found[name] = begun[f"saved_{name}"][:, :, at].transpose(1, 2).flatten(0, 1)
            elif name.startswith("anchor_"):
                found[name] = x.unsqueeze(1).expand(-1, of, *x.shape[1:]).flatten(0, 1)
        return found

    several = setting_of(batch * count * heads, each, dtype, device, setting.gluon)
    second = {**given, **parts, **anchors(slice(0, count), count)}
    kernels = scan_kernels(
        program, "full", False, save=save, setting=several, call=told(second, batch * count, tokens)
    )
    run_staged(kernels, second, batch * count, heads, tokens, 0, dtype, launcher)
    if rest:
        last = {
            n: x[:, :, count * tokens :]
            for n, x in given.items()
            if n.startswith(("token_", "output_"))
        }
        last |= {n: x[:, :, count * each :] for n, x in given.items() if n.startswith("saved_")}
        last = {**given, **last, **anchors(slice(count, count + 1), 1)}
        run_staged(kernels, last, batch, heads, rest, 0, dtype, launcher)
    return new


def warps_of_segments(
    program: Program, states: bool, save: tuple[int, ...], setting: Setting
) -> int:
    """Warps of the kernel that handles segments, 0 where rules ask for none."""
    if "full" in program.schedules:
        chosen = program.schedules["full"]
    else:
        which = ("full", states, save, 1, True)
        plan = plan_by_rules(program, which, lambda: forward_loop(program, "full", states, save), setting)  # fmt: skip
        chosen = plan.schedules[0][1]
    return chosen.num_warps if chosen.segments else 0
