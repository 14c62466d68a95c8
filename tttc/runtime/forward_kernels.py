"""The kernels that a part of a forward takes, rendered once and kept with its program."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tttc.codegen.loop import Loop, scan_loop
from tttc.codegen.schedule import Schedule
from tttc.ir.program import Program
from tttc.passes.prune_state import live_states
from tttc.runtime.chunked import Chunked, chunked, is_tall
from tttc.runtime.staged import Staged, staged
from tttc.tuning.choose import plan_for
from tttc.tuning.plan import Plan, Setting, by_rules, split_of
from tttc.tuning.search import Call

PLAIN = Setting()
_lock = threading.RLock()


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
            return forward_loop(program, part, states, save, interval, settled, outputs)

        if part == "tokens" and is_tall(program):
            tall = (*which, "tall", split)
            if tall not in program.kernels:
                program.kernels[tall] = chunked(loop(), split)
            if program.kernels[tall] is not None:
                return program.kernels[tall]
        plan = None
        if schedule is None:
            plan = plan_for(program, which, loop, setting, call=call)
            plan = plan or plan_by_rules(program, which, loop, setting)
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


def plan_by_rules(
    program: Program, which: tuple, loop: Callable[[], Loop], setting: Setting
) -> Plan:
    """The plan that rules give a loop of a program; size classes that are split alike share it."""
    sized = (which, setting)
    with _lock:
        if sized not in program.rules:
            whole = loop()
            split = split_of(whole, setting)
            known = (which, setting.crowd, setting.gluon, split)
            if known not in program.rules:
                program.rules[known] = by_rules(whole, setting, split=split)
            program.rules[sized] = program.rules[known]
        return program.rules[sized]


def forward_loop(
    program: Program,
    part: str,
    states: bool,
    save: tuple[int, ...] = (),
    interval: int = 1,
    settled: bool = True,
    outputs: bool = True,
) -> Loop:
    """The loop of a part; arguments as of :func:`scan_kernels`. ``settled``: sums are made as soon as they can be."""
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
