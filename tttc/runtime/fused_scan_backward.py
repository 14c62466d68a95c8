"""``torch.ops.tttc.fused_scan_backward``, and the autograd of ``torch.ops.tttc.fused_scan`` by it."""

from __future__ import annotations

import torch

from tttc._scan_op import interned, scan_info
from tttc.codegen.torch_scan_backward import run_backward, saved_leaves
from tttc.ir.errors import KernelTooLarge, NotLowerable
from tttc.pipeline import build_program
from tttc.runtime.fused_scan import floating_leaves, fused_scan, runs_by_kernels
from tttc.runtime.ranges import scan_range
from tttc.runtime.triton_scan_backward import backward_kernels, run_backward_kernels

Tensor = torch.Tensor
RECOMPUTED = 16  # mini-batches at a time, where the forward saved no states


@torch.library.custom_op("tttc::fused_scan_backward", mutates_args=())
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
) -> list[Tensor]:
    """Cotangents of the arguments of ``tttc::fused_scan`` that are ``wanted``, each like its argument.

    ``grads``: of its results, None for none; ``saved``: the states it saved, if any.
    """
    program = build_program(interned(key), mini_batch_size)
    place %= mini_batch_size
    with scan_range("backward", key, layer):
        return _run(
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
        )


def _run(
    program, grads, anchor, carry, tokens, shared, saved, wanted, place, backend, states, interval
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
    if saved and _has_kernels(program, leaves, backend, tokens[0], info.compute):
        try:
            made = run_backward_kernels(program, leaves, *arguments, interval, rows, info.output)
        except KernelTooLarge as error:
            program.no_backward_kernels = error.reason
    if made is None:
        made = run_backward(program, leaves, *arguments, interval or RECOMPUTED)
    to_anchor, to_carry, found = made
    found |= {f"anchor_{i}": x for i, x in enumerate(to_anchor)}
    found |= {f"carry_{i}": x for i, x in enumerate(to_carry)}
    for name, x in zip(chosen, out, strict=True):
        if found[name] is not x:
            x.copy_(found[name].reshape(x.shape))
    return out


def _has_kernels(program, leaves, backend, token, compute) -> bool:
    refused = program.no_kernels or program.no_backward_kernels
    if refused is not None or not runs_by_kernels(backend, token.device, compute):
        return False
    try:
        for part in program.parts("token"):
            backward_kernels(program, part, leaves)
    except NotLowerable as error:
        program.no_backward_kernels = error.reason
        return False
    return True


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


@fused_scan_backward.register_fake
def _fake(grads, anchor, carry, tokens, shared, saved, wanted, *rest):
    return _empty_cotangents(anchor, carry, tokens, shared, wanted)


def _setup_context(ctx, inputs, output) -> None:
    anchor, carry, tokens, shared, key, *rest = inputs
    states = rest[3]
    ctx.counts = (len(anchor), len(carry), len(tokens), len(shared))
    ctx.rest = (key, *rest)
    results = len(interned(key).outputs) + (2 * len(anchor) if states else 0)
    ctx.results = results
    ctx.save_for_backward(*anchor, *carry, *tokens, *shared, *output[results:])


def _backward(ctx, grads):
    arguments = iter(ctx.saved_tensors)
    groups = [[next(arguments) for _ in range(n)] for n in ctx.counts]
    wanted = [
        needs and x.is_floating_point()
        for group, flags in zip(groups, ctx.needs_input_grad, strict=False)
        for x, needs in zip(group, flags, strict=True)
    ]
    made = torch.ops.tttc.fused_scan_backward(
        list(grads)[: ctx.results], *groups, list(arguments), wanted, *ctx.rest
    )
    remaining, flags = iter(made), iter(wanted)
    back = [[next(remaining) if next(flags) else None for _ in group] for group in groups]
    # The dispatcher leaves a last argument out where it has its default, and wants no gradient of it then.
    given = ctx.rest if ctx.rest[-1] else ctx.rest[:-1]
    return (*back, *(None for _ in given))


fused_scan.register_autograd(_backward, setup_context=_setup_context)


def _setup_second_order(ctx, inputs, output) -> None:
    pass


def _second_order(ctx, grads):
    raise RuntimeError(
        "tttc: second-order differentiation of a compiled scan is not supported: its backward is a kernel "
        "of its own. Differentiate the uncompiled model twice instead"
    )


fused_scan_backward.register_autograd(_second_order, setup_context=_setup_second_order)
