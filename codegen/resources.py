"""Registers, spills and shared memory of Triton kernels, for targets that need not be at hand.

The kernels are compiled in processes of their own: there they are real ``triton.jit`` functions even where
this process runs under ``TRITON_INTERPRET=1``, and no device is ever asked for. Such a process runs this very
file as a script, so nothing of ours is imported at the top.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tttc.codegen.kernel import Kernel

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


class ResourceError(RuntimeError):
    """A kernel does not compile for a target; the message names both."""


class NotInTime(ResourceError):
    """A kernel was not compiled in the time that there was."""


@dataclass(frozen=True)
class Resources:
    """What one program of a kernel takes: per thread registers and spilled bytes, per program shared memory."""

    registers: int
    spill_bytes: int
    shared_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.registers} registers, {self.spill_bytes} B spilled, "
            f"{self.shared_bytes / 1024:.1f} KiB shared"
        )


@dataclass(frozen=True)
class Request:
    """One kernel to compile.

    Args:
        path: the Python file that holds the ``triton.jit`` function.
        name: the function.
        signature: Triton types of the arguments that are not constant: ``{"x": "*bf16", "n": "i32"}``.
        constexprs: values of the constant ones: numbers, strings, None or Triton dtypes.
        options: ``num_warps``, ``num_stages`` and whatever else Triton's backend takes.
        aligned: arguments that are multiples of 16 (pointers of whole tensors, strides), as a launch finds them.
    """

    path: str
    name: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    aligned: Sequence[str] = ()

    @classmethod
    def of(cls, kernel: Kernel, signature: Mapping[str, str], **rest: Any) -> Request:
        """The request for an emitted kernel; its source is written where it isn't there yet."""
        from tttc.codegen.kernel import write_atomically

        if not kernel.path.exists():
            write_atomically(kernel.path, kernel.source)
        return cls(str(kernel.path), kernel.name, signature, **rest)


def measure(
    requests: Sequence[Request], target: str = "sm_90", timeout: float = 600
) -> list[Resources]:
    """The resources of kernels compiled for ``target``: ``"sm_80"``, ``"sm_90"``, ``"sm_100"``, ``"gfx942"``, ...

    Raises:
        ValueError: ``target`` is of neither form.
        ResourceError: a kernel does not compile, or the compiling process died.

    Example:
        >>> from tttc.codegen.resources import Request, measure
        >>> source = '''
        ... import triton, triton.language as tl
        ... @triton.jit
        ... def double(x, N: tl.constexpr):
        ...     i = tl.arange(0, N)
        ...     tl.store(x + i, 2 * tl.load(x + i))
        ... '''
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "double.py"
        >>> _ = path.write_text(source)
        >>> (got,) = measure([Request(str(path), "double", {"x": "*fp32"}, {"N": 128})], "sm_90")
        >>> got.spill_bytes
        0
    """
    found = []
    for result in compile_all(requests, target, timeout=timeout):
        if isinstance(result, ResourceError):
            raise result
        found.append(result)
    return found


def compile_all(
    requests: Sequence[Request],
    target: str = "sm_90",
    workers: int = 1,
    timeout: float = 600,
    done: Callable[[int], None] | None = None,
) -> list[Resources | ResourceError]:
    """Compile kernels in processes of their own, in the order given; Triton's cache on disk keeps what they make.

    Args:
        workers: processes at a time.
        timeout: seconds after which those not compiled yet are given up.
        done: called with the number of a request when it is compiled, or is not.

    Returns:
        For each request its resources, or why there are none.

    Raises:
        ValueError: ``target`` is of neither form.
        TypeError: a constant that cannot be handed over.
    """
    _target(target)
    results: list[Resources | ResourceError] = [
        NotInTime(f"{r.name} for {target}: compiling took more than {timeout:g} s")
        for r in requests
    ]
    lines = [json.dumps({"target": target, "request": _plain(r)}) for r in requests]
    waiting = iter(range(len(requests)))
    lock = threading.Lock()
    end = time.monotonic() + timeout

    def work() -> None:
        worker: _Worker | None = None
        while True:
            with lock:
                i = next(waiting, None)
            if i is None or time.monotonic() > end:
                break
            worker = worker or _Worker()
            made = worker.compile(lines[i], end - time.monotonic())
            if isinstance(made, str):
                results[i] = ResourceError(f"{requests[i].name} for {target}: {made}")
            elif made is not None:
                results[i] = made
            if done is not None:
                done(i)
            if not worker.alive():
                worker.close()
                worker = None
        if worker is not None:
            worker.close()

    threads = [threading.Thread(target=work) for _ in range(min(workers, len(requests)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class _Worker:
    """A process that compiles one kernel after another: this file as a script."""

    def __init__(self) -> None:
        # Real kernels, whatever this process runs; no device is asked for.
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self.errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  (as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def alive(self) -> bool:
        return self.process.poll() is None

    def compile(self, line: str, seconds: float) -> Resources | str | None:
        """What came of a job, in words where it failed; None where it took longer."""
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        try:
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            # Kernels may print while they compile; results are told apart by their mark.
            while answer := self.process.stdout.readline():
                if answer.startswith(_MARK):
                    result = json.loads(answer.removeprefix(_MARK))
                    return result["error"] if "error" in result else Resources(**result)
        except BrokenPipeError:
            pass
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if late:
            return None
        code = self.process.wait()
        self.errors.seek(0)
        return f"the compiling process ended with {code}: {self.errors.read()[-2000:].strip()}"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


_MARK = "@resources "


def _target(name: str) -> tuple[str, int | str, int]:
    """Triton's backend, architecture and warp size for ``sm_90`` or ``gfx942``."""
    if cuda := re.fullmatch(r"sm_(\d+)", name):
        return "cuda", int(cuda[1]), 32
    if re.fullmatch(r"gfx\w+", name):
        return "hip", name, 64 if name.startswith("gfx9") else 32
    raise ValueError(f"target: expected a name like sm_90 or gfx942, got {name!r}")


def _plain(request: Request) -> dict[str, Any]:
    values = {k: _encoded(k, v) for k, v in request.constexprs.items()}
    return {**asdict(request), "constexprs": values}


def _encoded(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if type(value).__module__.startswith("triton") and hasattr(value, "name"):
        return {"dtype": value.name}
    raise TypeError(
        f"constexprs[{name!r}]: expected a number, a string or a Triton dtype, got {value!r}"
    )


# -- in the compiling process -----------------------------------------------------------------------------

_DTYPES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "i64": "int64",
           "i32": "int32", "i16": "int16", "i8": "int8", "u8": "uint8", "i1": "bool"}  # fmt: skip
_INTEGERS = {
    ("i32", True): 16,
    ("i32", False): 17,
    ("i64", True): 1 << 40,
    ("i64", False): 17 + (1 << 40),
}


class _Pointer:
    """A tensor as the launch of a kernel looks at it."""

    def __init__(self, kind: str, aligned: bool) -> None:
        self.dtype = f"torch.{_DTYPES[kind[1:]]}"
        self.aligned = aligned

    def data_ptr(self) -> int:
        return 0 if self.aligned else 1

    def stride(self) -> tuple[int, ...]:
        return (1,)


class _Absent:
    """A device that is not there: enough of one to compile for."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*_target(self.target))


def _compile(request: dict[str, Any], target: str, assembled: Callable[..., Any]) -> Resources:
    import triton.language as tl
    from triton.runtime.driver import driver

    # As a launch imports it: the name is part of what the cache on disk tells kernels apart by.
    name = f"tttc_kernels.{Path(request['path']).stem}"
    spec = importlib.util.spec_from_file_location(name, request["path"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, request["name"])
    given = {
        k: tl.dtype(v["dtype"]) if isinstance(v, dict) else v
        for k, v in request["constexprs"].items()
    }
    for argument, kind in request["signature"].items():
        aligned = argument in request["aligned"]
        given[argument] = (
            _Pointer(kind, aligned) if kind.startswith("*") else _INTEGERS[kind, aligned]
        )
    missing = [n for n in function.arg_names if n not in given]
    if missing:
        raise ValueError(f"no type and no value for {', '.join(missing)}")
    driver.set_active(_Absent(target))
    # The very path of a launch, so that one finds in the cache on disk what was made here.
    function.device_caches.clear()

    def made(more: dict[str, Any]) -> Any:
        return function.warmup(grid=(1,), **given, **request["options"], **more)

    _, compiled = assembled(made)
    shared = int(compiled.metadata.shared)
    if "cubin" in compiled.asm:
        return _of_cubin(compiled.asm["cubin"], shared)
    return _of_amdgcn(compiled.asm["amdgcn"], shared)


def _of_cubin(cubin: bytes, shared: int) -> Resources:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump does not say what the kernel takes: {text}")
    return Resources(int(found[1]), int(found[2]), shared)


def _of_amdgcn(text: str, shared: int) -> Resources:
    def number(key: str) -> int:
        found = re.search(rf"^\s*\.{key}:\s*(\d+)", text, re.MULTILINE)
        return int(found[1]) if found else 0

    spilled = max(4 * number("vgpr_spill_count"), number("private_segment_fixed_size"))
    return Resources(number("vgpr_count"), spilled, max(shared, number("group_segment_fixed_size")))


def _main(assembled: Callable[..., Any]) -> None:
    for line in sys.stdin:
        job = json.loads(line)
        try:
            result: dict[str, Any] = asdict(_compile(job["request"], job["target"], assembled))
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print(_MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    # As a script, this folder heads the path; its modules are none of Triton's business.
    from assembler import assembled

    sys.path.pop(0)
    _main(assembled)
