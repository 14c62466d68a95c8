"""A scan of few sequences in segments: the states that segments begin with first, then all of them beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tttc.codegen.devices import device_of
from tttc.codegen.loop import Loop
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
    cut = _Cut(each, each * b, length)
    parts = _parts(given, cut)
    if parts is None or (batch > 1 and cut.rest):
        return None

    def told(given: Mapping[str, Tensor], batch: int, length: int) -> Call | None:
        return None if call is None else Call(given, batch, heads, length, 0, dtype)

    begun = _begun(forward_loop(program, "full", states, save), given, batch, heads, cut)
    leaves = tuple(int(name.rpartition("_")[2]) for name in begun)
    first = {n: x for n, x in given.items() if not n.startswith(("output_", "saved_"))} | begun
    # Where nobody asks for the last state, as far as the last segment begins: that state is stored by its first mini-batch.
    until = length if states else min(length, (cut.beginnings - 1) * cut.tokens + b)
    kernels = scan_kernels(
        program, "full", states, save=leaves, setting=setting, interval=each, call=told(first, batch, until),
        outputs=False,
    )  # fmt: skip
    new = run_staged(kernels, first, batch, heads, until, 0, dtype, launcher)

    several = setting_of(batch * cut.count * heads, each, dtype, device, setting.gluon)
    second = {**given, **parts, **_anchors(given, begun, slice(0, cut.count))}
    kernels = scan_kernels(
        program, "full", False, save=save, setting=several, call=told(second, batch * cut.count, cut.tokens)
    )  # fmt: skip
    run_staged(kernels, second, batch * cut.count, heads, cut.tokens, 0, dtype, launcher)
    if cut.rest:
        anchors = _anchors(given, begun, slice(cut.count, cut.count + 1))
        last = {**given, **_last(given, cut), **anchors}
        run_staged(kernels, last, batch, heads, cut.rest, 0, dtype, launcher)
    return new


@dataclass(frozen=True)
class _Cut:
    """Sequences of ``length`` cut into segments of ``tokens``, which are ``each`` mini-batches, and a rest."""

    each: int
    tokens: int
    length: int

    @property
    def count(self) -> int:
        """Segments."""
        return self.length // self.tokens

    @property
    def rest(self) -> int:
        """Tokens after them."""
        return self.length % self.tokens

    @property
    def beginnings(self) -> int:
        """Segments, and the rest where there is one."""
        return self.count + bool(self.rest)


def _parts(given: Mapping[str, Tensor], cut: _Cut) -> dict[str, Tensor] | None:
    """Tokens, outputs and saved states with segments as sequences; None where a tensor can't be seen so."""
    parts = {}
    for name, x in given.items():
        if name.startswith(("token_", "output_")):
            copy = x.ndim == 3 and name.startswith("token_")
            part = segments(x, cut.count, cut.tokens, copy=copy)
        elif name.startswith("saved_"):
            part = segments(x, cut.count, cut.each)
        else:
            continue
        if part is None:
            return None
        parts[name] = part
    return parts


def _last(given: Mapping[str, Tensor], cut: _Cut) -> dict[str, Tensor]:
    """Tokens, outputs and saved states after the segments."""
    tokens = {n: x for n, x in given.items() if n.startswith(("token_", "output_"))}
    saved = {n: x for n, x in given.items() if n.startswith("saved_")}
    return {n: x[:, :, cut.count * cut.tokens :] for n, x in tokens.items()} | {
        n: x[:, :, cut.count * cut.each :] for n, x in saved.items()
    }


def _begun(
    loop: Loop, given: Mapping[str, Tensor], batch: int, heads: int, cut: _Cut
) -> dict[str, Tensor]:
    """Room for the states that segments begin with, ``[batch, heads, segments, ...]``, as saved states are named."""
    return {
        f"saved_{name}": torch.empty(
            (batch, cut.beginnings, heads, *given[name].shape[2:]), device=given[name].device
        ).transpose(1, 2)
        for name in sorted({s.name for _, s in loop.sinks if s.kind == "state"})
    }


def _anchors(
    given: Mapping[str, Tensor], begun: Mapping[str, Tensor], at: slice
) -> dict[str, Tensor]:
    """The states that some segments begin with, segments as sequences."""
    found = {}
    for name, x in given.items():
        if f"saved_{name}" in begun:
            found[name] = begun[f"saved_{name}"][:, :, at].transpose(1, 2).flatten(0, 1)
        elif name.startswith("anchor_"):
            of = at.stop - at.start
            found[name] = x.unsqueeze(1).expand(-1, of, *x.shape[1:]).flatten(0, 1)
    return found


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
