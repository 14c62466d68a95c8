"""Checks of what users pass to :func:`tttc.scan`: every error names the argument, what was expected and what came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class ScanInfo:
    """Sizes and dtypes of one scan."""

    batch: int
    heads: int
    length: int
    compute: torch.dtype  # what the step computes in, and the dtype of states
    output: torch.dtype  # the dtype of floating outputs


def check_mini_batch_size(mini_batch_size: Any, name: str = "mini_batch_size") -> None:
    """Raise unless ``mini_batch_size`` is an integer of at least 1."""
    if isinstance(mini_batch_size, bool) or not isinstance(mini_batch_size, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int of at least 1, got {mini_batch_size!r}")
    if mini_batch_size < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {mini_batch_size}")


def check_positive(value: Any, name: str) -> int:
    """``value``, an int of at least 1; raise naming the argument otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {value}")
    return value


def named_leaves(tree: Any, name: str) -> list[tuple[str, Any]]:
    """The leaves of a pytree with the names a user would write, ``tokens.k`` or ``shared['w']``."""
    return [
        (name + pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0]
    ]


def compute_dtype(*groups: list[torch.Tensor]) -> torch.dtype:
    """The widest floating dtype of the tensors, at least float32."""
    dtype = torch.float32
    for group in groups:
        for x in group:
            if x.is_floating_point():
                dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def output_dtype(tokens: list[torch.Tensor], compute: torch.dtype) -> torch.dtype:
    """The widest floating dtype of the tokens; the dtype computed in where no token is floating."""
    dtype = None
    for x in tokens:
        if x.is_floating_point():
            dtype = x.dtype if dtype is None else torch.promote_types(dtype, x.dtype)
    return compute if dtype is None else dtype


def _check_tensor(name: str, leaf: Any, device: torch.device | None) -> None:
    if not isinstance(leaf, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(leaf).__name__}")
    if device is not None and leaf.device != device:
        raise ValueError(f"{name}: expected device {device}, got {leaf.device}")


def _check_state_leaf(
    name: str, leaf: Any, batch: int, heads: int, device: torch.device, batched: bool
) -> torch.Tensor:
    _check_tensor(name, leaf, device)
    if not leaf.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype for a state, got {leaf.dtype}")
    if leaf.ndim >= 2 and leaf.shape[1] == heads and (batched or leaf.shape[0] == batch):
        if leaf.shape[0] != batch:
            raise ValueError(f"{name}: expected batch size {batch} first, got {tuple(leaf.shape)}")
        return leaf
    if not batched and leaf.ndim >= 1 and leaf.shape[0] == heads:
        return leaf.expand(batch, *leaf.shape)
    shapes = "[B, H, ...]" if batched else "[B, H, ...] or [H, ...]"
    raise ValueError(
        f"{name}: expected {shapes} with B = {batch} and H = {heads}, got shape {tuple(leaf.shape)}"
    )


def check_scan_inputs(step, anchor, carry, place, tokens, mini_batch_size, shared):
    """Validate the arguments of a scan and bring the state to ``[B, H, ...]`` in the compute dtype.

    Returns ``(anchor, carry, tokens, ScanInfo)``.
    """
    if not callable(step):
        raise TypeError(f"step: expected a function, got {type(step).__name__}")
    token_leaves = named_leaves(tokens, "tokens")
    if not token_leaves:
        raise ValueError("tokens: expected at least one tensor [B, H, T, ...], got an empty tree")
    first_name, first = token_leaves[0]
    _check_tensor(first_name, first, None)
    for name, leaf in token_leaves:
        _check_tensor(name, leaf, first.device)
        if leaf.is_complex():
            raise TypeError(f"{name}: expected a real dtype, got {leaf.dtype}")
        if leaf.ndim < 3:
            raise ValueError(f"{name}: expected rank 3 or more, [B, H, T, ...], got {tuple(leaf.shape)}")
        if leaf.shape[:3] != first.shape[:3]:
            raise ValueError(
                f"{name}: expected [B, H, T] = {tuple(first.shape[:3])} as in {first_name}, "
                f"got {tuple(leaf.shape)}"
            )
    batch, heads, length = first.shape[:3]
    if not 0 <= place < mini_batch_size:
        raise ValueError(
            f"init.place: expected a place in the mini-batch, 0 to {mini_batch_size - 1}, got {place}"
        )
    shared_tensors = []
    for name, leaf in named_leaves(shared, "shared"):
        if isinstance(leaf, torch.Tensor):
            _check_tensor(name, leaf, first.device)
            if leaf.is_complex():
                raise TypeError(f"{name}: expected a real dtype, got {leaf.dtype}")
            if leaf.ndim < 1 or leaf.shape[0] != heads:
                raise ValueError(
                    f"{name}: expected [H, ...] with H = {heads}, got shape {tuple(leaf.shape)}"
                )
            shared_tensors.append(leaf)

    batched = carry is not None
    anchor_names = named_leaves(anchor, "init.anchor" if batched else "init")
    if not anchor_names:
        raise ValueError("init: expected at least one state tensor, got an empty tree")
    anchors = [
        _check_state_leaf(name, leaf, batch, heads, first.device, batched)
        for name, leaf in anchor_names
    ]
    carries = []
    if batched:
        carry_names = named_leaves(carry, "init.carry")
        carries = [
            _check_state_leaf(name, leaf, batch, heads, first.device, batched)
            for name, leaf in carry_names
        ]
        if [x.shape for x in carries] != [x.shape for x in anchors]:
            raise ValueError("init.carry: expected a tree of the shapes of init.anchor")
    token_tensors = [leaf for _, leaf in token_leaves]
    compute = compute_dtype(token_tensors, shared_tensors, anchors, carries)
    info = ScanInfo(batch, heads, length, compute, output_dtype(token_tensors, compute))
    spec = pytree.tree_structure(anchor)
    anchor = pytree.tree_unflatten([x.to(compute) for x in anchors], spec)
    if batched:
        carry = pytree.tree_unflatten([x.to(compute) for x in carries], spec)
    return anchor, carry, tokens, info
