"""``torch.ops.tttc.fused_scan``: a compiled scan as one operator."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import islice

import torch

from tttc._checks import compute_dtype
from tttc._scan_op import interned, scan_info
from tttc.codegen.torch_scan import run_program
from tttc.codegen.torch_scan_backward import save_interval, saved_bytes, saved_leaves
from tttc.ir.errors import NotLowerable
from tttc.ir.program import Program
from tttc.pipeline import build_program
from tttc.runtime.launch import Launch
from tttc.runtime.ranges import scan_range
from tttc.runtime.replay import remembered
from tttc.runtime.saved_states import empty_states
from tttc.runtime.staged import Launcher
from tttc.runtime.triton_scan import run_kernels
from tttc.runtime.triton_scan_backward import narrow_states

Tensor = torch.Tensor
SEGMENT = 32  # mini-batches that the backward computes again together, where states are large


def runs_by_kernels(backend: str, device: torch.device, compute: torch.dtype) -> bool:
    """Whether a scan on this device, computed in this dtype, runs by kernels."""
    if backend == "torch" or compute is not torch.float32:
        return False  # matrix units have no float64 worth the name: torch operations are as fast
    return device.type == "cuda" or (
        backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    )


def uses_triton(backend: str, device: torch.device, compute: torch.dtype) -> bool:
    """As :func:`runs_by_kernels`.

    Raises:
        ValueError: ``backend="triton"`` where no kernel can run.
    """
    runs = runs_by_kernels(backend, device, compute)
    if backend == "triton" and compute is torch.float32 and not runs:
        raise ValueError(
            f"backend: 'triton' expected tensors on a GPU (or TRITON_INTERPRET=1), got {device}"
        )
    return runs


def _by_kernels(
    program,
    anchor,
    carry,
    tokens,
    shared,
    place,
    info,
    states,
    saved,
    interval,
    tune,
    launcher,
    device=None,
) -> list[Tensor] | None:
    """The scan by kernels; None, and remembered, where they can't be made or the device can't hold them."""
    save = (
        dict(zip(saved_leaves(program, floating_leaves(tokens, shared)), saved, strict=True))
        if saved
        else None
    )
    try:
        out = run_kernels(
            program,
            anchor,
            carry,
            tokens,
            shared,
            place,
            info.output,
            states,
            save=save,
            interval=interval or 1,
            tune=tune,
            launcher=launcher,
            device=device,
        )
    except NotLowerable as error:
        program.no_kernels = error.reason
        return None
    return [*(x for group in out for x in group), *saved]


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
    interval: int,
    layer: str = "",
    tune: bool = False,
) -> list[Tensor]:
    """A compiled scan; arguments as those of ``torch.ops.tttc.scan``, ``layer`` names it to profilers, ``tune`` has
    the schedules of its kernels searched for.

    Returns new anchor and new carry leaves where ``states``, then output leaves ``[B, H, T, ...]``, which lie
    in memory as ``[B, T, H, ...]``. Where ``interval`` is not 0, what the backward needs of the states follows:
    leaves ``[B, H, S, ...]``, one for every ``interval``-th mini-batch that starts at its anchor.
    """
    program = build_program(interned(key), mini_batch_size)
    place %= mini_batch_size  # which may not be the model's own
    counts = (len(anchor), len(carry), len(tokens), len(shared))
    rest = (key, place, backend, states, interval, tune)

    def run(flat: list[Tensor], launcher: Launcher) -> list[Tensor]:
        anchor, carry, tokens, shared = grouped(flat, counts)
        return _run(program, anchor, carry, tokens, shared, *rest, launcher)

    with scan_range("forward", key, layer):
        call = ("forward", counts, rest)
        return remembered(program, call, [*anchor, *carry, *tokens, *shared], run)


def fused_scan_launches(
    anchor: list[Tensor],
    carry: list[Tensor],
    tokens: list[Tensor],
    shared: list[Tensor],
    key: str,
    mini_batch_size: int,
    place: int,
    backend: str,
    states: bool,
    interval: int,
    layer: str = "",
    tune: bool = False,
    *,
    device: torch.device,
) -> list[Launch]:
    """What :func:`fused_scan` would launch on a device, told from tensors without values (device "meta").

    Nothing where it runs by torch operations, or is about to search for schedules.
    """
    info = scan_info(anchor, tokens, shared)
    program = build_program(interned(key), mini_batch_size)
    by_kernels = program.no_kernels is None and runs_by_kernels(backend, device, info.compute)
    if tune or not by_kernels or 0 in tokens[0].shape[:3]:
        return []
    place %= mini_batch_size
    saved = _empty_saved(program, anchor, tokens, shared, place, interval, info, backend)
    launches: list[Launch] = []
    _by_kernels(
        program, anchor, carry, tokens, shared, place, info, states, saved, interval, tune,
        launches.append, device,
    )  # fmt: skip
    return launches


def grouped(flat: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    """As many tensors in each group as ``counts`` say."""
    arguments = iter(flat)
    return [list(islice(arguments, n)) for n in counts]


def _run(
    program, anchor, carry, tokens, shared, key, place, backend, states, interval, tune, launcher
) -> list[Tensor]:
    info = scan_info(anchor, tokens, shared)
    if 0 in tokens[0].shape[:3]:
        now = carry or anchor
        kept = [x.to(info.compute).clone() for x in (*(now if place == 0 else anchor), *now)]
        empty = _empty_outputs(tokens, key, info)
        saved = _empty_saved(program, anchor, tokens, shared, place, interval, info, backend)
        return [*(kept if states else []), *empty, *saved]
    saved = _empty_saved(program, anchor, tokens, shared, place, interval, info, backend)
    if program.no_kernels is None and uses_triton(backend, tokens[0].device, info.compute):
        out = _by_kernels(
            program, anchor, carry, tokens, shared, place, info, states, saved, interval, tune, launcher
        )  # fmt: skip
        if out is not None:
            return _unaliased(out, [*anchor, *carry, *tokens, *shared])
    starts: list[list[Tensor]] | None = [] if interval else None
    outputs = _empty_outputs(tokens, key, info)
    new_anchor, new_carry, _ = run_program(
        program, anchor, carry, tokens, shared, place, states, starts, interval, outputs
    )
    if starts:
        live = saved_leaves(program, floating_leaves(tokens, shared))
        for x, i in zip(saved, live, strict=True):
            torch.stack([leaves[i].reshape(anchor[i].shape) for leaves in starts], 2, out=x)
    kept = [*new_anchor, *new_carry] if states else []
    return _unaliased([*kept, *outputs, *saved], [*anchor, *carry, *tokens, *shared])


def floating_leaves(tokens: Sequence[Tensor], shared: Sequence[Tensor]) -> tuple[str, ...]:
    """The names of the token and shared leaves that have cotangents."""
    named = {f"token_{i}": x for i, x in enumerate(tokens)}
    named |= {f"shared_{i}": x for i, x in enumerate(shared)}
    return tuple(name for name, x in named.items() if x.is_floating_point())


def saving_interval(
    anchor: list[Tensor],
    carry: list[Tensor],
    tokens: list[Tensor],
    shared: list[Tensor],
    key: str,
    mini_batch_size: int,
    backend: str,
) -> int:
    """The ``interval`` of a call of ``tttc::fused_scan`` with these arguments: 0 where no gradient is asked for."""
    arguments = [*anchor, *carry, *tokens, *shared]
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in arguments):
        return 0
    program = build_program(interned(key), mini_batch_size)
    leaves = floating_leaves(tokens, shared)
    token_bytes = sum(math.prod(map(int, x.shape[3:])) * x.dtype.itemsize for x in tokens)
    compute = compute_dtype(anchor, tokens, shared)
    if not runs_by_kernels(backend, tokens[0].device, compute):
        return save_interval(program, leaves, token_bytes, compute.itemsize)
    return kernels_interval(program, leaves, token_bytes, compute.itemsize)


def kernels_interval(
    program: Program, leaves: tuple[str, ...], token_bytes: int, element_bytes: int
) -> int:
    """The mini-batches from one saved state to the next where the backward runs by kernels; 0: it does not."""
    if program.sequential and program.mini_batch_size > 1:
        return 0
    if program.save_interval is not None:
        return program.save_interval
    # Every state is kept where those of a mini-batch are not much larger than its tokens.
    state_bytes = saved_bytes(program, leaves, element_bytes)
    return 1 if state_bytes <= 8 * program.unit * token_bytes else SEGMENT


def _empty_saved(program, anchor, tokens, shared, place, interval, info, backend) -> list[Tensor]:
    if not interval:
        return []
    leaves = floating_leaves(tokens, shared)
    # Kernels of the backward read some states by products alone, which round them to the dtype of the tokens; where
    # a segment is computed again from its first state, that is kept as it is.
    narrow = (
        narrow_states(program, leaves)
        if interval == 1 and runs_by_kernels(backend, tokens[0].device, info.compute)
        else set()
    )
    b = program.unit
    # How often states are saved: every mini-batch but the one that others have begun, if there is one.
    mini_batches = (info.length - (-place) % b + b - 1) // b
    count = (mini_batches + interval - 1) // interval
    return [
        empty_states(
            (info.batch, info.heads, count),
            anchor[i].shape[2:],
            info.output if i in narrow else info.compute,
            anchor[i].device,
        )
        for i in saved_leaves(program, leaves)
    ]


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


def _fused_scan_fake(
    anchor,
    carry,
    tokens,
    shared,
    key,
    mini_batch_size,
    place,
    backend,
    states,
    interval,
    layer="",
    tune=False,
):
    info = scan_info(anchor, tokens, shared)
    outputs = _empty_outputs(tokens, key, info)
    kept = [x.new_empty(x.shape, dtype=info.compute) for x in (*anchor, *anchor)] if states else []
    if not interval:
        return [*kept, *outputs]
    program = build_program(interned(key), mini_batch_size)
    saved = _empty_saved(program, anchor, tokens, shared, place, interval, info, backend)
    return [*kept, *outputs, *saved]


# Defined by hand, as its autograd is (fused_scan_backward.py): a call has to cost less than the kernels it launches.
LIBRARY = torch.library.Library("tttc", "FRAGMENT")
LIBRARY.define(
    f"fused_scan{torch.library.infer_schema(fused_scan, mutates_args=())}",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("fused_scan", torch._disable_dynamo(fused_scan), "CompositeExplicitAutograd")
torch.library.register_fake("tttc::fused_scan", _fused_scan_fake, lib=LIBRARY)
