"""``torch.ops.tttc.scan``: a whole scan as one operator, so that graph capture carries it through unopened.

Its own implementation is the naive loop: a backend that does not know the operator runs the specification.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tttc import _tracing
from tttc._checks import ScanInfo, compute_dtype, output_dtype, run_tokens
from tttc.naive import naive_loop


@dataclass(frozen=True)
class InternedStep:
    """A step and the trees it takes, under the key that stands for it in graphs."""

    key: str
    step: Callable[..., Any]
    structure: Any  # of (anchor, carry, tokens, shared), as _tracing.describe gives it
    shapes: Any  # of one token: of the leaves of anchor, tokens, shared
    dtypes: Any  # likewise, as the step sees them
    output: Any  # the tree of z, likewise
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]  # of one token: the leaves of z
    of: str | None = None  # the key of the rule that this is the mini-batch approximation of
    tiles: str | None = None  # the key of the step whose tokens are tiles of the tokens of this one
    tile: Any = None  # where in its leaves they are, a tttc.passes.tiles.Tile

    def trees(self, anchor, carry, tokens, shared):
        """The four trees, from flat lists of tensors (``carry`` may be empty: at the anchor)."""
        a, c, t, s = self.structure[2]
        return (
            _tracing.rebuild(a, list(anchor)),
            _tracing.rebuild(a if c == _tracing.NONE else c, list(carry)) if carry else None,
            _tracing.rebuild(t, list(tokens)),
            _tracing.rebuild(s, list(shared)),
        )


# Inside an operator the autograd keys are masked, and torch.func needs them: run under the state of plain eager.
EAGER_KEYS = (
    torch._C._dispatch_tls_local_include_set(),
    torch._C._dispatch_tls_local_exclude_set(),
)

_lock = threading.RLock()
_counter = itertools.count()
_by_key: dict[str, InternedStep] = {}
_by_content: dict[Any, str] = {}


def interned(key: str) -> InternedStep:
    """The step behind a key of ``torch.ops.tttc.scan``."""
    return _by_key[key]


@torch._dynamo.assume_constant_result
def intern_step(
    step: Callable[..., Any], structure: Any, shapes: Any, dtypes: Any, device: torch.device
) -> str | None:
    """The key of a step with these trees, feature shapes and dtypes; the same key for the same arguments.

    None where the step fails on a token like this, or returns what cannot be named in a graph. Nothing
    is raised here, because Dynamo would report it as an error of its own.
    """
    # With the text, because equal constants need not be the same program: 1, 1.0, True; 0.0, -0.0.
    content = (step, structure, repr(structure), shapes, dtypes)
    with _lock:
        if content in _by_content:
            return _by_content[content]
    try:
        with (
            torch.autocast(device.type, enabled=False),
            _tracing.without_saved_tensor_hooks(),
            _tracing.abstract_mode(),
        ):
            anchor, tokens, shared = _tracing.one_token(structure, shapes, dtypes, device)
            z = run_tokens(step, anchor, anchor, tokens, shared)[1]
    except Exception:  # whatever a user's step may raise
        return None
    output = _tracing.describe(z)
    if output is None:
        return None
    outputs = tuple((tuple(x.shape[2:]), x.dtype) for x in pytree.tree_leaves(z))
    return intern_known(step, structure, shapes, dtypes, output, outputs)[0]


def intern_known(
    step: Callable[..., Any], structure: Any, shapes: Any, dtypes: Any, output: Any, outputs: Any
) -> tuple[str, bool]:
    """As :func:`intern_step`, for a step of which it is known what it returns; and whether it is new."""
    content = (step, structure, repr(structure), shapes, dtypes)
    with _lock:
        new = content not in _by_content
        if new:
            key = f"{step.__module__}.{step.__qualname__}#{next(_counter)}"
            _by_key[key] = InternedStep(key, step, structure, shapes, dtypes, output, outputs)
            _by_content[content] = key
        return _by_content[content], new


@contextmanager
def unseen() -> Iterator[None]:
    """Within, no other thread sees which steps there are."""
    with _lock:
        yield


def forget(key: str) -> None:
    """Take a step back of which something was said that is not so, and what was derived of it."""
    with _lock:
        for content in [c for c, known in _by_content.items() if known == key]:
            del _by_content[content]
        for known in [k for k in _by_key if k.partition("@")[0] == key]:
            del _by_key[known]


def approximation(key: str) -> str:
    """The key of a step's mini-batch approximation: what its tokens add to the state is taken at the anchor."""
    derived = f"{key}@anchor"
    with _lock:
        if derived not in _by_key:
            _by_key[derived] = replace(_by_key[key], key=derived, of=key)
    return derived


@torch._dynamo.assume_constant_result
def output_structure(key: str) -> Any:
    """The tree of z for an interned step."""
    return _by_key[key].output


def tokens_of(key: str, tile: Any) -> str:
    """The key under which a step that takes tiles of tokens takes the tokens themselves, whole tiles of them."""
    derived = f"{key}@tokens"
    with _lock:
        if derived not in _by_key:
            entry = _by_key[key]
            state, tokens, shared = entry.shapes
            tokens = tuple(_without(s, a) for s, a in zip(tokens, tile.tokens, strict=True))
            outputs = tuple(
                (_without(s, a), dtype)
                for (s, dtype), a in zip(entry.outputs, tile.outputs, strict=True)
            )
            _by_key[derived] = replace(
                entry,
                key=derived,
                shapes=(state, tokens, shared),
                outputs=outputs,
                tiles=key,
                tile=tile,
            )
    return derived


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def as_tokens(x: torch.Tensor, axis: int) -> torch.Tensor:
    """``[B, H, N, ...]`` of tiles as ``[B, H, T, ...]``; ``axis`` of a tile are its tokens."""
    return x.movedim(3 + axis, 3).flatten(2, 3)


def as_tiles(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """The inverse of :func:`as_tokens`."""
    return x.unflatten(2, (x.shape[2] // size, size)).movedim(3, 3 + axis)


def scan_info(anchor, tokens, shared) -> ScanInfo:
    """Sizes and dtypes of a scan given flat."""
    batch, heads, length = tokens[0].shape[:3]
    compute = compute_dtype(anchor, tokens, shared)
    return ScanInfo(batch, heads, length, compute, output_dtype(tokens, compute))


def run_naive(anchor, carry, tokens, shared, key, mini_batch_size, place):
    """The naive loop on flat lists: new anchor leaves, new carry leaves, output leaves."""
    entry = interned(key)
    if entry.tiles is not None:
        tile = entry.tile
        tokens = [as_tiles(x, a, tile.size) for x, a in zip(tokens, tile.tokens, strict=True)]
        out = run_naive(anchor, carry, tokens, shared, entry.tiles, mini_batch_size, place)
        states, z = out[: 2 * len(anchor)], out[2 * len(anchor) :]
        return [*states, *(as_tokens(x, a) for x, a in zip(z, tile.outputs, strict=True))]
    info = scan_info(anchor, tokens, shared)
    trees = entry.trees(anchor, carry, tokens, shared)
    with torch._C._ForceDispatchKeyGuard(*EAGER_KEYS), _tracing.without_saved_tensor_hooks():
        (new_anchor, new_carry), z = naive_loop(
            entry.step, trees[0], trees[1], place, trees[2], mini_batch_size, trees[3], info
        )
    return [
        *pytree.tree_leaves(new_anchor),
        *pytree.tree_leaves(new_carry),
        *pytree.tree_leaves(z),
    ]


def _fresh(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy: results alias nothing, and have the strides the fakes promise."""
    return x.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("tttc::scan", mutates_args=())
def scan_op(
    anchor: list[torch.Tensor],
    carry: list[torch.Tensor],
    tokens: list[torch.Tensor],
    shared: list[torch.Tensor],
    key: str,
    mini_batch_size: int,
    place: int,
) -> list[torch.Tensor]:
    """A scan by the naive loop; see :func:`tttc.scan`. Returns new anchor, new carry and output leaves."""
    with torch.no_grad():
        out = run_naive(anchor, carry, tokens, shared, key, mini_batch_size, place)
    return [_fresh(x) for x in out]


@scan_op.register_fake
def scan_fake(anchor, carry, tokens, shared, key, mini_batch_size, place):
    """Shapes and dtypes of the results of ``tttc::scan``."""
    info = scan_info(anchor, tokens, shared)
    lead = (info.batch, info.heads, info.length)
    states = [x.new_empty(x.shape, dtype=info.compute) for x in (*anchor, *anchor)]
    return states + [
        tokens[0].new_empty(
            (*lead, *shape), dtype=info.output if dtype.is_floating_point else dtype
        )
        for shape, dtype in interned(key).outputs
    ]


@torch.library.custom_op("tttc::scan_backward", mutates_args=())
def scan_backward_op(
    grads: list[torch.Tensor],
    anchor: list[torch.Tensor],
    carry: list[torch.Tensor],
    tokens: list[torch.Tensor],
    shared: list[torch.Tensor],
    key: str,
    mini_batch_size: int,
    place: int,
) -> list[torch.Tensor]:
    """Gradients of ``tttc::scan`` by autograd through the naive loop, zeros where there are none."""
    inputs = [*anchor, *carry, *tokens, *shared]
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    it = iter(leaves)
    parts = [[next(it) for _ in group] for group in (anchor, carry, tokens, shared)]
    with torch._C._ForceDispatchKeyGuard(*EAGER_KEYS), torch.enable_grad():
        out = run_naive(parts[0], parts[1], parts[2], parts[3], key, mini_batch_size, place)
        wanted = [x for x in leaves if x.requires_grad]
        pairs = [(o, g) for o, g in zip(out, grads, strict=True) if o.requires_grad]
        got = torch.autograd.grad(
            [o for o, _ in pairs], wanted, [g.to(o.dtype) for o, g in pairs], allow_unused=True
        )
    by_leaf = dict(zip((id(x) for x in wanted), got, strict=True))
    return [
        x.new_zeros(x.shape) if by_leaf.get(id(x)) is None else _fresh(by_leaf[id(x)])
        for x in leaves
    ]


@scan_backward_op.register_fake
def _scan_backward_fake(grads, anchor, carry, tokens, shared, key, mini_batch_size, place):
    return [x.new_empty(x.shape) for x in (*anchor, *carry, *tokens, *shared)]


def _setup_context(ctx, inputs, output):
    anchor, carry, tokens, shared, key, mini_batch_size, place = inputs
    ctx.counts = (len(anchor), len(carry), len(tokens), len(shared))
    ctx.rest = (key, mini_batch_size, place)
    ctx.save_for_backward(*anchor, *carry, *tokens, *shared)
    ctx.outputs = [(tuple(x.shape), x.dtype, x.device) for x in output]


def _backward(ctx, grads):
    it = iter(ctx.saved_tensors)
    groups = [[next(it) for _ in range(n)] for n in ctx.counts]
    filled = [
        torch.zeros(shape, dtype=dtype, device=device) if g is None else g
        for g, (shape, dtype, device) in zip(grads, ctx.outputs, strict=True)
    ]
    out = torch.ops.tttc.scan_backward(filled, *groups, *ctx.rest)
    it = iter(out)
    back = [[next(it) if x.is_floating_point() else (next(it), None)[1] for x in g] for g in groups]
    return (*back, None, None, None)


scan_op.register_autograd(_backward, setup_context=_setup_context)
