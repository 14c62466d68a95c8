"""``torch.ops.tttc.fused_scan_backward``, and the autograd of ``torch.ops.tttc.fused_scan`` by it."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import fx

from tttc._garbage import not_collected
from tttc._scan_op import interned, scan_info
from tttc.codegen.torch_scan_backward import run_backward, saved_leaves
from tttc.ir.errors import NotLowerable
from tttc.pipeline import build_program
from tttc.runtime.fused_scan import (
    LIBRARY,
    floating_leaves,
    fused_scan,
    grouped,
    runs_by_kernels,
)
from tttc.runtime.launch import Launch
from tttc.runtime.ranges import scan_range
from tttc.runtime.replay import remembered
from tttc.runtime.staged import Launcher
from tttc.runtime.triton_scan_backward import run_backward_kernels

Tensor = torch.Tensor
BACKENDS = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
RECOMPUTED = 16  # mini-batches at a time, where the forward saved no states


def fused_scan_backward(
    grads: list[Tensor | None],
    anchor: list[Tensor],
    carry: list[Tensor],
    tokens: list[Tensor],
    shared: list[Tensor],
    saved: list[Tensor],
    wanted: list[bool],
    key: str,
    mini_batch_size: int,
    place: int,
    backend: str,
    states: bool,
    interval: int,
    layer: str = "",
    tune: bool = False,
) -> list[Tensor]:
    """Cotangents of the arguments of ``tttc::fused_scan`` that are ``wanted``, each like its argument.

    ``grads``: of its results, None for none; ``saved``: the states it saved, if any.
    """
    program = build_program(interned(key), mini_batch_size)
    place %= mini_batch_size
    groups = (anchor, carry, tokens, shared, saved)
    given = tuple(g is not None for g in grads)
    counts = (sum(given), *(len(group) for group in groups))
    rest = (place, backend, states, interval, tune)

    def run(flat: list[Tensor], launcher: Launcher) -> list[Tensor]:
        some, anchor, carry, tokens, shared, saved = grouped(flat, counts)
        found = iter(some)
        all_ = [next(found) if g else None for g in given]
        these = (anchor, carry, tokens, shared, saved)
        return _run(program, all_, *these, wanted, *rest, launcher)

    flat = [x for group in groups for x in group]
    # The first backward of a program derives it.
    collecting = nullcontext() if program.reversed else not_collected()
    with scan_range("backward", key, layer), collecting:
        program.reversed = True
        call = ("backward", counts, given, tuple(wanted), rest)
        return remembered(program, call, [*(g for g in grads if g is not None), *flat], run)


def fused_scan_backward_launches(
    grads: list[Tensor | None],
    anchor: list[Tensor],
    carry: list[Tensor],
    tokens: list[Tensor],
    shared: list[Tensor],
    saved: list[Tensor],
    wanted: list[bool],
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
    """What :func:`fused_scan_backward` would launch on a device, as
    :func:`tttc.runtime.fused_scan.fused_scan_launches`.
    """
    program = build_program(interned(key), mini_batch_size)
    compute = scan_info(anchor, tokens, shared).compute
    refused = program.no_kernels or program.no_backward_kernels
    if tune or refused or not saved or not runs_by_kernels(backend, device, compute):
        return []
    launches: list[Launch] = []
    _run(
        program, grads, anchor, carry, tokens, shared, saved, wanted, place % mini_batch_size, backend,
        states, interval, tune, launches.append, device,
    )  # fmt: skip
    return launches


def _run(
    program,
    grads,
    anchor,
    carry,
    tokens,
    shared,
    saved,
    wanted,
    place,
    backend,
    states,
    interval,
    tune,
    launcher,
    device=None,
) -> list[Tensor]:
    info = scan_info(anchor, tokens, shared)
    out = _empty_cotangents(anchor, carry, tokens, shared, wanted)
    if 0 in tokens[0].shape[:3]:
        return _of_nothing(out, grads, anchor, carry, wanted, states, place)
    n = len(anchor)
    by_state = (grads[:n], grads[n : 2 * n]) if states else ([None] * n, [None] * n)
    by_output = grads[2 * n if states else 0 :][: len(program.token.output_shapes)]
    names = _names(anchor, carry, tokens, shared)
    chosen = [name for name, w in zip(names, wanted, strict=True) if w]
    leaves = tuple(x for x in chosen if x.startswith(("token", "shared")))
    live = saved_leaves(program, floating_leaves(tokens, shared))
    arguments = (
        [x.to(info.compute) for x in anchor],
        [x.to(info.compute) for x in carry],
        tokens,
        shared,
        place,
        (*by_state, by_output),
        live,
        saved,
    )
    rows = {name: x for name, x in zip(chosen, out, strict=True) if name.startswith("token")}
    made = None
    refused = program.no_kernels or program.no_backward_kernels
    looking_on = device is not None  # who asks what would be launched has no values
    device = device or tokens[0].device
    if saved and not refused and runs_by_kernels(backend, device, info.compute):
        try:
            made = run_backward_kernels(
                program, leaves, *arguments, interval, rows, info.output, launcher, tune, device
            )
        except NotLowerable as error:
            program.no_backward_kernels = error.reason
    if made is None and looking_on:
        return out
    if made is None:
        made = run_backward(program, leaves, *arguments, interval or RECOMPUTED)
    to_anchor, to_carry, found = made
    found |= {f"anchor_{i}": x for i, x in enumerate(to_anchor)}
    found |= {f"carry_{i}": x for i, x in enumerate(to_carry)}
    for name, x in zip(chosen, out, strict=True):
        if found[name] is not x:
            x.copy_(found[name].reshape(x.shape))
    return out


def _names(anchor, carry, tokens, shared) -> list[str]:
    groups = {"anchor": anchor, "carry": carry, "token": tokens, "shared": shared}
    return [f"{kind}_{i}" for kind, group in groups.items() for i in range(len(group))]


def _empty_cotangents(anchor, carry, tokens, shared, wanted) -> list[Tensor]:
    """Those of tokens lie in memory as ``[B, T, H, ...]``, as projections take them."""
    rows = {id(x) for x in tokens}
    return [
        x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)
        if id(x) in rows
        else x.new_empty(x.shape)
        for x, w in zip([*anchor, *carry, *tokens, *shared], wanted, strict=True)
        if w
    ]


def _of_nothing(out, grads, anchor, carry, wanted, states, place) -> list[Tensor]:
    """Where there are no tokens, states pass through."""
    for x in out:
        x.zero_()
    if not states:
        return out
    n = len(anchor)
    total: list[Tensor | None] = [None] * (2 * n)
    for i, g in enumerate(grads[: 2 * n]):
        if g is not None:
            # At place 0 the new anchor is the carry; without a carry both are the anchor.
            target = i % n + (n if carry and (i >= n or place == 0) else 0)
            total[target] = g if total[target] is None else total[target] + g
    made = iter(out)
    for g, w in zip(total[: len(anchor) + len(carry)], wanted, strict=False):
        if w:
            x = next(made)
            if g is not None:
                x.copy_(g)
    return out


def _fake(grads, anchor, carry, tokens, shared, saved, wanted, *rest):
    return _empty_cotangents(anchor, carry, tokens, shared, wanted)


LIBRARY.define(
    f"fused_scan_backward{torch.library.infer_schema(fused_scan_backward, mutates_args=())}",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl(
    "fused_scan_backward", torch._disable_dynamo(fused_scan_backward), "CompositeExplicitAutograd"
)
torch.library.register_fake("tttc::fused_scan_backward", _fake, lib=LIBRARY)


class _FusedScan(torch.autograd.Function):
    """Autograd of ``tttc::fused_scan`` on flat arguments.

    PyTorch's own wrapper for operators on lists takes longer than short scans do, and fills cotangents with zeros for
    the states that the forward saves.
    """

    @staticmethod
    def forward(ctx, keyset, counts, rest, *flat):
        output = _below(keyset, *grouped(flat, counts), *rest)
        results = len(interned(rest[0]).outputs) + (2 * counts[0] if rest[4] else 0)
        ctx.counts, ctx.rest, ctx.results = counts, rest, results
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *output[results:], *(x for x in output[:results] if not x.is_floating_point())
        )
        ctx.save_for_backward(*flat, *output[results:])
        return tuple(output)

    @staticmethod
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        flat = saved[: sum(ctx.counts)]
        wanted = [
            needs and x.is_floating_point()
            for x, needs in zip(flat, ctx.needs_input_grad[3:], strict=True)
        ]
        alone = not torch.is_grad_enabled() and _nothing_watches()
        run = fused_scan_backward if alone else torch.ops.tttc.fused_scan_backward
        made = run(
            list(grads[: ctx.results]),
            *grouped(flat, ctx.counts),
            list(saved[len(flat) :]),
            wanted,
            *ctx.rest,
        )
        remaining = iter(made)
        return (None, None, None, *(next(remaining) if w else None for w in wanted))


def _nothing_watches() -> bool:
    """Whether no mode, tracer or transform would see an operator that is called now."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.compiler.is_compiling()
    )


def _below(keyset, *arguments):
    after = keyset & torch._C._after_ADInplaceOrView_keyset
    with torch._C._AutoDispatchBelowAutograd():
        if after.highestPriorityTypeId() in BACKENDS:  # nothing but the dispatcher is between
            return fused_scan(*arguments)
        return torch.ops.tttc.fused_scan.default.redispatch(
            keyset & torch._C._after_autograd_keyset, *arguments
        )


def _autograd(keyset, *arguments):
    groups, rest = arguments[:4], arguments[4:]
    flat = [x for group in groups for x in group]
    if torch.is_grad_enabled() and any(x.requires_grad for x in flat):
        counts = tuple(len(group) for group in groups)
        return list(_FusedScan.apply(keyset, counts, rest, *flat))
    return _below(keyset, *arguments)


LIBRARY.impl("fused_scan", _autograd, "Autograd", with_keyset=True)


def _setup_second_order(ctx, inputs, output) -> None:
    pass


def _second_order(ctx, grads):
    raise RuntimeError(
        "tttc: second-order differentiation of a compiled scan is not supported: its backward is a kernel "
        "of its own. Differentiate the uncompiled model twice instead"
    )


torch.library.register_autograd(
    "tttc::fused_scan_backward", _second_order, setup_context=_setup_second_order, lib=LIBRARY
)


def scan_arguments(node: fx.Node) -> dict[str, int] | None:
    """The places of the arguments of a compiled scan, or of its backward, by name; None for another operator."""
    if node.target not in (
        torch.ops.tttc.fused_scan.default,
        torch.ops.tttc.fused_scan_backward.default,
    ):
        return None
    schema = node.target._schema  # type: ignore[union-attr]
    return {x.name: i for i, x in enumerate(schema.arguments)}
