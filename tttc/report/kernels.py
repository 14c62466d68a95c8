"""The kernels of a scan, and what they take on a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import torch

from tttc._scan_op import scan_info
from tttc.codegen.kernel import Kernel, write_atomically
from tttc.codegen.resources import ResourceError, measure
from tttc.ir.errors import NotLowerable
from tttc.ir.program import Program
from tttc.report.scans import Call
from tttc.runtime.launch import Launch
from tttc.runtime.triton_scan import run_kernels


def default_target() -> str:
    """The GPU at hand, else an H100's architecture."""
    if not torch.cuda.is_available():
        return "sm_90"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(0).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def scan_launches(program: Program, call: Call) -> list[Launch]:
    """The first launch of each kernel that a scan runs by on a GPU, on tensors without values.

    Empty where it would run by torch operations: computed in float64, or an operator has no Triton form.
    """
    info = scan_info(call.anchor, call.tokens, call.shared)
    if info.compute is not torch.float32:
        return []
    given = (call.anchor, call.carry, call.tokens, call.shared)
    anchor, carry, tokens, shared = ([_abstract(x) for x in group] for group in given)
    launches: list[Launch] = []
    try:
        run_kernels(
            program,
            anchor,
            carry,
            tokens,
            shared,
            call.arguments["place"],
            info.output,
            call.arguments.get("states", True),
            launcher=launches.append,
            device=call.tokens[0].device,
        )
    except NotLowerable:
        return []
    return list({id(x.kernel): x for x in reversed(launches)}.values())[::-1]


def _abstract(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def save(kernels: Sequence[Kernel]) -> None:
    """Write the sources to where :attr:`Kernel.path` says, where they aren't there yet."""
    for kernel in kernels:
        if not kernel.path.exists():
            write_atomically(kernel.path, kernel.source)


def kernels_of(launches: Sequence[Launch], target: str) -> list[Kernel]:
    """The kernels of launches with their resources on ``target`` ("" for no figures).

    Those that don't compile for it come without.
    """
    if not target:
        return [x.kernel for x in launches]
    try:
        found = measure([x.request() for x in launches], target)
    except ResourceError:
        return [x.kernel for x in launches]
    return [
        replace(x.kernel, resources={**asdict(r), "target": target})
        for x, r in zip(launches, found, strict=True)
    ]
