"""``torch.ops.tttc.fused_scan``: a compiled scan as one operator."""

from __future__ import annotations

import torch

from tttc._scan_op import interned, scan_fake, scan_info
from tttc.codegen.torch_scan import run_program
from tttc.pipeline import build_program

Tensor = torch.Tensor


def _run_torch(anchor, carry, tokens, shared, key, mini_batch_size, place) -> list[Tensor]:
    info = scan_info(anchor, tokens, shared)
    program = build_program(interned(key), mini_batch_size)
    new_anchor, new_carry, z = run_program(program, anchor, carry, tokens, shared, place)
    return [
        *new_anchor,
        *new_carry,
        *(x.to(info.output) if x.is_floating_point() else x for x in z),
    ]


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
) -> list[Tensor]:
    """A compiled scan; arguments and results as those of ``torch.ops.tttc.scan``, and the backend's name."""
    if 0 in tokens[0].shape[:3]:
        state = carry or anchor
        kept = [x.clone() for x in (*(state if place == 0 else anchor), *state)]
        return kept + scan_fake(anchor, carry, tokens, shared, key, mini_batch_size, place)[len(kept) :]
    out = _run_torch(anchor, carry, tokens, shared, key, mini_batch_size, place)
    return [x.clone() for x in out]


@fused_scan.register_fake
def _fused_scan_fake(anchor, carry, tokens, shared, key, mini_batch_size, place, backend):
    return scan_fake(anchor, carry, tokens, shared, key, mini_batch_size, place)
