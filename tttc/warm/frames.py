"""Frames that TorchDynamo asks the code of: answered from disk, or compiled and kept."""

from __future__ import annotations

import functools
import logging
import marshal
import os
import types
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo import convert_frame
from torch._dynamo.types import GuardedCode, wrap_guarded_code
from torch._dynamo.utils import CleanupHook, CleanupManager

from tttc import _recorder
from tttc._garbage import not_collected
from tttc.codegen.triton_ready import begin_triton
from tttc.options import Options, warn_once
from tttc.runtime.first_products import first_products
from tttc.warm import asked, autograd, constants, graphs, guards, recording, steps, store
from tttc.warm.key import key_of
from tttc.warm.names import Codes, check_codes
from tttc.warm.recording import NotKept, Recording

log = logging.getLogger("tttc.warm")


@dataclass
class Entry:
    """A compiled frame as it is written."""

    code: bytes
    function: str  # the name under which the code knows the compiled graph
    guards: guards.Kept
    codes: dict[tuple[str, str], str]
    steps: dict[str, steps.Step]
    graphs: dict[str, graphs.Source]
    autograd: autograd.Kept
    warnings: list[str]


def wanted(options: Options) -> bool:
    """Whether programs are kept on disk for these options, and used."""
    return (
        asked()
        and not torch.compiler.config.force_disable_caches
        and os.environ.get("TORCH_COMPILE_DEBUG") != "1"
        and not options.verify
        and not options.cuda_graphs
        and not _recorder.recording()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


class WarmFrames:
    """Stands between TorchDynamo and its compiler of frames.

    Args:
        convert: TorchDynamo's compiler of frames.
        code: of the function or the ``forward`` that is compiled; frames of other code are not looked up.
        options: what it is compiled with.
    """

    def __init__(self, convert: Any, code: types.CodeType, options: Options) -> None:
        self._torchdynamo_orig_backend = convert._torchdynamo_orig_backend
        self._clone_with_backend = convert._clone_with_backend
        self._convert = convert
        self._code = code
        self._options = options
        guards.watch()
        autograd.watch()
        constants.watch()

    def __call__(self, frame: Any, cache_entry: Any, hooks: Any, state: Any, skip: int = 0) -> Any:
        """The code for a frame, with its guards."""
        compile = functools.partial(self._convert, frame, cache_entry, hooks, state)
        if frame.f_code is not self._code or not wanted(self._options):
            return compile(skip=skip + 1)
        with first_products(frame.f_locals.values()):
            # Frames of this class between TorchDynamo and its compiler: two.
            return self._read_or_made(frame, state, functools.partial(compile, skip=skip + 2))

    def _read_or_made(self, frame: Any, state: Any, compile: Callable[[], Any]) -> Any:
        """From disk, or compiled and kept there."""
        try:
            key = key_of(frame, self._options)
        except Exception as error:
            log.info("%s can't be looked up: %s", frame.f_code.co_qualname, error)
            return compile()
        path = store.path_of(frame.f_code.co_name, key)
        try:
            entry = store.read(path, key)
            if entry is not None:
                found = _load(entry, frame, state)
                log.info("%s: from %s", frame.f_code.co_qualname, path)
                return found
        except Exception as error:  # PyTorch may have changed: compiled again, it works in any case
            log.info("%s: %s holds no program for it: %s", frame.f_code.co_qualname, path, error)
        if self._options.backend != "torch":
            begin_triton()
        local = dict(frame.f_locals)
        with recording.record() as made:
            result = compile()
        with made.kept():
            store.write(path, key, _entry(made, result, frame.f_code, local, frame.f_globals))
        log.info("%s: %s", frame.f_code.co_qualname, made.reason or f"kept in {path}")
        return result


def code_of(target: Any) -> types.CodeType | None:
    """The code of the frame that running a model or a function begins with; None where there is no telling."""
    function = type(target).forward if isinstance(target, nn.Module) else target
    return getattr(getattr(function, "__func__", function), "__code__", None)


def _entry(made: Recording, result: Any, original: types.CodeType, local: Any, scope: Any) -> Entry:
    """What was recorded, as it is written."""
    if made.reason is not None:
        raise NotKept(made.reason)
    if result.guarded_code is None or made.captured != 1:
        raise NotKept("it is not one graph")
    if made.guards is None or made.autograd is None:
        raise NotKept("it was compiled by other ways than usual")
    names = {"inference"} if made.autograd.wrapper is not None else {"forward", "backward"}
    if names != {*made.graphs}:
        raise NotKept("it was compiled by other ways than usual")
    code = result.guarded_code.code
    functions = [x for x in code.co_names if x.startswith("__compiled_fn")]
    if len(functions) != 1 or any(x.startswith("__resume") for x in code.co_names):
        raise NotKept("it is not one graph")
    captured: guards.Captured = made.guards
    if {*code.co_names} & {*captured.scope.names}:
        raise NotKept("its code needs what TorchDynamo has put among the globals")
    kept = captured.guards
    _, kept.text = guards.rebuild(kept, original, local, scope)
    used: dict[str, set[Any]] = {}
    for source in made.graphs.values():
        for key, where in source.steps.items():
            used.setdefault(key, set()).update(where)
    return Entry(
        marshal.dumps(code),
        functions[0],
        kept,
        Codes(captured.traced, captured.classes).known,
        {key: steps.written(key, where) for key, where in used.items()},
        made.graphs,
        made.autograd,
        made.warnings,
    )


@convert_frame.preserve_global_state  # as when a frame is compiled
def _load(entry: Entry, frame: Any, state: Any) -> Any:
    """The code of an entry, with guards of this process.

    Raises:
        NotKept: where it is not for this process, or this frame.
    """
    with not_collected():
        check_codes(entry.codes)
        manager = guards.rebuilt(entry.guards, frame.f_code, dict(frame.f_locals), frame.f_globals)
        keys = {key: steps.read(step) for key, step in entry.steps.items()}
        made = {name: graphs.read(source, keys) for name, source in entry.graphs.items()}
        run = torch._dynamo.disable(
            autograd.assembled(entry.autograd, made), reason="compiled by tttc"
        )
    for warning in entry.warnings:
        warn_once(warning)
    code: types.CodeType = marshal.loads(entry.code)
    name = f"__compiled_fn_{uuid.uuid4().hex}"
    code = code.replace(co_names=tuple(name if x == entry.function else x for x in code.co_names))
    convert_frame.input_codes.add(frame.f_code)
    convert_frame.output_codes.add(code)
    convert_frame.orig_code_map[code] = frame.f_code
    CleanupManager.instance[code] = [CleanupHook.create(frame.f_globals, name, run)]
    compiled = convert_frame.get_compile_id(state)
    return wrap_guarded_code(
        GuardedCode(code, manager, compiled, f"Torch-Compiled Region: {compiled}")
    )
