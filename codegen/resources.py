"""Registers, spills and shared memory of Triton kernels, for targets that need not be at hand.

The kernels are compiled in a process of their own: there they are real ``triton.jit`` functions even where
this process runs under ``TRITON_INTERPRET=1``, and no device is ever asked for. That process runs this very
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tttc.codegen.kernel import Kernel

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


class ResourceError(RuntimeError):
    """A kernel does not compile for a target; the message names both."""


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
    _target(target)
    if not requests:
        return []
    job = {"target": target, "requests": [_plain(r) for r in requests]}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps(job),
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ResourceError(f"compiling for {target} took more than {timeout:g} s") from None
    lines = [x for x in done.stdout.splitlines() if x.startswith(_MARK)]
    results = [json.loads(x.removeprefix(_MARK)) for x in lines]
    if len(results) != len(requests):
        raise ResourceError(
            f"{requests[len(results)].name} for {target}: the compiling process ended with "
            f"{done.returncode}: {done.stderr[-2000:].strip()}"
        )
    for request, result in zip(requests, results, strict=True):
        if "error" in result:
            raise ResourceError(f"{request.name} for {target}: {result['error']}")
    return [Resources(**r) for r in results]


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


def _compile(request: dict[str, Any], target: str) -> Resources:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    spec = importlib.util.spec_from_file_location(Path(request["path"]).stem, request["path"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, request["name"])
    constants = {
        k: tl.dtype(v["dtype"]) if isinstance(v, dict) else v
        for k, v in request["constexprs"].items()
    }
    names = list(function.arg_names)
    missing = [n for n in names if n not in request["signature"] and n not in constants]
    if missing:
        raise ValueError(f"no type and no value for {', '.join(missing)}")
    signature = {n: "constexpr" if n in constants else request["signature"][n] for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in request["aligned"]}
    if function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource  # type: ignore
    source = ASTSource(function, signature, constants, attributes)
    compiled = triton.compile(
        source, target=GPUTarget(*_target(target)), options=request["options"]
    )
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


def _main() -> None:
    # Kernels may print while they compile; results are told apart by their mark.
    job = json.load(sys.stdin)
    for request in job["requests"]:
        try:
            result: dict[str, Any] = asdict(_compile(request, job["target"]))
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print(_MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    # As a script, this folder heads the path; its modules are none of Triton's business.
    sys.path.pop(0)
    _main()
