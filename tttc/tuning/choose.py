"""Which plan a loop runs by: one found before, one searched for now, or none, which leaves it to the rules."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tttc.codegen.loop import Loop
from tttc.ir.program import Program
from tttc.tuning.compiling import Compiler, compiler_for
from tttc.tuning.plan import Plan, Setting
from tttc.tuning.remembered import recall, remember
from tttc.tuning.search import Call, Timer, search, time_on_device

_lock = threading.RLock()


@dataclass(frozen=True)
class _Means:
    """How launches are timed and compiled where that is not up to the device."""

    timer: Timer
    compiler: Compiler | None


_given: _Means | None = None


@contextmanager
def timed_by(timer: Timer, compiler: Compiler | None = None) -> Iterator[None]:
    """Search by another clock: ``timer`` gets a :class:`tttc.runtime.launch.Launch` and says how many seconds it takes.

    With one, searches run on any device that runs kernels, Triton's interpreter too.

    Example:
        >>> from tttc.tuning.choose import timed_by
        >>> with timed_by(lambda call: 1e-3):
        ...     pass
    """
    global _given
    before, _given = _given, _Means(timer, compiler)
    try:
        yield
    finally:
        _given = before


def tuning_wanted(tune: bool | None) -> bool:
    """Whether to search for schedules: as asked for, else as ``TTTC_TUNE`` says (``1`` or ``0``).

    Raises:
        TypeError, ValueError: for anything else.
    """
    if tune is None:
        given = os.environ.get("TTTC_TUNE", "0")
        if given not in ("0", "1", ""):
            raise ValueError(f"TTTC_TUNE: expected 0 or 1, got {given!r}")
        return given == "1"
    if not isinstance(tune, bool):
        raise TypeError(f"tune: expected True, False or None, got {tune!r}")
    return tune


def plan_for(
    program: Program,
    key: object,
    loop: Callable[[], Loop],
    setting: Setting,
    backward: bool = False,
    call: Call | None = None,
) -> Plan | None:
    """The plan of a loop of a program; None where no search has found one.

    Args:
        key: what the loop is told apart by within the program.
        loop: makes it.
        setting: of the call.
        call: its arguments, where a search may run on them.
    """
    known = (key, setting)
    with _lock:
        if known not in program.plans:
            program.plans[known] = recall(loop(), setting)
        if program.plans[known] is not None or call is None or known in program.searched:
            return program.plans[known]
        means = _means(setting.device)
        if means is not None:
            program.searched.add(known)  # once, whatever comes of it
            whole = loop()
            found = search(whole, call, setting, backward, means.timer, means.compiler)
            if found is not None:
                program.calls.clear()
                program.plans[known] = remember(
                    whole, setting, found.plan, found.seconds, len(found.times)
                )
        return program.plans[known]


def _means(device: torch.device) -> _Means | None:
    """How to time and compile; None where nothing can be measured now."""
    if _given is not None:
        return _given
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return _Means(time_on_device, compiler_for(device))
