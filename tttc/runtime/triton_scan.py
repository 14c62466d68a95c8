"""The Triton backend of a scan: which kernels a call takes, on which tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from tttc.codegen.devices import device_of
from tttc.codegen.heuristics import hopper
from tttc.codegen.loop import Loop, constant_tensors, scan_loop
from tttc.codegen.schedule import Schedule
from tttc.codegen.torch_scan import run_program, squeeze_features
from tttc.ir.errors import KernelTooLarge
from tttc.ir.program import Program
from tttc.passes.prune_state import live_states
from tttc.runtime.chunked import Chunked, chunked, is_tall, programs_a_tile
from tttc.runtime.launch import launch
from tttc.runtime.segments import mini_batches_of, segments
from tttc.runtime.staged import Launcher, Staged, mini_batches_at_once, run_staged, staged
from tttc.tuning.choose import plan_for
from tttc.tuning.plan import Plan, Setting, by_rules, setting_of, split_of
from tttc.tuning.search import Call

Tensor = torch.Tensor
PLAIN = Setting()
_lock = threading.Lock()


def scan_kernels(
    program: Program,
    part: str,
    states: bool = True,
    schedule: Schedule | None = None,
    save: tuple[int, ...] = (),
    setting: Setting = PLAIN,
    interval: int = 1,
    call: Call | None = None,
    split: int = 1,
    outputs: bool = True,
) -> Staged | Chunked:
    """The kernels of a part of a program, rendered once.

    Args:
        part: "full" (all mini-batches), "continued" (one mini-batch from any carry) or "tokens" (token after
            token).
        states: whether final states are wanted.
        schedule: None for the one chosen for the part, else the default.
        save: state leaves to store at every ``interval``-th mini-batch.
        setting: the size class of the call, which the default depends on.
        interval: of the mini-batches at which states are stored.
        call: arguments to search for a schedule on, where none is known.
        split: programs that share a tile, where tokens are tall ones (:mod:`tttc.runtime.chunked`).
        outputs: whether outputs are wanted.

    Raises:
        NotLowerable: where an operator has no Triton form.
    """
    with _lock:
        schedule = schedule or program.schedules.get(part)
        which = (part, states, save, interval, outputs)

        def loop(settled: bool = True) -> Loop:
            return _loop(program, part, states, save, interval, settled, outputs)

        if part == "tokens" and is_tall(program):
            tall = (*which, "tall", split)
            if tall not in program.kernels:
                program.kernels[tall] = chunked(loop(), split)
            if program.kernels[tall] is not None:
                return program.kernels[tall]
        plan = None
        if schedule is None:
            plan = plan_for(program, which, loop, setting, call=call)
            plan = plan or _by_rules(program, which, loop, setting)
        key = (*which, schedule or plan)
        if key not in program.kernels:
            whole = loop()
            first = plan.schedules[0][1] if plan else schedule
            assert first is not None
            if (
                first.renderer == "warps"
            ):  # a sum of what they share is an exchange: added up once, not sooner
                whole = loop(settled=False)
            # Outputs made in parallel need the state of every mini-batch.
            count = 1 if interval > 1 else first.stages
            program.kernels[key] = staged(whole, count, plan.schedule if plan else lambda _: first)
        return program.kernels[key]


def _by_rules(program: Program, which: tuple, loop: Callable[[], Loop], setting: Setting) -> Plan:
    """The plan that rules give a loop of a program; size classes that are split alike share it."""
    sized = (which, setting)
    if sized not in program.rules:
        whole = loop()
        split = split_of(whole, setting)
        known = (which, setting.crowd, setting.gluon, split)
        if known not in program.rules:
            program.rules[known] = by_rules(whole, setting, split=split)
        program.rules[sized] = program.rules[known]
    return program.rules[sized]


def _loop(
    program: Program,
    part: str,
    states: bool,
    save: tuple[int, ...] = (),
    interval: int = 1,
    settled: bool = True,
    outputs: bool = True,
) -> Loop:
    plain = {"tokens": program.token, "continued": program.continued}.get(part, program.full)
    body = program.settled.get(part, plain) if settled else plain
    assert body is not None
    wanted = range(body.states) if states else save
    live = live_states(body, wanted, range(len(body.results) - body.states))
    return scan_loop(
        f"scan_{part}" if outputs else f"scan_{part}_states",
        body,
        program.unit,
        live,
        save=set(save),
        interval=interval,
        continued=part == "continued",
        store_state=states,
        outputs=outputs,
    )


def _by_segments(
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
    warps = 0 if interval > 1 else _warps_of_segments(program, states, save, setting)
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
    full = _loop(program, "full", states, save)
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


def _warps_of_segments(
    program: Program, states: bool, save: tuple[int, ...], setting: Setting
) -> int:
    """Warps of the kernel that handles segments, 0 where rules ask for none."""
    if "full" in program.schedules:
        chosen = program.schedules["full"]
    else:
        with _lock:
            which = ("full", states, save, 1, True)
            plan = _by_rules(program, which, lambda: _loop(program, "full", states, save), setting)
        chosen = plan.schedules[0][1]
    return chosen.num_warps if chosen.segments else 0


def suits_gluon(program: Program, tokens: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether kernels for warpgroups take tokens, on the device where they are.

    It has to be a Hopper GPU, and tiles must have the 16-bit dtype of the products and rows that can be copied 16 bytes
    at a time.
    """
    if dtype not in (torch.bfloat16, torch.float16) or not hopper(tokens[0].device):
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
    setting = setting_of(
        batch * heads,
        mini_batches,
        output_dtype,
        device or anchor[0].device,
        suits_gluon(program, tokens, output_dtype),
    )
    split = programs_a_tile(batch * heads, device or anchor[0].device)
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
            made = _by_segments(program, given, batch, heads, count, setting, states, stored, interval, call, launcher)  # fmt: skip
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
