"""The kernels of a scan, and what they take on a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from tttc._scan_op import scan_info
from tttc.codegen.kernel import Kernel, write_atomically
from tttc.codegen.resources import Request, ResourceError, Resources, measure
from tttc.codegen.torch_scan_backward import saved_leaves
from tttc.ir.errors import NotLowerable
from tttc.ir.program import Program
from tttc.progress import phase
from tttc.report.scans import Call
from tttc.report.text import several
from tttc.runtime.fused_scan import floating_leaves, kernels_interval
from tttc.runtime.launch import Launch
from tttc.runtime.triton_scan import run_kernels
from tttc.runtime.triton_scan_backward import narrow_states, run_backward_kernels

FLOAT64 = "it computes in float64, which runs by torch operations"


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
    anchor, carry, tokens, shared = _abstract_groups(call)
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
    return _distinct(launches)


def backward_launches(program: Program, call: Call) -> tuple[list[Launch], str | None]:
    """The same of its backward; and why it would run by torch operations instead."""
    info = scan_info(call.anchor, call.tokens, call.shared)
    if info.compute is not torch.float32:
        return [], FLOAT64
    leaves = floating_leaves(call.tokens, call.shared)
    per_token = sum(math.prod(x.shape[3:]) * x.element_size() for x in call.tokens)
    interval = kernels_interval(program, leaves, per_token, info.compute.itemsize)
    if not interval:
        return [], "its tokens run one after another: the backward runs by torch operations"
    anchor, carry, tokens, shared = _abstract_groups(call)
    anchor, carry = ([x.to(info.compute) for x in group] for group in (anchor, carry))
    place = call.arguments["place"] % program.mini_batch_size
    none = [None] * len(anchor)
    launches: list[Launch] = []
    try:
        live = saved_leaves(program, leaves)
        narrow = narrow_states(program, leaves) if interval == 1 else set()
        units = -(-max(call.length - (-place) % program.unit, 0) // program.unit)
        lead = (*tokens[0].shape[:2], -(-units // interval))
        run_backward_kernels(
            program,
            leaves,
            anchor,
            carry,
            tokens,
            shared,
            place,
            (none, none, [_like(tokens[0], shape, info.output) for shape in _outputs(program)]),
            live,
            [
                anchor[i].new_empty(
                    (*lead, *anchor[i].shape[2:]), dtype=info.output if i in narrow else None
                )
                for i in live
            ],
            interval,
            {
                f"token_{i}": _like(x, x.shape[3:], x.dtype)
                for i, x in enumerate(tokens)
                if f"token_{i}" in leaves
            },
            info.output,
            launcher=launches.append,
        )
    except NotLowerable as error:
        return [], error.reason
    return _distinct(launches), None


def _outputs(program: Program) -> list[tuple[int, ...]]:
    return program.token.output_shapes


def _like(x: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor ``[B, H, T, ...]`` that lies in memory as ``[B, T, H, ...]``, as outputs and cotangents do."""
    batch, heads, length = x.shape[:3]
    return x.new_empty((batch, length, heads, *shape), dtype=dtype).transpose(1, 2)


def _distinct(launches: Sequence[Launch]) -> list[Launch]:
    return list({id(x.kernel): x for x in reversed(launches)}.values())[::-1]


def _abstract_groups(call: Call) -> list[list[torch.Tensor]]:
    given = (call.anchor, call.carry, call.tokens, call.shared)
    return [[_abstract(x) for x in group] for group in given]


def _abstract(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def save(kernels: Sequence[Kernel]) -> None:
    """Write the sources to where :attr:`Kernel.path` says, where they aren't there yet."""
    for kernel in kernels:
        if not kernel.path.exists():
            write_atomically(kernel.path, kernel.source)


def launch_bytes(launch: Launch) -> int:
    """The bytes of the tensors of a launch: what it moves through memory, where each is read or written once."""
    tensors = (launch.tensors[name] for name, _ in launch.kernel.config["arguments"])
    return sum(_held(x) for x in tensors)


def _held(x: torch.Tensor) -> int:
    kept = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return x.element_size() * math.prod(kept)


def with_resources(wanted: Sequence[tuple[Kernel, Request | None]], target: str) -> list[Kernel]:
    """Kernels with what they take on ``target`` ("" for no figures), compiled together.

    Those that have no request, or don't compile, come without figures; the latter with the ``error``.
    """
    requests = [request for _, request in wanted if request is not None]
    found = iter(_measured(requests, target) if target else [None] * len(requests))
    made = []
    for kernel, request in wanted:
        got = next(found) if request is not None else None
        resources = got if got is None else {**got, "target": target}
        made.append(kernel if resources is None else replace(kernel, resources=resources))
    return made


def _measured(requests: list[Request], target: str) -> list[dict[str, Any]]:
    with phase("kernels", f"compiling {several(len(requests), 'kernel')} for {target}"):
        try:
            return [asdict(x) for x in measure(requests, target)]
        except ResourceError:
            return [_alone(x, target) for x in requests]


def _alone(request: Request, target: str) -> dict[str, Any]:
    try:
        found: list[Resources] = measure([request], target, timeout=120)
    except ResourceError as error:
        return {"error": str(error)}
    return asdict(found[0])
