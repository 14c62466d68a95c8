"""Kernels loaded on a GPU and ready to be started, each made once, in this thread or ahead of time in others.

They are started by the launcher that PyTorch has for TorchInductor's kernels: Triton 3.6 has a C compiler make one for each
signature, 0.3 s each, and takes twice as long to launch.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.runtime.errors import OutOfResources
from tttc.codegen.devices import device_of
from tttc.codegen.machine_code import (
    MachineCode,
    keep,
    kept,
    machine_code,
    may_be_kept,
    passed_on,
    path_of,
)
from tttc.codegen.specialised import Specialised

Grid = tuple[int, int, int]
log = logging.getLogger("tttc.kernels")
_lock = threading.Lock()
_made: dict[tuple[str, int], Future[Executable]] = {}
_pool: ThreadPoolExecutor | None = None


class Executable:
    """A kernel that can be started.

    Args:
        wanted: what it is.
        code: to load, or what Triton made where only Triton can start it.
        device: to load it on.
        path: a file that holds the code.

    Raises:
        OutOfResources: where it takes more than the device has.
    """

    def __init__(
        self, wanted: Specialised, code: MachineCode | Any, device: int, path: Path | None = None
    ) -> None:
        self._wanted, self._device = wanted, device
        self._triton = None  # what Triton made, where it starts it
        if isinstance(code, MachineCode):
            self._passed = code.passed
            self._function = _loaded(code, device, path)
            self._how = (code.warps, code.shared, code.types)
            self._scratch = (None,) * (len(code.types) - len(code.passed))
        else:
            self._passed, self._triton = passed_on(code), code
        self._by_us = self._triton is None

    def passed(self, arguments: Sequence[Any]) -> list[Any]:
        """Of the arguments before constants those that are not compiled in."""
        return [arguments[i] for i in self._passed]

    def start(self, grid: Grid, passed: Sequence[int]) -> None:
        """Start it on the current stream, on what :meth:`passed` gave, addresses for tensors."""
        if not self._by_us or _watched():
            self._triton = self._triton or self._wanted.compiled()
            self._triton[grid](*self._wanted.all_arguments(passed, self._passed))
            return
        torch._C._StaticCudaLauncher._launch_kernel(  # type: ignore[attr-defined]
            self._function, *grid, *self._how, (*passed, *self._scratch),
            torch._C._cuda_getCurrentRawStream(self._device),
        )  # fmt: skip


def _watched() -> bool:
    """Whether somebody, a profiler of Triton's say, is to be told of launches: Triton tells them."""
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def _loaded(code: MachineCode, device: int, path: Path | None) -> int:
    if path is None:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code.cubin)
            file.flush()
            return _loaded(code, device, Path(file.name))
    function, registers, _ = torch._C._StaticCudaLauncher._load_kernel(  # type: ignore[attr-defined]
        str(path), code.name, code.shared, device
    )[-3:]
    held = 32 * code.warps * (-(-registers // 8) * 8)
    most = device_of(torch.device("cuda", device)).registers
    if held > most:
        raise OutOfResources(held, most, "registers")
    return int(function)


def executable(wanted: Specialised, device: int) -> Executable:
    """The kernel on a GPU, the current one: loaded, read from disk or compiled once for all threads.

    Raises:
        OutOfResources: where it takes more than the device has.
        Miscompiled: where no assembler gets it right.
    """
    key = wanted.digest(), device
    with _lock:
        found = _made.get(key)
        mine = found is None
        if found is None:
            found = _made[key] = Future()
    if mine:
        _make(found, wanted, key)
    return found.result()


def begin(wanted: Specialised, device: int) -> None:
    """Make a kernel in another thread; whoever asks for it meanwhile waits. What fails says so when it is launched."""
    key = wanted.digest(), device
    with _lock:
        if key in _made:
            return
        made: Future[Executable] = Future()
        try:
            _threads().submit(_make, made, wanted, key, elsewhere=True)
        except RuntimeError as error:  # no more threads, or the process ends
            log.info("%s is not compiled ahead: %s", wanted.kernel.name, error)
            return
        _made[key] = made


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count() or 1, "tttc: kernels")
        # Before the process waits for its threads: a script that has failed compiles nothing more.
        threading._register_atexit(_pool.shutdown, wait=False, cancel_futures=True)  # type: ignore[attr-defined]
    return _pool


def _make(
    made: Future[Executable], wanted: Specialised, key: tuple[str, int], elsewhere: bool = False
) -> None:
    """Make a kernel, for who waits for ``made``; ``elsewhere``: in a thread of ours, which has no GPU of its own yet."""
    try:
        if elsewhere:
            torch.cuda.set_device(key[1])
        made.set_result(_new(wanted, key[1]))
    except BaseException as error:  # the next one that asks tries again
        with _lock:
            _made.pop(key, None)
        made.set_exception(error)


def _new(wanted: Specialised, device: int) -> Executable:
    if torch.version.hip is not None or not hasattr(torch._C, "_StaticCudaLauncher"):
        return Executable(wanted, wanted.compiled(), device)
    path = path_of(wanted, device) if may_be_kept() else None
    code = kept(path) if path is not None and not knobs.compilation.always_compile else None
    if code is not None:
        with suppress(RuntimeError):  # a file that no driver loads
            return Executable(wanted, code, device, path)
    triton = wanted.compiled()
    code = machine_code(triton)
    properties: Any = torch.cuda.get_device_properties(device)
    # PyTorch's launcher does not give a program all of the shared memory there is.
    if code is None or code.shared >= properties.shared_memory_per_block_optin:
        return Executable(wanted, triton, device)
    written = path is not None and keep(path, code)
    return Executable(wanted, code, device, path if written else None)
