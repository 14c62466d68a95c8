"""``tttc.scan``: the one primitive, a scan over tokens with two views of the state.

Run eagerly, a scan is the naive per-token loop and nothing else: that loop is the
specification every compiled form is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tttc import _scan_op, _tracing
from tttc._checks import (
    check_mini_batch_size,
    check_scan_inputs,
    check_scan_leaves,
    leaves_of,
)
from tttc.naive import naive_loop

Step = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


class ScanState(NamedTuple):
    """The state a scan returns and accepts.

    ``anchor`` and ``carry`` are pytrees like ``init``; each leaf is ``[B, H, ...]``.
    ``place`` counts the tokens already read of the current mini-batch, ``0 <= place < b``;
    at place 0 the anchor is the carry.
    """

    anchor: Any
    carry: Any
    place: int


def scan(
    step: Step,
    init: Any,
    tokens: Any,
    mini_batch_size: int = 1,
    *,
    shared: Any = None,
) -> tuple[ScanState, Any]:
    """Scan ``step`` over tokens; the state of the scan is trained while it reads.

    ``step(anchor, carry, token, shared) -> (carry, z)`` sees one token of one head of one
    sequence. ``anchor`` is the carry as it stood at the start of the token's mini-batch, so
    that ``mini_batch_size=1`` is online gradient descent.

    Args:
        step: the update of one token; it returns a carry like the one it was given, and an output.
        init: pytree of floating tensors, each ``[B, H, ...]`` or ``[H, ...]``, or the
            :class:`ScanState` of an earlier call. Where B = H and a shape could be read both ways,
            the reading under which the step runs is taken, ``[B, H, ...]`` if both do.
        tokens: pytree of tensors, each ``[B, H, T, ...]``.
        mini_batch_size: tokens between two refreshes of the anchor, at least 1.
        shared: pytree of parameters, each ``[H, ...]``; leaves that are no tensors pass through.

    Returns:
        ``(state, z)``: the :class:`ScanState` after the last token, and the outputs, leaves ``[B, H, T, ...]``.

    The step computes in the widest dtype among its inputs, at least float32; states come out in
    that dtype, floating outputs in the widest dtype of the tokens.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Example:
        >>> import torch, tttc
        >>> def step(anchor, W, token, shared):          # linear attention
        ...     k, v, q = token
        ...     W = W + torch.outer(k, v)
        ...     return W, q @ W
        >>> k, v, q = torch.randn(3, 2, 4, 10, 8).unbind()
        >>> state, z = tttc.scan(step, torch.zeros(4, 8, 8), (k, v, q), mini_batch_size=5)
        >>> z.shape, state.carry.shape, state.place
        (torch.Size([2, 4, 10, 8]), torch.Size([2, 4, 8, 8]), 0)

    Source: the mini-batch inner loop of arXiv 2407.04620, section 2.4.
    """
    check_mini_batch_size(mini_batch_size)
    if isinstance(init, ScanState):
        anchor, carry, place = init.anchor, init.carry, init.place
    else:
        anchor, carry, place = init, None, 0
    if not torch.compiler.is_dynamo_compiling():
        return _scan_outside_capture(step, anchor, carry, place, tokens, mini_batch_size, shared)
    structure = _tracing.describe((anchor, carry, tokens, shared))
    if structure is None or not _tracing.is_plain_function(step):
        # The step or its containers cannot be named in a captured graph.
        return _scan_beside_capture(step, anchor, carry, place, tokens, mini_batch_size, shared)
    return _scan_in_capture(step, anchor, carry, place, tokens, mini_batch_size, shared, structure)


def _scan_outside_capture(step, anchor, carry, place, tokens, mini_batch_size, shared):
    given = (step, anchor, carry)
    anchor, carry, tokens, info = check_scan_inputs(
        step, anchor, carry, place, tokens, mini_batch_size, shared
    )
    backend = _tracing.active_backend()
    structure = None if backend is None else _tracing.describe((given[1], given[2], tokens, shared))
    if backend is not None and backend.takes(step, structure, mini_batch_size):
        call = _flatten(step, anchor, carry, tokens, shared, structure, info)
        out = None if call is None else backend(call, mini_batch_size, place)
        if call is not None and out is not None:
            return call.state_and_output(out, (place + info.length) % mini_batch_size)
    (anchor, carry), z = naive_loop(
        step, anchor, carry, place, tokens, mini_batch_size, shared, info
    )
    return ScanState(anchor, carry, (place + info.length) % mini_batch_size), z


@torch._dynamo.disable(
    reason="the step of tttc.scan cannot be carried in a graph: it fails on a token, or it is no "
    "function that closes over nothing, or a container it uses is no tuple, list, dict or named tuple"
)
def _scan_beside_capture(step, anchor, carry, place, tokens, mini_batch_size, shared):
    return _scan_outside_capture(step, anchor, carry, place, tokens, mini_batch_size, shared)


def _scan_in_capture(step, anchor, carry, place, tokens, mini_batch_size, shared, structure):
    """The same scan as one operator of the captured graph."""
    # Under capture an int may be a symbol (an attribute of a module that FSDP shards, say); programs are made for one.
    mini_batch_size = _tracing.constant_int(mini_batch_size)
    given = (step, anchor, carry, place, tokens, mini_batch_size, shared)
    anchors, carries, info = check_scan_leaves(
        step, anchor, carry, place, tokens, mini_batch_size, shared
    )
    call = _flat_call(step, anchors, carries, tokens, shared, structure, info)
    if call is None:
        return _scan_beside_capture(*given)
    out = torch.ops.tttc.scan(
        call.anchor, call.carry, call.tokens, call.shared, call.key, mini_batch_size, place
    )
    return call.state_and_output(out, (place + info.length) % mini_batch_size)


class _FlatCall(NamedTuple):
    """A scan's arguments as ``torch.ops.tttc.scan`` takes them."""

    key: str
    anchor: list[torch.Tensor]
    carry: list[torch.Tensor]
    tokens: list[torch.Tensor]
    shared: list[torch.Tensor]
    structure: Any  # of the state

    def state_and_output(self, out: list[torch.Tensor], place: int) -> tuple[ScanState, Any]:
        """The operator's flat results as a scan returns them."""
        n = len(self.anchor)
        anchor = _tracing.rebuild(self.structure, list(out[:n]))
        carry = _tracing.rebuild(self.structure, list(out[n : 2 * n]))
        z = _tracing.rebuild(_scan_op.output_structure(self.key), list(out[2 * n :]))
        return ScanState(anchor, carry, place), z


def _flatten(step, anchor, carry, tokens, shared, structure, info) -> _FlatCall | None:
    """The call flat, its step interned; None where the step fails on one token."""
    carries = [] if carry is None else leaves_of(carry)
    return _flat_call(step, leaves_of(anchor), carries, tokens, shared, structure, info)


def _flat_call(step, anchors, carries, tokens, shared, structure, info) -> _FlatCall | None:
    """As :func:`_flatten`, of the leaves of the state."""
    token_leaves = leaves_of(tokens)
    shared_leaves = [x for x in leaves_of(shared) if isinstance(x, torch.Tensor)]
    groups = ((anchors, 2), (token_leaves, 3), (shared_leaves, 1))
    shapes = tuple(_tracing.constant_shapes(x, [lead] * len(x)) for x, lead in groups)
    dtypes = tuple(_tracing.seen_dtypes(x, info.compute) for x, _ in groups)
    key = _scan_op.intern_step(step, structure, shapes, dtypes, token_leaves[0].device)
    if key is None:
        return None
    return _FlatCall(key, anchors, carries, token_leaves, shared_leaves, structure[2][0])
