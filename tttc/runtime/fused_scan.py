"""``torch.ops.tttc.fused_scan``: a compiled scan as one operator."""

from __future__ import annotations

import os

import torch

from tttc._scan_op import interned, scan_info
from tttc.codegen.torch_scan import run_program
from tttc.ir.errors import NotLowerable
from tttc.pipeline import build_program
from tttc.runtime.triton_scan import run_kernels, scan_kernel

Tensor = torch.Tensor


def uses_triton(backend: str, device: torch.device, compute: torch.dtype) -> bool:
    """Whether a scan on this device, computed in this dtype, runs by kernels.

    Raises:
        ValueError: ``backend="triton"`` where no kernel can run.
    """
    if backend == "torch" or compute is not torch.float32:
        return False  # matrix units have no float64 worth the name: torch operations are as fast
    if device.type == "cuda":
        return True
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend: 'triton' expected tensors on a GPU (or TRITON_INTERPRET=1), got {device}"
        )
    return backend == "triton"


def _by_kernels(program, anchor, carry, tokens, shared, place, info, states) -> list[Tensor] | None:
    try:
        for part in ["tokens"] if program.sequential else ["full", "continued"]:
            scan_kernel(program, part, states)
    except NotLowerable as error:
        program.no_kernels = error.reason
        return None
    out = run_kernels(program, anchor, carry, tokens, shared, place, info.output, states)
    return [x for group in out for x in group]


@torch.library.custom_op("tttc::fused_scan", mutates_args=())
def fused_scan(
    anchor: list[Tensor],
    carry: list[Tensor],
    tokens: list[Tensor],
    shared: list[Tensor],
    key: str,
    mini_batch_size: int,
    place: int,
    backend: str,
    states: bool,
) -> list[Tensor]:
    """A compiled scan; arguments as those of ``torch.ops.tttc.scan``.

    Returns new anchor and new carry leaves where ``states``, then output leaves ``[B, H, T, ...]``, which lie
    in memory as ``[B, T, H, ...]``.
    """
    info = scan_info(anchor, tokens, shared)
    program = build_program(interned(key), mini_batch_size)
    if 0 in tokens[0].shape[:3]:
        now = carry or anchor
        kept = [x.to(info.compute).clone() for x in (*(now if place == 0 else anchor), *now)]
        outputs = _empty_outputs(tokens, key, info)
        return [*kept, *outputs] if states else outputs
    if uses_triton(backend, tokens[0].device, info.compute) and program.no_kernels is None:
        out = _by_kernels(program, anchor, carry, tokens, shared, place, info, states)
        if out is not None:
            return _unaliased(out, [*anchor, *carry])
    new_anchor, new_carry, z = run_program(
        program, anchor, carry, tokens, shared, place, states
    )
    outputs = _empty_outputs(tokens, key, info)
    for x, y in zip(outputs, z, strict=True):
        x.copy_(y)
    return _unaliased([*new_anchor, *new_carry, *outputs], [*anchor, *carry]) if states else outputs


def _empty_outputs(tokens, key, info) -> list[Tensor]:
    return [
        tokens[0]
        .new_empty(
            (info.batch, info.length, info.heads, *shape),
            dtype=info.output if dtype.is_floating_point else dtype,
        )
        .transpose(1, 2)
        for shape, dtype in interned(key).outputs
    ]


def _unaliased(results: list[Tensor], arguments: list[Tensor]) -> list[Tensor]:
    """Results that share no memory with each other or with arguments, as operators must return them."""
    seen = {x.untyped_storage().data_ptr() for x in arguments}
    out = []
    for x in results:
        pointer = x.untyped_storage().data_ptr()
        if pointer in seen and x.numel():
            x = x.clone(memory_format=torch.contiguous_format)
        seen.add(pointer)
        out.append(x)
    return out


@fused_scan.register_fake
def _fused_scan_fake(
    anchor, carry, tokens, shared, key, mini_batch_size, place, backend, states
):
    info = scan_info(anchor, tokens, shared)
    outputs = _empty_outputs(tokens, key, info)
    if not states:
        return outputs
    return [x.new_empty(x.shape, dtype=info.compute) for x in (*anchor, *anchor)] + outputs
