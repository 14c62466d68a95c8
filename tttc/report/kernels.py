"""The kernels of a scan, and what they take on a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from tttc.codegen.kernel import Kernel, write_atomically
from tttc.codegen.resources import Request, ResourceError, measure
from tttc.ir.errors import NotLowerable
from tttc.ir.program import Program
from tttc.runtime.triton_scan import scan_kernel

TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16"}
LEADING = {"token": 3, "output": 3, "shared": 1, "constant": 0}  # axes that are no features


def default_target() -> str:
    """The GPU at hand, else an H100's architecture."""
    if torch.cuda.is_available() and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).gcnArchName.partition(":")[0]
    return "sm_90"


def scan_kernels(program: Program, states: bool) -> list[Kernel]:
    """The kernels a program ran by, or, where it ran by torch operations, those it would take on a GPU."""
    if program.kernels:
        return [saved(k) for k in program.kernels.values()]
    parallel = ["full", "continued"] if states else ["outputs"]
    try:
        return [
            saved(scan_kernel(program, part))
            for part in (["tokens"] if program.sequential else parallel)
        ]
    except NotLowerable:
        return []


def saved(kernel: Kernel) -> Kernel:
    """The kernel, its source where :attr:`Kernel.path` says."""
    if not kernel.path.exists():
        write_atomically(kernel.path, kernel.source)
    return kernel


def scan_request(kernel: Kernel, dtype: torch.dtype) -> Request:
    """The kernel as it is launched on contiguous tensors, tokens of ``dtype``, states float32."""
    import triton.language as tl

    tokens = TYPES.get(dtype, "*fp32")
    signature: dict[str, str] = {"T": "i32", "H": "i32", "place": "i32"}
    constants: dict[str, Any] = {"DOT": tl.dtype(tokens.removeprefix("*")), "PRECISION": "tf32"}
    aligned = []
    for name, rank in kernel.config["arguments"]:
        kind = name.rpartition("_")[0]
        signature[name] = tokens if kind in ("token", "output", "shared") else "*fp32"
        aligned.append(name)
        leading = LEADING.get(kind, 2)
        for axis in range(rank):
            stride = f"{name}_s{axis}"
            if axis == rank - 1 and rank > leading:
                constants[stride] = 1  # as a launch specialises it
            else:
                signature[stride] = "i32"
                if rank > leading:
                    aligned.append(stride)
    schedule = asdict(kernel.config["schedule"])
    options = {k: v for k, v in schedule.items() if k in ("num_warps", "maxnreg") and v is not None}
    return Request.of(kernel, signature, constexprs=constants, options=options, aligned=aligned)


def with_resources(kernels: Sequence[Kernel], dtype: torch.dtype, target: str) -> list[Kernel]:
    """Copies of scan kernels with their resources on ``target``; as they are where they don't compile for it."""
    try:
        found = measure([scan_request(k, dtype) for k in kernels], target)
    except ResourceError:
        return list(kernels)
    return [
        replace(k, resources={**asdict(r), "target": target})
        for k, r in zip(kernels, found, strict=True)
    ]
