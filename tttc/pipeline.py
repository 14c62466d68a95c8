"""The pipeline of one scan: from the captured step to the bodies that are emitted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tttc._scan_op import EAGER_KEYS, InternedStep
from tttc.capture.step import capture_step
from tttc.ir.body import Body
from tttc.ir.errors import NotLowerable
from tttc.ir.program import Program
from tttc.passes.at_anchor import at_anchor, at_carry
from tttc.passes.batch import batch
from tttc.passes.dualise import dualise
from tttc.passes.normalise import normalise
from tttc.passes.simplify import simplify
from tttc.passes.verify import verify_pass
from tttc.progress import phase

_lock = threading.RLock()
_programs: dict[Any, Program] = {}


def build_program(entry: InternedStep, mini_batch_size: int, verify: bool = False) -> Program:
    """The program of an interned step; the same object for the same step, shapes and mini-batch size.

    Raises:
        NotLowerable: where the step has no form in the IR.
    """
    key = (entry.key, mini_batch_size)
    with _lock:
        program = _programs.get(key)
        if program is None or (verify and not program.verified):
            # Whoever asks may be tracing: what is built is for real.
            with _disable_current_modes(), torch._C._ForceDispatchKeyGuard(*EAGER_KEYS):
                program = _build(entry, mini_batch_size, verify)
            _programs[key] = program
        return program


def _build(entry: InternedStep, mini_batch_size: int, verify: bool) -> Program:
    step = entry.key.rpartition("#")[0].rpartition(".")[2]
    with phase("capture", step) as made:
        captured = capture_step(entry.step, entry.trees, entry.shapes, entry.dtypes)
        made(captured)
    counts = captured.meta["counts"]
    roles = [
        f"{kind}_{i}"
        for kind, n in zip(("anchor", "carry", "token", "shared"), counts, strict=True)
        for i in range(n)
    ]
    stages: dict[str, Any] = {"capture": captured}

    def run(
        name: str, apply: Callable[..., Body], before: Any, *rest: Any, at: bool = False
    ) -> Body:
        with phase("passes", f"{step}: {name}") as made:
            after = apply(before, *rest)
            made(after)
            if verify:
                verify_pass(name, before, after, mini_batch_size, at)
        stages[name] = after
        return after

    normal = run("normalise", normalise, captured, roles)
    token = run("simplify_step", simplify, normal)
    program = Program(entry.key, mini_batch_size, token, stages=stages, verified=verify)
    if mini_batch_size == 1:
        program.token = run("at_carry", lambda body: simplify(at_carry(body)), token, at=True)
        program.reason = "mini_batch_size is 1: every token sees the state of the token before it"
        return program
    try:
        primal = run("batch", batch, token)
        started = run("at_anchor", at_anchor, primal, at=True)
        dual = run("dualise", dualise, started, mini_batch_size, at=True)
        program.full = run("simplify", simplify, dual, at=True)
        program.continued = run(
            "continued", lambda body: simplify(dualise(body, mini_batch_size)), primal
        )
    except NotLowerable as error:
        program.full = program.continued = None
        program.reason = error.reason
    return program
