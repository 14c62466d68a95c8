"""Blocks of a model that are the same program, and the guards of one put on another."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch._dynamo.guards import install_guard
from torch._guards import ChainedSource, Guard, Source
from torch.utils.weak import TensorWeakRef

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)
_MUTABLE = (dict, OrderedDict, list, set)
KNOWN = ("torch.nn.", "tttc.")


def is_known(module: nn.Module) -> bool:
    """Whether what a module does is known to follow from what is in it: somebody's may ask who it is, or what was before."""
    return type(module).__module__.startswith(KNOWN) and "forward" not in vars(module)


@dataclasses.dataclass
class Pairs:
    """By identity: which part of one block stands for which of another."""

    there: dict[int, int] = dataclasses.field(default_factory=dict)
    back: dict[int, int] = dataclasses.field(default_factory=dict)

    def pair(self, a: Any, b: Any) -> bool | None:
        """Whether two parts stand for each other, where one was met; None, and they do from now on, where none was."""
        if id(a) in self.there or id(b) in self.back:
            return self.there.get(id(a)) == id(b)
        self.there[id(a)], self.back[id(b)] = id(b), id(a)
        return None


def alike(a: Any, b: Any, same: Pairs | None = None) -> bool:
    """Whether two modules are the same program: in classes, attributes, and tensors but for what these hold.

    What is shared in one has to be shared in the other.

    Args:
        same: what was met of them so far.
    """
    same = Pairs() if same is None else same
    kind = type(a)
    if kind is not type(b):
        return False
    if kind in _PLAIN:
        return repr(a) == repr(b)
    if isinstance(a, (nn.Module, torch.Tensor)) or kind in _MUTABLE:
        met = same.pair(a, b)
        if met is not None:
            return met
    if isinstance(a, nn.Module):
        return is_known(a) and is_known(b) and alike(vars(a), vars(b), same)
    if isinstance(a, torch.Tensor):
        if kind not in (torch.Tensor, nn.Parameter) or a._backward_hooks or b._backward_hooks:
            return False
        return _kind(a) == _kind(b) and alike(vars(a), vars(b), same)
    if kind in (dict, OrderedDict):
        keys = [[(type(k), k) for k in x] for x in (a, b)]
        return keys[0] == keys[1] and all(alike(v, b[k], same) for k, v in a.items())
    if kind in (tuple, list):
        return len(a) == len(b) and all(alike(x, y, same) for x, y in zip(a, b, strict=True))
    return a is b or (kind is set and not a and not b)


def _kind(x: torch.Tensor) -> Any:
    plain = x.shape, x.stride(), x.dtype, x.device, x.layout
    return *plain, x.requires_grad, x.is_leaf, x.is_leaf and x.grad is None


def is_from(source: Source, other: Source) -> bool:
    """Whether something comes from what another source says; PyTorch 2.11's own looks at the first of all alone."""
    while source != other:
        if not isinstance(source, ChainedSource):
            return False
        source = source.base
    return True


def by_another_name(
    tx: Any,
    operands: Iterable[Source | None],
    block: Source,
    same: Pairs,
    value: Callable[[Source], Any],
) -> bool:
    """Whether what a block was traced with from elsewhere is its own: of another block it would be something else.

    Args:
        operands: sources of what the traced graph is called with.
        same: which part of the other block stands for which of this one.
    """
    named = [(source, id(value(source))) for source in operands if source is not None]
    # What was met by another name before is guarded there, not on the block.
    met = tx.output.side_effects.id_to_variable
    named += [(v.source, i) for i in same.there if (v := met.get(i)) is not None and v.source]
    not_of_both = [source for source, i in named if same.there.get(i, i) != i]
    return not all(is_from(source, block) for source in not_of_both)


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
