"""The torch backend of a scan: the same bodies, run by torch operations on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tttc.ir.body import Body, role
from tttc.ir.program import Program

Tensor = torch.Tensor


def squeeze_features(x: Tensor, lead: int) -> Tensor:
    """``x`` without its axes of size 1 after the first ``lead``, as bodies take their arguments."""
    shape = [*x.shape[:lead], *(n for n in x.shape[lead:] if n != 1)]
    return x if len(shape) == x.ndim else x.reshape(shape)


def _arguments(
    body: Body,
    anchor: Sequence[Tensor],
    carry: Sequence[Tensor],
    tokens: Sequence[Tensor],
    shared: Sequence[Tensor],
    constants: Sequence[Tensor],
) -> list[Tensor]:
    groups = {"anchor": anchor, "carry": carry, "token": tokens, "shared": shared, "constant": constants}
    return [groups[kind][i] for kind, i in map(role, body.placeholders)]


def run_program(
    program: Program,
    anchor: Sequence[Tensor],
    carry: Sequence[Tensor],
    tokens: Sequence[Tensor],
    shared: Sequence[Tensor],
    place: int,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Scan a program over tokens.

    Args:
        program: the program; its mini-batch size is used.
        anchor, carry: state leaves ``[B, H, ...]`` in the dtype to compute in; ``carry`` empty: at the anchor.
        tokens: leaves ``[B, H, T, ...]``, T at least 1.
        shared: leaves ``[H, ...]``.
        place: tokens already read of the mini-batch.

    Returns:
        New anchor, new carry and output leaves, all in the dtype computed in.
    """
    dtype = anchor[0].dtype
    state_shapes = [x.shape for x in anchor]
    anchor = [squeeze_features(x, 2) for x in anchor]
    carry = [squeeze_features(x, 2) for x in carry] if carry else anchor
    floating = [x.to(dtype) if x.is_floating_point() else x for x in tokens]
    tokens = [squeeze_features(x, 3) for x in floating]
    shared = [squeeze_features(x.to(dtype) if x.is_floating_point() else x, 1) for x in shared]
    device = anchor[0].device
    constants = [
        x.to(device, dtype if x.is_floating_point() else x.dtype) for x in program.token.constants
    ]
    b, length = program.mini_batch_size, tokens[0].shape[2]
    pieces: list[list[Tensor]] = []
    start = 0
    while start < length:
        if program.sequential:
            body, count = program.token, 1
            now = [x[:, :, start] for x in tokens]
        else:
            assert program.full is not None and program.continued is not None
            count = min(b - place, length - start)
            body = program.full if place == 0 else program.continued
            now = [x[:, :, start : start + count] for x in tokens]
        if place == 0:
            anchor = carry
        results = body.gm(*_arguments(body, anchor, carry, now, shared, constants))
        carry = list(results[: body.states])
        outputs = list(results[body.states :])
        pieces.append([x.unsqueeze(2) for x in outputs] if program.sequential else outputs)
        start += count
        place = (place + count) % b
    if place == 0:
        anchor = carry
    outputs = [torch.cat(z, 2) for z in zip(*pieces, strict=True)]
    lead = tokens[0].shape[:3]
    shaped = [
        z.reshape(*lead, *shape) for z, shape in zip(outputs, program.token.output_shapes, strict=True)
    ]
    return (
        [x.expand(*lead[:2], *x.shape[2:]).reshape(s) for x, s in zip(anchor, state_shapes, strict=True)],
        [x.expand(*lead[:2], *x.shape[2:]).reshape(s) for x, s in zip(carry, state_shapes, strict=True)],
        shaped,
    )
