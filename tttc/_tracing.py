"""What :func:`tttc.scan` must know about where it is being run.

Trees are described by nested tuples of constants, because TorchDynamo can carry those through a
graph where it cannot carry a ``TreeSpec``.
"""

from __future__ import annotations

import contextlib
import contextvars
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import guard_scalar

from tttc._within import within

LEAF = ("leaf",)
NONE = ("constant", None)

_backend: contextvars.ContextVar[Callable[..., Any] | None] = contextvars.ContextVar(
    "tttc_backend", default=None
)


def active_backend() -> Callable[..., Any] | None:
    """The lowering that scans reached outside a captured graph go through, if any."""
    return _backend.get()


def use_backend(backend: Callable[..., Any] | None) -> AbstractContextManager[None]:
    """Send scans that run outside a captured graph to ``backend``."""
    return within(_backend, backend)


_on_token: contextvars.ContextVar[Callable[[], None] | None] = contextvars.ContextVar(
    "tttc_on_token", default=None
)


def token_callback() -> Callable[[], None] | None:
    """What the naive loop calls before each token, if anything."""
    return _on_token.get()


def before_each_token(callback: Callable[[], None]) -> AbstractContextManager[None]:
    """Have naive loops call ``callback`` before each token; it may raise, to stop a slow one."""
    return within(_on_token, callback)


@contextlib.contextmanager
def without_saved_tensor_hooks() -> Iterator[None]:
    """Hooks on saved tensors, those of ``torch.utils.checkpoint`` say, step aside: ``torch.func.grad`` refuses
    to run under them.
    """
    hooks = []
    while (top := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def is_plain_function(step: Any) -> bool:
    """Whether Dynamo can carry ``step`` as a constant: a function that closes over nothing."""
    return isinstance(step, types.FunctionType) and step.__closure__ is None


def describe(tree: Any) -> Any:
    """Nested tuples of constants that say what ``tree`` is, or None where they can't."""
    if isinstance(tree, torch.Tensor):
        return LEAF
    if tree is None or isinstance(tree, (bool, str)):
        return ("constant", tree)
    if isinstance(tree, (int, float)):
        # Under capture a number may be a symbol: its value becomes part of the program.
        return ("constant", guard_scalar(tree))
    kind: tuple[str, Any]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        kind, children = ("namedtuple", type(tree)), list(tree)
    elif isinstance(tree, tuple):
        kind, children = ("tuple", None), list(tree)
    elif isinstance(tree, list):
        kind, children = ("list", None), tree
    elif isinstance(tree, dict):
        kind, children = ("dict", tuple(tree.keys())), list(tree.values())
    else:
        return None
    inner = []
    for child in children:
        described = LEAF if isinstance(child, torch.Tensor) else describe(child)
        if described is None:
            return None
        inner.append(described)
    return (*kind, tuple(inner))


def rebuild(structure: Any, leaves: list[Any]) -> Any:
    """The tree ``structure`` describes, its tensors taken in order from ``leaves`` (emptied)."""
    kind = structure[0]
    if kind == "leaf":
        return leaves.pop(0)
    if kind == "constant":
        return structure[1]
    children = []
    # Leaves here: TorchDynamo takes long to see through a call.
    for child in structure[2]:
        children.append(leaves.pop(0) if child[0] == "leaf" else rebuild(child, leaves))
    if kind == "namedtuple":
        return structure[1](*children)
    if kind == "tuple":
        return tuple(children)
    if kind == "list":
        return children
    return dict(zip(structure[1], children, strict=True))


def constant_int(n: int) -> int:
    """A size as a constant of the captured program."""
    # len(range()) is how Dynamo is told to guard on a size instead of keeping it a symbol.
    return len(range(n))


def constant_shapes(leaves: list[torch.Tensor], lead: list[int]) -> tuple[tuple[int, ...], ...]:
    """The shapes without their ``lead`` first dimensions, as constants of the captured program."""
    # Lists, as TorchDynamo takes longer to see through generators.
    return tuple(
        [
            tuple([constant_int(n) for n in x.shape[skip:]])
            for x, skip in zip(leaves, lead, strict=True)
        ]
    )


def seen_dtypes(leaves: list[torch.Tensor], compute: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes in which a step that computes in ``compute`` sees the leaves."""
    return tuple([compute if x.is_floating_point() else x.dtype for x in leaves])


def one_token(structure: Any, shapes: Any, dtypes: Any, device: torch.device) -> Any:
    """State, token and shared of one head of one sequence, uninitialised: ``[1, 1, ...]``, shared ``[1, ...]``.

    ``structure`` describes (anchor, carry, tokens, shared); ``shapes`` and ``dtypes`` hold one tuple
    for the leaves of each of anchor, tokens and shared.
    """
    state, _, tokens, shared = structure[2]
    trees = []
    groups = zip((state, tokens, shared), ((1, 1), (1, 1), (1,)), shapes, dtypes, strict=True)
    for described, lead, of_leaves, theirs in groups:
        leaves = [
            torch.empty((*lead, *shape), dtype=dtype, device=device)
            for shape, dtype in zip(of_leaves, theirs, strict=True)
        ]
        trees.append(rebuild(described, leaves))
    return trees


def abstract_mode() -> FakeTensorMode:
    """Within it a step runs on shapes, dtypes and devices alone; it may touch real tensors it closes over."""
    return FakeTensorMode(allow_non_fake_inputs=True)
