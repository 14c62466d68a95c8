"""Blocks of a model that are the same program, and the guards of one put on another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch._dynamo.guards import install_guard
from torch._guards import ChainedSource, Guard, Source
from torch.utils.weak import TensorWeakRef

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)


def alike(a: Any, b: Any, same: dict[int, int] | None = None) -> bool:
    """Whether two modules are the same program: in classes, attributes, and tensors but for what these hold.

    Args:
        same: of modules and tensors met so far, which one of ``b`` stands for which one of ``a``.
    """
    same = {} if same is None else same
    if type(a) is not type(b):
        return False
    if isinstance(a, (nn.Module, torch.Tensor)):
        if id(a) in same or id(b) in same.values():  # what is shared in one is shared in the other
            return same.get(id(a)) == id(b)
        same[id(a)] = id(b)
    if isinstance(a, nn.Module):
        return alike(vars(a), vars(b), same)
    if isinstance(a, torch.Tensor):
        if type(a) not in (torch.Tensor, nn.Parameter) or a._backward_hooks or b._backward_hooks:
            return False
        return _kind(a) == _kind(b) and alike(vars(a), vars(b), same)
    if isinstance(a, _PLAIN):
        return repr(a) == repr(b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(alike(v, b[k], same) for k, v in a.items())
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(alike(x, y, same) for x, y in zip(a, b, strict=True))
    return a is b or (isinstance(a, set) and not a and not b)


def _kind(x: torch.Tensor) -> Any:
    return x.shape, x.stride(), x.dtype, x.device, x.layout, x.requires_grad, x.is_leaf


def is_from(source: Source, other: Source) -> bool:
    """Whether something comes from what another source says; PyTorch 2.11's own looks at the first of all alone."""
    while source != other:
        if not isinstance(source, ChainedSource):
            return False
        source = source.base
    return True


def by_another_name(
    operands: Iterable[Source | None],
    block: Source,
    own: dict[int, int],
    value: Callable[[Source], Any],
) -> bool:
    """Whether what a block was traced with from elsewhere is its own: of another block it would be something else.

    Args:
        operands: sources of what the traced graph is called with.
        own: by identity, the modules and tensors of the block, as :func:`alike` met them.
    """
    return any(
        source is not None and not is_from(source, block) and id(value(source)) in own
        for source in operands
    )


def guarded(
    tx: Any,
    entry: Any,
    changed: list[tuple[Source, Source]],
    arguments: set[Source | None],
    value: Callable[[Source], Any],
) -> bool:
    """Put the guards that tracing one block left on another; False, and none, where it is not known how.

    Args:
        entry: of what was traced; what is found out about it is kept with it.
        changed: sources of what the one was given, and of what the other is.
        arguments: sources of tensors that are arguments of the graph: they have guards as such.
        value: what is at a source.
    """
    guards = []
    for old, new in changed:
        move = mover(old, new)
        for guard in _guards_on(tx, entry, old):
            if guard.create_fn_name() == "TENSOR_MATCH" and guard.originating_source in arguments:
                continue
            moved = _moved(guard, move, value)
            if moved is None:
                return False
            guards.append(moved)
    install_guard(*guards)
    return True


def _guards_on(tx: Any, entry: Any, source: Source) -> list[Guard]:
    """The guards on what comes from a source, looked for once: later ones are not of the trace."""
    found: dict[Source, list[Guard]] = vars(entry).setdefault("tttc_guards", {})
    if source not in found:
        found[source] = [g for g in tx.output.guards if is_from(g.originating_source, source)]
    return found[source]


def mover(old: Source, new: Source) -> Callable[[Source], Source]:
    """From something of one source to the same of another; many have most of the way in common, which is gone once."""

    @functools.cache
    def move(source: Source) -> Source:
        if source == old:
            return new
        parts = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}  # type: ignore[arg-type]
        moved = {k: move(v) for k, v in parts.items() if isinstance(v, Source)}
        if all(v is parts[k] for k, v in moved.items()):
            return source
        return dataclasses.replace(source, **moved)  # type: ignore[type-var]

    return move


def _moved(
    guard: Guard, move: Callable[[Source], Source], value: Callable[[Source], Any]
) -> Guard | None:
    """A guard on something of one source, on the same of another; None where what it compares with is unknown."""

    def moved(given: Any) -> Any:
        if isinstance(given, Source):
            return move(given)
        return TensorWeakRef(value(source)) if isinstance(given, TensorWeakRef) else given

    source, create = move(guard.originating_source), guard.create_fn
    if isinstance(create, functools.partial):
        given = (*create.args, *create.keywords.values())
        if not all(isinstance(x, (*_PLAIN, Source, TensorWeakRef)) for x in given):
            return None
        # The same thing by another name, which may be no part of the block.
        if any(isinstance(x, Source) and value(move(x)) is not value(source) for x in given):
            return None
        keywords = {k: moved(v) for k, v in create.keywords.items()}
        create = functools.partial(create.func, *map(moved, create.args), **keywords)
    return source.make_guard(create)
