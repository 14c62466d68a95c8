"""The pipeline of one scan: from the captured step to the bodies that are emitted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from tttc import _scan_op
from tttc._scan_op import EAGER_KEYS, InternedStep, interned, tokens_of
from tttc._tracing import without_saved_tensor_hooks
from tttc.capture.step import capture_step
from tttc.ir.body import Body
from tttc.ir.errors import NotLowerable
from tttc.ir.program import Program
from tttc.passes.at_anchor import at_anchor, at_carry
from tttc.passes.batch import batch
from tttc.passes.chunkwise import chunk_size, chunkwise
from tttc.passes.dualise import dualise
from tttc.passes.longer_products import longer_products
from tttc.passes.normalise import normalise
from tttc.passes.simplify import simplify
from tttc.passes.sums import sums
from tttc.passes.tiles import Tile, tile_of, tiles
from tttc.passes.update_at_anchor import update_at_anchor
from tttc.passes.verify import verify_pass, verify_tiles
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
            with (
                _disable_current_modes(),
                torch._C._ForceDispatchKeyGuard(*EAGER_KEYS),
                without_saved_tensor_hooks(),
            ):
                program = _build(entry, mini_batch_size, verify)
            _programs[key] = program
        return program


@contextmanager
def unseen() -> Iterator[None]:
    """Within, other threads see neither which steps there are nor their programs."""
    with _lock, _scan_op.unseen():
        yield


def forget(key: str) -> None:
    """Take a step back (:func:`tttc._scan_op.forget`), and its programs."""
    with _lock:
        for known in [k for k in _programs if k[0].partition("@")[0] == key]:
            del _programs[known]
        _scan_op.forget(key)


def _approximated(body: Body) -> Body:
    """An online step whose updates are taken at the anchor."""
    return simplify(update_at_anchor(simplify(at_carry(body))))


def _build(entry: InternedStep, mini_batch_size: int, verify: bool) -> Program:
    step = entry.key.rpartition("#")[0].rpartition(".")[2]
    source = entry if entry.tiles is None else interned(entry.tiles)
    with phase("capture", step) as made:
        captured = capture_step(source.step, source.trees, source.shapes, source.dtypes)
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
            if verify and apply is tiles:
                verify_tiles(before, after, *rest)
            elif verify:
                verify_pass(name, before, after, program.unit if after.batched else 1, at)
        stages[name] = after
        return after

    normal = run("normalise", normalise, captured, roles)
    token = run("simplify_step", simplify, normal)
    program = Program(entry.key, mini_batch_size, token, stages=stages, verified=verify)
    if entry.of is not None:
        program.token = run("update_at_anchor", _approximated, token)
        token = program.token
    if entry.tile is not None:
        _of_tiles(program, token, entry.tile, run)
    elif mini_batch_size == 1:
        _online(program, token, run)
    elif not _dual(program, token, run):
        _solved(program, token, run)
    return program


def in_tokens(key: str, verify: bool = False) -> str | None:
    """The key under which an online step that takes tiles of tokens runs in the dual form, if it does."""
    try:
        program = build_program(interned(key), 1, verify)
        if not program.sequential:
            return None
        derived = tokens_of(key, tile_of(program.token))
        return None if build_program(interned(derived), 1, verify).sequential else derived
    except NotLowerable:
        return None


Run = Callable[..., Body]  # a pass under its name, validated and kept


def _full(program: Program, body: Body, run: Run) -> Body:
    """The body of a mini-batch from its anchor, simplified; also as kernels are rendered from it."""
    full = run("simplify", lambda body: longer_products(simplify(body)), body, at=True)
    program.settled["full"] = run("sums", sums, full, at=True)
    return full


def _settle_continued(program: Program, body: Body) -> None:
    """The same of a body that goes on in the middle of a mini-batch."""
    program.settled["continued"] = settled = sums(body)
    if program.verified:
        verify_pass("sums", body, settled, program.unit, False)


def _online(program: Program, token: Body, run: Run) -> None:
    """Every token sees the state of the token before it: chunks where that can be solved for."""
    program.token = run("at_carry", lambda body: simplify(at_carry(body)), token, at=True)
    program.chunk_size = chunk_size(program.token)
    try:
        chunk = run("chunkwise", chunkwise, program.token, program.chunk_size, at=True)
        program.full = _full(program, chunk, run)
    except NotLowerable as error:
        program.chunk_size = None
        program.reason = (
            "mini_batch_size is 1: every token sees the state of the token before it, and "
            + error.reason
        )


def _of_tiles(program: Program, token: Body, tile: Tile, run: Run) -> None:
    """The dual form of a step that takes the tokens of a mini-batch together."""
    program.chunk_size = tile.size
    started = simplify(at_anchor(simplify(at_carry(token))))
    try:
        program.token = run("tiles", tiles, started, tile)
        dual = run("dualise", dualise, program.token, tile.size, at=True)
        program.full = _full(program, dual, run)
    except NotLowerable as error:
        program.reason = error.reason


def _dual(program: Program, token: Body, run: Run) -> bool:
    """The dual form of a mini-batch whose updates are taken at its anchor; False, with the reason, where there is none."""
    size = program.mini_batch_size
    try:
        primal = run("batch", batch, token)
        started = run("at_anchor", at_anchor, primal, at=True)
        dual = run("dualise", dualise, started, size, at=True)
        program.full = _full(program, dual, run)
        program.continued = run("continued", lambda body: simplify(dualise(body, size)), primal)
        _settle_continued(program, program.continued)
    except NotLowerable as error:
        program.full = program.continued = None
        program.reason = error.reason
    return program.full is not None


def _solved(program: Program, token: Body, run: Run) -> None:
    """Updates that depend on the carry within a mini-batch, where they can be solved for."""
    size, stages = program.mini_batch_size, dict(program.stages)

    def continued(body: Body) -> Body:
        return simplify(chunkwise(body, size, from_anchor=False))

    try:
        full = _full(program, run("chunkwise", chunkwise, token, size, at=True), run)
        program.continued = run("continued", continued, token)
        _settle_continued(program, program.continued)
        program.full, program.reason = full, None
    except NotLowerable:  # the reason why there is no dual form says more
        program.stages = stages
