"""The Triton backend of a scan's backward: which kernels it takes, on which tensors."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from tttc.codegen.crowding import Crowd
from tttc.codegen.heuristics import default_schedule
from tttc.codegen.loop import Loop, backward_loop, constant_tensors, used
from tttc.codegen.schedule import Schedule
from tttc.codegen.torch_scan import squeeze_features
from tttc.codegen.torch_scan_backward import Leaves, derive, live_cotangents
from tttc.ir.apart import apart
from tttc.ir.body import role
from tttc.ir.program import Program
from tttc.runtime import beside
from tttc.runtime.chunked import Chunked, chunked, is_tall, programs_a_tile
from tttc.runtime.forward_kernels import PLAIN
from tttc.runtime.launch import launch
from tttc.runtime.overlap import Overlap, group_size, overlaps
from tttc.runtime.saved_states import empty_states
from tttc.runtime.staged import (
    Launcher,
    Staged,
    added_up,
    compiled_ahead,
    narrow_sources,
    run_staged,
    staged,
    staged_launches,
)
from tttc.runtime.triton_scan import run_kernels, suits_gluon
from tttc.tuning.choose import plan_for
from tttc.tuning.plan import Setting, setting_of
from tttc.tuning.search import Call

Tensor = torch.Tensor
_lock = threading.Lock()
_zeros: dict[tuple[torch.device, torch.dtype], Tensor] = {}
ENOUGH_PROGRAMS = 2048  # of a parallel kernel: many a multiprocessor, on any device


def backward_kernels(
    program: Program,
    part: str,
    leaves: Leaves,
    live: tuple[int, ...] | None = None,
    setting: Setting = PLAIN,
    call: Call | None = None,
    split: int = 1,
    onto: tuple[int, ...] | None = None,
) -> Staged | Chunked:
    """The kernels of the VJP of a body ("full", "continued" or "token"), rendered once.

    ``live``: the states that have cotangents, all where None; ``onto``: those whose cotangents are handed on, the same
    where None. ``setting``, ``call`` and ``split``: as of :func:`tttc.runtime.forward_kernels.scan_kernels`.

    Raises:
        NotLowerable: where an operator has no derivative or no Triton form.
    """
    with _lock:
        chosen = program.schedules.get(f"{part}_backward")
        which = ("backward", part, leaves, live, onto)

        def loop() -> Loop:
            return backward_loop_of(program, part, leaves, live, onto)

        if part == "token" and is_tall(program):
            tall = (*which, "tall", split)
            if tall not in program.kernels:
                program.kernels[tall] = chunked(loop(), split)
            if program.kernels[tall] is not None:
                return program.kernels[tall]
        plan = plan_for(program, which, loop, setting, True, call) if chosen is None else None
        key = (*which, chosen or plan or (setting.crowd, setting.gluon))
        if key not in program.kernels:
            whole = loop()
            schedule = chosen or default_schedule(
                whole, setting.crowd, backward=True, gluon=setting.gluon
            )

            def of(stage: Loop) -> Schedule:
                given = program.schedules.get(stage.name) or chosen
                if given is not None:
                    return given
                if plan is not None:
                    return plan.schedule(stage)
                return default_schedule(stage, setting.crowd, backward=True, gluon=setting.gluon)

            program.kernels[key] = staged(whole, plan.stages if plan else schedule.stages, of)
        return program.kernels[key]


def backward_loop_of(
    program: Program,
    part: str,
    leaves: Leaves,
    live: tuple[int, ...] | None = None,
    onto: tuple[int, ...] | None = None,
) -> Loop:
    """The loop of the VJP of a body."""
    made = derive(program, part, leaves, live, onto)
    handed_on = "anchor" if part == "full" else "carry"
    return backward_loop(f"scan_{part}_backward", made, program.unit, handed_on)


def narrow_states(program: Program, leaves: Leaves) -> set[int]:
    """The state leaves that the kernels of the backward read by matrix products alone."""
    key = ("narrow", leaves)
    if key not in program.gradients:
        loop = backward_loop_of(program, "token" if program.sequential else "full", leaves)
        names = narrow_sources(loop)
        wide = {
            role(n)[1] for n, s in loop.sources.items()
            if s.kind == "saved" and n in used(loop) and f"saved_{s.name}" not in names
        }  # fmt: skip
        found = {role(n)[1] for n, s in loop.sources.items() if f"saved_{s.name}" in names}
        program.gradients[key] = found - wide
    return program.gradients[key]


def _zero(like: Tensor) -> Tensor:
    """A zero that nobody writes to, made once a device: to fill it takes the host longer than some kernels take."""
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        return like.new_zeros(())  # made by the graph, and of nobody else
    key = (like.device, like.dtype)
    if key not in _zeros:
        device, dtype = key
        _zeros[key] = apart(device, lambda: torch.zeros((), device=device, dtype=dtype))
    return _zeros[key]


def _together(made: Staged | Chunked, heads: int) -> int:
    """Mini-batches that the kernels of a backward handle at once, for so many heads of sequences."""
    if isinstance(made, Chunked) or len(made.kernels) == 1:
        return 1 << 30
    groups = [k.config["schedule"].group for k in made.kernels if k.config["parallel"]]
    return max(groups) * -(-ENOUGH_PROGRAMS // heads)


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
    interval: int,
    out: dict[str, Tensor],
    dtype: torch.dtype,
    launcher: Launcher = launch,
    tune: bool = False,
    device: torch.device | None = None,
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """The cotangents of a scan's arguments, by kernels.

    Arguments and results as :func:`tttc.codegen.torch_scan_backward.run_backward`; states are ``saved`` at every
    ``interval``-th mini-batch, those between are computed again, segment after segment. ``out`` holds the tensors ``[B, H, T, ...]`` for the cotangents of the wanted tokens. ``launcher`` and ``device`` as of
    :func:`tttc.runtime.triton_scan.run_kernels`.
    """
    batch, heads, length = tokens[0].shape[:3]
    b = program.unit
    outer = [x for x in given[2] if x is not None]
    device = device or anchor[0].device
    gluon = suits_gluon(program, [*tokens, *outer], dtype, device)
    setting = setting_of(batch * heads, -(-length // b), dtype, device, gluon)
    split = programs_a_tile(batch * heads, device)
    named = constant_tensors(program, anchor[0].device)
    named |= {f"shared_{i}": squeeze_features(x, 1) for i, x in enumerate(shared)}
    now_anchor = [squeeze_features(x, 2) for x in anchor]
    now_carry = [squeeze_features(x, 2) for x in carry] if carry else now_anchor
    rows = {f"token_{i}": squeeze_features(x, 3) for i, x in enumerate(tokens)}
    rows |= {f"g{name}": squeeze_features(x, 3) for name, x in out.items()}
    for i, (x, shape) in enumerate(zip(given[2], program.token.output_shapes, strict=True)):
        if x is None:
            x = tokens[0].new_zeros((batch, heads, length, *shape))
        rows[f"goutput_{i}"] = squeeze_features(x, 3)

    zero = _zero(now_carry[0])
    tall = program.sequential and program.mini_batch_size == 1 and is_tall(program)

    def cotangent(x: Tensor | None, like: Tensor) -> Tensor:
        """Where there is none, a single zero with strides of 0: kernels only read it."""
        return zero.expand(like.shape) if x is None else x.reshape(like.shape).to(like.dtype)

    on_anchor = [
        None if x is None else cotangent(x, y) for x, y in zip(given[0], now_anchor, strict=True)
    ]
    on_carry = [cotangent(x, y) for x, y in zip(given[1], now_carry, strict=True)]
    sums: dict[str, Tensor] = {}
    nothing: list[Tensor | None] = [None] * len(on_anchor)
    overlap = Overlap(launcher)
    few = setting.crowd < Crowd.ONE and beside.pays()
    known = sorted({i for group in given[:2] for i, x in enumerate(group) if x is not None})
    given_states = live_cotangents(program, leaves, known)

    def refresh() -> None:
        """The anchor was set to the carry here: the carry takes both cotangents."""
        nonlocal on_anchor, on_carry
        if on_anchor == nothing:
            return
        overlap.finish()
        pairs = zip(on_carry, on_anchor, strict=True)
        on_carry = [g if a is None else g + a for g, a in pairs]
        on_anchor = nothing

    def run(part: str, start: int, count: int, states: dict[str, Tensor]) -> None:
        """A part of the sequence; of tall tiles the last apart: without the update that nothing reads."""
        if tall and start + count == length and tuple(known) != given_states:
            last = {k: x[:, :, -1:] for k, x in states.items()}
            run_from(part, length - 1, 1, last, tuple(known))
            count, states = count - 1, {k: x[:, :, :-1] for k, x in states.items()}
        if count:
            run_from(part, start, count, states, given_states)

    def run_from(
        part: str, start: int, count: int, states: dict[str, Tensor], after: tuple[int, ...]
    ) -> None:
        """``after``: the states that have cotangents after it."""
        nonlocal on_anchor, on_carry
        tensors = named | states | {k: x[:, :, start : start + count] for k, x in rows.items()}
        tensors |= {f"gstate_{i}": g for i, g in enumerate(on_carry)}
        searched = tune and part != "continued" and launcher is launch
        call = Call(tensors, batch, heads, count, 0, dtype) if searched else None
        onto = None if after == given_states else given_states
        kernels = backward_kernels(program, part, leaves, after, setting, call, split, onto)
        if (
            few
            and call is None
            and on_anchor == nothing
            and isinstance(kernels, Staged)
            and overlaps(kernels)
        ):
            launches, results = staged_launches(kernels, tensors, batch, heads, count, 0, dtype)
            compiled_ahead(kernels, launches, launcher)
            overlap.run(launches, lambda: add_sums(added_up(kernels, results)))
        else:
            overlap.finish()
            results = run_staged(kernels, tensors, batch, heads, count, 0, dtype, launcher)
            add_sums(results)
        for i, x in enumerate(on_carry):
            on_carry[i] = results.get(f"new_gstate_{i}", results.get(f"gcarry_{i}", x))
        if "ganchor_0" in results:
            got = [results[f"ganchor_{i}"] for i in range(len(on_anchor))]
            on_anchor = [x if a is None else a + x for a, x in zip(on_anchor, got, strict=True)]

    def add_sums(results: dict[str, Tensor]) -> None:
        for name in leaves:
            if name.startswith("shared"):
                x = results[f"g{name}"].sum(0)
                sums[name] = sums[name] + x if name in sums else x

    if (place + length) % program.mini_batch_size == 0:
        refresh()
    kind = "carry" if program.sequential else "anchor"
    first = min((-place) % b, length)
    part = "token" if program.sequential else "full"

    def states_of(segment: int) -> dict[str, Tensor]:
        """The states at the start of every mini-batch of a segment of ``interval``."""
        if interval == 1:
            these = slice(segment * size // b, -(-min((segment + 1) * size, length - first) // b))
            return {
                f"saved_{kind}_{i}": squeeze_features(x[:, :, these], 3)
                for i, x in zip(live, saved, strict=True)
            }
        start = first + segment * interval * b
        stop = min(start + interval * b, length)
        begin = list(anchor)
        for i, x in zip(live, saved, strict=True):
            begin[i] = x[:, :, segment].to(anchor[i].dtype)
        narrow = narrow_states(program, leaves)
        kept = {
            i: empty_states(
                (batch, heads, -(-(stop - start) // b)),
                anchor[i].shape[2:],
                dtype if i in narrow else anchor[i].dtype,
                anchor[i].device,
            )
            for i in live
        }
        piece = [x[:, :, start:stop] for x in tokens]
        run_kernels(
            program,
            begin,
            [],
            piece,
            shared,
            0,
            dtype,
            states=False,
            launcher=launcher,
            save=kept,
            tune=tune,
            device=device,
        )
        return {f"saved_{kind}_{i}": squeeze_features(x, 3) for i, x in kept.items()}

    # From the last segment to the first: of ``interval`` mini-batches where states between are made again; else as many
    # as give parallel kernels enough programs, so that what passes between kernels is never there for all tokens.
    size = max(length - first, 1)
    if interval > 1:
        size = interval * b
    elif length - first >= b:
        made = backward_kernels(program, part, leaves, given_states, setting, None, split)
        at_once = _together(made, batch * heads)
        if few and isinstance(made, Staged) and overlaps(made):
            at_once = group_size(at_once, -(-(length - first) // b))
        size = min(size, at_once * b)
    for segment in reversed(range(-(-(length - first) // size))):
        start, stop = first + segment * size, min(first + (segment + 1) * size, length)
        kept = states_of(segment)
        rest = (stop - start) % b
        if rest and any(a is not None for a in on_anchor):
            # Its anchor is a result of the scan: the cotangent of that joins before the mini-batches that made it.
            run(part, stop - rest, rest, {k: x[:, :, -1:] for k, x in kept.items()})
            refresh()
            stop -= rest
        if stop > start:
            run(part, start, stop - start, kept)
            refresh()
    if first:
        states = {f"saved_anchor_{i}": x.unsqueeze(2) for i, x in enumerate(now_anchor)}
        states |= {f"saved_carry_{i}": x.unsqueeze(2) for i, x in enumerate(now_carry)}
        run("continued", 0, first, states)
    overlap.finish()
    if not carry:
        refresh()
        return [g.reshape(x.shape) for g, x in zip(on_carry, anchor, strict=True)], [], out | sums
    to_anchor = [
        torch.zeros_like(x) if g is None else g.reshape(x.shape)
        for g, x in zip(on_anchor, anchor, strict=True)
    ]
    return to_anchor, [g.reshape(x.shape) for g, x in zip(on_carry, carry, strict=True)], out | sums
