"""Checks of what users pass to :func:`tttc.scan`: every error names the argument, what was expected and what came."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tttc import _tracing


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


def leaves_of(tree: Any) -> list[Any]:
    """The leaves of a pytree, in its order. Written out, because TorchDynamo takes long to see through pytree's own."""
    found: list[Any] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[Any]) -> None:
    if isinstance(tree, torch.Tensor):
        found.append(tree)
    elif type(tree) in (tuple, list) or (isinstance(tree, tuple) and hasattr(tree, "_fields")):
        for child in tree:
            _collect(child, found)
    elif type(tree) is dict:
        for child in tree.values():
            _collect(child, found)
    else:
        found += pytree.tree_leaves(tree)


def _named(tree: Any, name: str, i: int) -> str:
    """What a user would call a leaf: for messages, where it need not be fast."""
    return named_leaves(tree, name)[i][0]


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


def _check_tensor(tree: Any, name: str, i: int, leaf: Any, device: torch.device | None) -> None:
    """Raise unless leaf ``i`` of a tree, ``name`` to the user, is a tensor on the device."""
    if not isinstance(leaf, torch.Tensor):
        raise TypeError(f"{_named(tree, name, i)}: expected a tensor, got {type(leaf).__name__}")
    if device is not None and leaf.device != device:
        raise ValueError(f"{_named(tree, name, i)}: expected device {device}, got {leaf.device}")


def _check_state_leaf(
    tree: Any,
    name: str,
    i: int,
    leaf: Any,
    batch: int,
    heads: int,
    device: torch.device,
    batched: bool,
) -> None:
    _check_tensor(tree, name, i, leaf, device)
    if not leaf.is_floating_point():
        raise TypeError(
            f"{_named(tree, name, i)}: expected a floating dtype for a state, got {leaf.dtype}"
        )
    if leaf.ndim >= 2 and leaf.shape[1] == heads and leaf.shape[0] == batch:
        return
    if batched or leaf.ndim < 1 or leaf.shape[0] != heads:
        shapes = "[B, H, ...]" if batched else "[B, H, ...] or [H, ...]"
        raise ValueError(
            f"{_named(tree, name, i)}: expected {shapes} with B = {batch} and H = {heads}, "
            f"got shape {tuple(leaf.shape)}"
        )


def _with_batch(leaves, step, init, tokens, shared, batch, heads) -> list[torch.Tensor]:
    """The checked leaves of ``init``, each ``[B, H, ...]``."""
    # Heads first: they are constants of a captured program, and the batch size shall stay a symbol.
    square = [x.ndim >= 2 and x.shape[0] == heads and x.shape[1] == heads for x in leaves]
    if any(square) and batch == heads:
        per_head = _reads_per_head(step, init, tokens, shared, square)
        batched = [both and not per_head for both in square]
    else:
        batched = [x.ndim >= 2 and x.shape[1] == heads and x.shape[0] == batch for x in leaves]
    return [
        x if has_batch else x.expand(batch, *x.shape)
        for x, has_batch in zip(leaves, batched, strict=True)
    ]


def check_step_result(result: Any, carry: Any) -> tuple[Any, Any]:
    """What a step returned, split; raises unless it is a carry like ``carry`` and an output of tensors."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"step: expected it to return (carry, output), got {type(result).__name__}")
    new, z = result
    expected, got = pytree.tree_structure(carry), pytree.tree_structure(new)
    if expected != got:
        raise ValueError(
            f"step: expected it to return a carry like the one it was given, {expected}, got {got}"
        )
    for (name, old), leaf in zip(
        named_leaves(carry, "carry"), pytree.tree_leaves(new), strict=True
    ):
        if not isinstance(leaf, torch.Tensor):
            raise TypeError(f"step: expected a tensor for {name}, got {type(leaf).__name__}")
        if leaf.is_complex() or not leaf.is_floating_point():
            raise TypeError(f"step: expected a floating dtype for {name}, got {leaf.dtype}")
        if leaf.shape != old.shape:
            raise ValueError(
                f"step: expected {name} to keep its shape {tuple(old.shape)}, got {tuple(leaf.shape)}"
            )
    for name, leaf in named_leaves(z, "output"):
        if not isinstance(leaf, torch.Tensor):
            raise TypeError(f"step: expected a tensor for {name}, got {type(leaf).__name__}")
    return new, z


def run_one_token(step, anchor, carry, token, shared):
    """The step on one token of one head of one sequence, its result checked, its carry in the carry's dtype."""
    new, z = check_step_result(step(anchor, carry, token, shared), carry)
    new = pytree.tree_map(lambda x, old: x.to(old.dtype), new, carry)
    return new, z


def run_tokens(step, anchor, carry, token, shared):
    """:func:`run_one_token` mapped over sequences and heads: leaves ``[B, H, ...]``, of shared ``[H, ...]``."""
    params = pytree.tree_map(lambda x: 0 if isinstance(x, torch.Tensor) else None, shared)
    no_params = pytree.tree_map(lambda x: None, shared)

    def one(anchor, carry, token, shared):
        return run_one_token(step, anchor, carry, token, shared)

    heads = torch.func.vmap(one, in_dims=(0, 0, 0, params))
    return torch.func.vmap(heads, in_dims=(0, 0, 0, no_params))(anchor, carry, token, shared)


def one_like(x: Any, skip: int, lead: tuple[int, ...], compute: torch.dtype) -> Any:
    """A tensor uninitialised in the dtype the step sees, its first ``skip`` dimensions replaced by ``lead``."""
    if not isinstance(x, torch.Tensor):
        return x
    dtype = compute if x.is_floating_point() else x.dtype
    shape = (*lead, *(int(n) for n in x.shape[skip:]))
    return torch.empty(shape, dtype=dtype, device=x.device)


def _runs(step: Any, state: Any, token: Any, shared: Any) -> bool:
    log = logging.getLogger(
        "torch._subclasses.fake_tensor"
    )  # reports each failure, which here is an answer
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_tokens(step, state, state, token, shared)
    except Exception:  # whatever a user's step raises says that it does not take these shapes
        return False
    finally:
        log.disabled = before
    return True


@torch._dynamo.assume_constant_result
def _runs_described(step: Any, structure: Any, shapes: Any, dtypes: Any, device: Any) -> bool:
    with _tracing.abstract_mode():
        return _runs(step, *_tracing.one_token(structure, shapes, dtypes, device))


def _reads_per_head(step, init, tokens, shared, ambiguous: list[bool]) -> bool:
    """Whether leaves of ``init`` that could be ``[B, H, ...]`` as well as ``[H, ...]`` are the latter.

    Decided by running the step on shapes alone; ``[B, H, ...]`` where both or none run.
    """
    groups = [
        [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]
        for tree in (init, tokens, shared)
    ]
    compute = compute_dtype(*groups)
    runs = []
    for lead in ([2 if both else 1 for both in ambiguous], [1] * len(ambiguous)):
        if torch.compiler.is_dynamo_compiling():
            leads = (lead, [3] * len(groups[1]), [1] * len(groups[2]))
            shapes = tuple(
                _tracing.constant_shapes(x, n) for x, n in zip(groups, leads, strict=True)
            )
            dtypes = tuple(_tracing.seen_dtypes(x, compute) for x in groups)
            structure = _tracing.describe((init, None, tokens, shared))
            runs.append(_runs_described(step, structure, shapes, dtypes, groups[1][0].device))
        else:
            with _tracing.abstract_mode():
                state = pytree.tree_unflatten(
                    [one_like(x, n, (1, 1), compute) for x, n in zip(groups[0], lead, strict=True)],
                    pytree.tree_structure(init),
                )
                token = pytree.tree_map(lambda x: one_like(x, 3, (1, 1), compute), tokens)
                params = pytree.tree_map(lambda x: one_like(x, 1, (1,), compute), shared)
                runs.append(_runs(step, state, token, params))
    return runs[1] and not runs[0]


def check_scan_inputs(step, anchor, carry, place, tokens, mini_batch_size, shared):
    """Validate the arguments of a scan and bring the state to ``[B, H, ...]`` in the compute dtype.

    Returns ``(anchor, carry, tokens, ScanInfo)``.
    """
    anchors, carries, info = check_scan_leaves(
        step, anchor, carry, place, tokens, mini_batch_size, shared
    )
    spec = pytree.tree_structure(anchor)
    if carry is not None:
        carry = pytree.tree_unflatten(carries, spec)
    return pytree.tree_unflatten(anchors, spec), carry, tokens, info


def check_scan_leaves(step, anchor, carry, place, tokens, mini_batch_size, shared):
    """As :func:`check_scan_inputs`; the state comes as the leaves of anchor and of carry (none where that is None)."""
    if not callable(step):
        raise TypeError(f"step: expected a function, got {type(step).__name__}")
    token_leaves = leaves_of(tokens)
    if not token_leaves:
        raise ValueError("tokens: expected at least one tensor [B, H, T, ...], got an empty tree")
    first = token_leaves[0]
    _check_tensor(tokens, "tokens", 0, first, None)
    for i, leaf in enumerate(token_leaves):
        _check_tensor(tokens, "tokens", i, leaf, first.device)
        if leaf.is_complex():
            raise TypeError(
                f"{_named(tokens, 'tokens', i)}: expected a real dtype, got {leaf.dtype}"
            )
        if leaf.ndim < 3:
            raise ValueError(
                f"{_named(tokens, 'tokens', i)}: expected rank 3 or more, [B, H, T, ...], "
                f"got {tuple(leaf.shape)}"
            )
        if leaf.shape[:3] != first.shape[:3]:
            raise ValueError(
                f"{_named(tokens, 'tokens', i)}: expected [B, H, T] = {tuple(first.shape[:3])} "
                f"as in {_named(tokens, 'tokens', 0)}, got {tuple(leaf.shape)}"
            )
    batch, heads, length = first.shape[:3]
    if isinstance(place, bool) or not isinstance(place, (int, torch.SymInt)):
        raise TypeError(f"init.place: expected an int, got {type(place).__name__}")
    if not 0 <= place < mini_batch_size:
        raise ValueError(
            f"init.place: expected a place in the mini-batch, 0 to {mini_batch_size - 1}, got {place}"
        )
    shared_tensors = []
    for i, leaf in enumerate(leaves_of(shared)):
        if isinstance(leaf, torch.Tensor):
            _check_tensor(shared, "shared", i, leaf, first.device)
            if leaf.is_complex():
                raise TypeError(
                    f"{_named(shared, 'shared', i)}: expected a real dtype, got {leaf.dtype}"
                )
            if leaf.ndim < 1 or leaf.shape[0] != heads:
                raise ValueError(
                    f"{_named(shared, 'shared', i)}: expected [H, ...] with H = {heads}, "
                    f"got shape {tuple(leaf.shape)}"
                )
            shared_tensors.append(leaf)

    batched = carry is not None
    root = "init.anchor" if batched else "init"
    anchors = leaves_of(anchor)
    if not anchors:
        raise ValueError("init: expected at least one state tensor, got an empty tree")
    for i, leaf in enumerate(anchors):
        _check_state_leaf(anchor, root, i, leaf, batch, heads, first.device, batched)
    carries = leaves_of(carry) if batched else []
    if batched:
        for i, leaf in enumerate(carries):
            _check_state_leaf(carry, "init.carry", i, leaf, batch, heads, first.device, batched)
        _check_alike(anchor, carry, anchors, carries)
    else:
        anchors = _with_batch(anchors, step, anchor, tokens, shared, batch, heads)
    compute = compute_dtype(token_leaves, shared_tensors, anchors, carries)
    info = ScanInfo(batch, heads, length, compute, output_dtype(token_leaves, compute))
    return _in_dtype(anchors, compute), _in_dtype(carries, compute), info


def _in_dtype(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The tensors in a dtype; those that have it give captured graphs no operator to carry."""
    return [x if x.dtype == dtype else x.to(dtype) for x in tensors]


def _check_alike(anchor: Any, carry: Any, anchors: list[Any], carries: list[Any]) -> None:
    """Raise unless the carry is a tree like the anchor, its leaves of the same shapes."""
    described = _tracing.describe(anchor)
    alike = described is not None and described == _tracing.describe(carry)
    if not alike and [n.partition(".carry")[2] for n, _ in named_leaves(carry, ".carry")] != [
        n.partition(".anchor")[2] for n, _ in named_leaves(anchor, ".anchor")
    ]:
        raise ValueError(
            f"init.carry: expected a tree like init.anchor, {pytree.tree_structure(anchor)}, "
            f"got {pytree.tree_structure(carry)}"
        )
    for i, (leaf, other) in enumerate(zip(carries, anchors, strict=True)):
        if leaf.shape != other.shape:
            raise ValueError(
                f"{_named(carry, 'init.carry', i)}: expected the shape of "
                f"{_named(anchor, 'init.anchor', i)}, {tuple(other.shape)}, got {tuple(leaf.shape)}"
            )
