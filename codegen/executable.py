"""Kernels loaded on a GPU and ready to be started, each made once, in this thread or ahead of time in others.

They are started by the launcher that PyTorch has for TorchInductor's kernels: Triton 3.6 has a C compiler make one for each
signature, 0.3 s each, and takes twice as long to launch.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

import torch
from triton import knobs
from triton.runtime.errors import OutOfResources
from tttc.codegen.machine_code import MachineCode, keep, kept, machine_code, passed_on, path_of
from tttc.codegen.specialised import Specialised

REGISTERS = 65536  # of a multiprocessor, on every GPU that kernels are compiled for
Grid = tuple[int, int, int]
_lock = threading.Lock()
_made: dict[tuple[str, int], Future[Executable]] = {}
_ahead: set[Future[Any]] = set()
_pool: ThreadPoolExecutor | None = None


class Executable:
    """A kernel that can be started.

    Args:
        wanted: what it is.
        code: to load, or what Triton made where only Triton can start it.
        device: to load it on.

    Raises:
        OutOfResources: where it takes more than the device has.
    """

    def __init__(self, wanted: Specialised, code: MachineCode | Any, device: int) -> None:
        self._wanted, self._device = wanted, device
        self._triton = None if isinstance(code, MachineCode) else code
        self._passed = code.passed if isinstance(code, MachineCode) else passed_on(code)
        if isinstance(code, MachineCode):
            self._function = _loaded(code, device)
            self._how = (code.warps, code.shared, code.types)
            self._scratch = (None,) * (len(code.types) - len(code.passed))

    def passed(self, arguments: Sequence[Any]) -> list[Any]:
        """Of the arguments before constants those that are not compiled in."""
        return [arguments[i] for i in self._passed]

    def start(self, grid: Grid, passed: Sequence[int]) -> None:
        """Start it on the current stream, on what :meth:`passed` gave, addresses for tensors."""
        if self._triton is not None or _watched():
            self._by_triton(grid, passed)
            return
        torch._C._StaticCudaLauncher._launch_kernel(  # type: ignore[attr-defined]
            self._function, *grid, *self._how, (*passed, *self._scratch),
            torch._C._cuda_getCurrentRawStream(self._device),
        )  # fmt: skip

    def _by_triton(self, grid: Grid, passed: Sequence[int]) -> None:
        made = self._triton or self._wanted.compiled(_alone)
        made[grid](*self._wanted.all_arguments(passed, self._passed))


def _watched() -> bool:
    """Whether somebody, a profiler of Triton's say, is to be told of launches: Triton tells them."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def _loaded(code: MachineCode, device: int) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    most = properties.shared_memory_per_block_optin
    if code.shared > most:
        raise OutOfResources(code.shared, most, "shared memory")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.cubin)
        file.flush()
        found = torch._C._StaticCudaLauncher._load_kernel(  # type: ignore[attr-defined]
            file.name, code.name, code.shared, device
        )
    function, registers, _ = found[-3:]
    held = 32 * code.warps * (-(-registers // 8) * 8)
    if held > REGISTERS:
        raise OutOfResources(held, REGISTERS, "registers")
    return int(function)


def _direct() -> bool:
    """Whether kernels are started by PyTorch's launcher."""
    return torch.version.hip is None and hasattr(torch._C, "_StaticCudaLauncher")


def executable(wanted: Specialised, device: int) -> Executable:
    """The kernel on a GPU, the current one: loaded, read from disk or compiled once for all threads.

    Raises:
        OutOfResources: where it takes more than the device has.
        Miscompiled: where no assembler gets it right.
    """
    key = wanted.digest(), device
    while True:
        with _lock:
            found = _made.get(key)
            mine = found is None
            if found is None:
                found = _made[key] = Future()
        if mine:
            _make(found, wanted, device, key, _alone)
        with suppress(_Later):
            return found.result()


def begin(wanted: Specialised, device: int) -> None:
    """Make a kernel in another thread; whoever asks for it meanwhile waits. What fails says so when it is launched."""
    key = wanted.digest(), device
    with _lock:
        if key in _made:
            return
        made = _made[key] = Future()
        running = _threads().submit(_make_there, made, wanted, device, key)
        _ahead.add(running)
    running.add_done_callback(_ahead.discard)


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "tttc: kernels")
    return _pool


def _make_there(
    made: Future[Executable], wanted: Specialised, device: int, key: tuple[str, int]
) -> None:
    torch.cuda.set_device(device)
    _make(made, wanted, device, key, _later)


class _Later(Exception):
    """It has to be compiled while nothing else is."""


def _later() -> None:
    raise _Later


def _alone() -> None:
    """Wait until no other thread of ours compiles."""
    wait(list(_ahead))


def _make(
    made: Future[Executable],
    wanted: Specialised,
    device: int,
    key: tuple[str, int],
    alone: Callable[[], None],
) -> None:
    try:
        made.set_result(_new(wanted, device, alone))
    except BaseException as error:  # the next one that asks tries again
        with _lock:
            _made.pop(key, None)
        made.set_exception(error)


def _new(wanted: Specialised, device: int, alone: Callable[[], None]) -> Executable:
    if not _direct():
        return Executable(wanted, wanted.compiled(alone), device)
    path = path_of(wanted, device)
    code = None if knobs.compilation.always_compile else kept(path)
    if code is not None:
        with suppress(RuntimeError):  # a file that no driver loads
            return Executable(wanted, code, device)
    triton = wanted.compiled(alone)
    code = machine_code(triton)
    if code is None:
        return Executable(wanted, triton, device)
    keep(path, code)
    return Executable(wanted, code, device)
