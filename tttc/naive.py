"""The naive loop: the specification that every compiled form is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from tttc import _tracing
from tttc._checks import ScanInfo, one_like, run_tokens


def cast_floating(tree: Any, dtype: torch.dtype) -> Any:
    """The tree with its floating tensors in ``dtype``."""
    return pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, tree
    )


def abstract_output(step, anchor, tokens, shared, info: ScanInfo) -> Any:
    """The output of the step for one token of one head of one sequence, ``[1, 1, ...]``; no values."""
    with _tracing.abstract_mode():
        state = pytree.tree_map(lambda x: one_like(x, 2, (1, 1), info.compute), anchor)
        token = pytree.tree_map(lambda x: one_like(x, 3, (1, 1), info.compute), tokens)
        params = pytree.tree_map(lambda x: one_like(x, 1, (1,), info.compute), shared)
        return run_tokens(step, state, state, token, params)[1]


def naive_loop(
    step: Any,
    anchor: Any,
    carry: Any,
    place: int,
    tokens: Any,
    mini_batch_size: int,
    shared: Any,
    info: ScanInfo,
) -> tuple[tuple[Any, Any], Any]:
    """Token after token; state leaves ``[B, H, ...]`` in the compute dtype, token leaves ``[B, H, T, ...]``.

    Returns ``((anchor, carry), z)``, z's leaves ``[B, H, T, ...]``. ``carry=None`` means: at the anchor.
    """
    carry = anchor if carry is None else carry
    tokens = cast_floating(tokens, info.compute)
    shared = cast_floating(shared, info.compute)
    device = pytree.tree_leaves(tokens)[0].device
    autocast_off = torch.autocast(device.type, enabled=False)
    if info.batch == 0 or info.heads == 0 or info.length == 0:
        with autocast_off:
            abstract = abstract_output(step, anchor, tokens, shared, info)
        z = pytree.tree_map(
            lambda x: torch.empty(
                (info.batch, info.heads, info.length, *x.shape[2:]), dtype=x.dtype, device=device
            ),
            abstract,
        )
    else:
        with autocast_off:
            (anchor, carry), z = _loop(step, anchor, carry, place, tokens, mini_batch_size, shared)
    if (place + info.length) % mini_batch_size == 0:
        anchor = carry
    return (anchor, carry), cast_floating(z, info.output)


def _loop(step, anchor, carry, place, tokens, mini_batch_size, shared):
    length = pytree.tree_leaves(tokens)[0].shape[2]
    outputs = []
    callback = _tracing.token_callback()
    for t in range(length):
        if callback is not None:
            callback()
        if (place + t) % mini_batch_size == 0:
            anchor = carry
        token = pytree.tree_map(lambda x, t=t: x[:, :, t], tokens)
        carry, z = run_tokens(step, anchor, carry, token, shared)
        outputs.append(z)
    return (anchor, carry), pytree.tree_map(lambda *zs: torch.stack(zs, 2), *outputs)
