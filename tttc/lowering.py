"""Scans of a captured graph, and those that run beside one, in their compiled form."""

from __future__ import annotations

import inspect
import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tttc import _recorder, _tracing
from tttc._scan_op import approximation, as_tiles, as_tokens, interned
from tttc.capture.torch_scan import NoTokens, plan_scan, scans_of
from tttc.ir.body import source_line
from tttc.ir.errors import NotLowerable
from tttc.options import Options, warn_once
from tttc.pipeline import build_program, in_tokens
from tttc.runtime.fused_scan import saving_interval

scans_log = logging.getLogger("tttc.scans")


def lower_torch_scans(gm: fx.GraphModule, options: Options) -> None:
    """Replace each of PyTorch's own scans by what the compiler made of it, in place.

    One that can't be re-rolled stays as it is, with one warning; under ``strict`` it raises.
    """
    for inner, node in list(scans_of(gm)):
        where = source_line(node) or ""
        try:
            run = plan_scan(inner, node, options.verify)
        except NoTokens:
            continue
        except NotLowerable as error:
            refused = NotLowerable(
                f"the scan at {where} can't be lowered: {error.reason}", error.where or where
            )
            if options.strict:
                raise refused from None
            warn_once(f"{refused.reason}: it runs eagerly")
            _recorder.eager_site(where, 1, refused.reason)
            continue
        count = len(node.args[1])  # type: ignore[arg-type]
        picked = [u.args[1] if u.target is operator.getitem else 0 for u in node.users]
        states = any(i < count for i in picked if isinstance(i, int))
        direct = DirectScans(options, node, states)

        def planned(init: Any, xs: Any, extra: Any, run: Any = run, direct: Any = direct) -> Any:
            with _tracing.use_backend(direct):
                return run(init, xs, extra)

        with inner.graph.inserting_before(node):
            new = inner.graph.call_function(planned, node.args[1:])
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        inner.graph.erase_node(node)
        inner.recompile()


def lower_scans(gm: fx.GraphModule, options: Options) -> fx.GraphModule:
    """Replace each ``tttc::scan`` by its compiled form, in the graph TorchDynamo captured and those inside it.

    A scan that can't be lowered stays the naive loop, with one warning; under ``strict`` it raises.
    """
    # What runs under torch.utils.checkpoint, say, is a graph of its own.
    for inner in gm.modules():
        if isinstance(inner, fx.GraphModule):
            _lower_scans_of(inner, options)
    return gm


def _lower_scans_of(gm: fx.GraphModule, options: Options) -> None:
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in (
            torch.ops.tttc.scan,
            torch.ops.tttc.scan.default,
        ):
            continue
        arguments: Any = node.args
        key, mini_batch_size = arguments[4:6]
        try:
            key, mini_batch_size = requested(key, mini_batch_size, options)
            program = build_program(interned(key), mini_batch_size, options.verify)
            _recorder.site(node, key, mini_batch_size, program)
            form = f"token by token: {program.reason}" if program.sequential else "in its dual form"
            scans_log.info("%s %s runs %s", _recorder.layer_of(node) or "scan", key, form)
        except NotLowerable as error:
            _recorder.site(node, key, mini_batch_size, None, str(error))
            scans_log.info("%s runs as the naive loop: %s", key, error)
            if options.strict:
                raise
            warn_once(f"the TTT layer with step {key.rpartition('#')[0]} runs eagerly: {error}")
            continue
        _replace_scan(gm.graph, node, key, mini_batch_size, options)
    gm.recompile()


def requested(key: str, mini_batch_size: int, options: Options) -> tuple[str, int]:
    """The step and mini-batch size to run where ``options`` ask for one; warns once where that approximates.

    An online rule (``mini_batch_size`` 1) stays what it is where it has an exact form for many tokens at a time, or
    where its approximation has none either.
    """
    if mini_batch_size == 1:
        tokens = in_tokens(key, options.verify)
        if tokens is not None:
            return tokens, 1
    size = options.mini_batch_size
    if size is None or size == mini_batch_size:
        return key, mini_batch_size
    name = key.rpartition("#")[0]
    if mini_batch_size == 1:
        if not build_program(interned(key), 1, options.verify).sequential:
            return key, 1
        try:
            reason = build_program(interned(approximation(key)), size, options.verify).reason
        except NotLowerable as error:
            reason = error.reason
        if reason is not None:
            warn_once(
                f"mini_batch_size={size}: the TTT layer with step {name} stays token by token: {reason}"
            )
            return key, 1
        key = approximation(key)
    warn_once(
        f"mini_batch_size={size}: the TTT layer with step {name} says {mini_batch_size}, which this approximates"
    )
    return key, size


def _replace_scan(
    graph: fx.Graph, node: fx.Node, key: str, mini_batch_size: int, options: Options
) -> None:
    """Put ``tttc::fused_scan`` in the place of a scan; states that nobody reads are not computed."""
    picks = [u for u in node.users if u.target is operator.getitem and not u.users]
    for pick in picks:
        graph.erase_node(pick)
    skipped = 2 * len(node.args[0])  # type: ignore[arg-type]

    def picked(user: fx.Node) -> Any:
        return user.args[1] if user.target is operator.getitem else 0

    states = any(picked(u) < skipped for u in node.users)
    anchor, carry, tokens, shared = (
        [x.meta["example_value"] for x in group]  # type: ignore[union-attr]
        for group in node.args[:4]
    )
    backend = options.backend
    tile = interned(key).tile
    given: Any = node.args[2]
    if tile is not None:
        given = [
            _inserted(graph, node, as_tokens, x, a) for x, a in zip(given, tile.tokens, strict=True)
        ]
        tokens = [x.meta["example_value"] for x in given]
    interval = saving_interval(anchor, carry, tokens, shared, key, mini_batch_size, backend)
    with graph.inserting_before(node):
        new = graph.call_function(
            torch.ops.tttc.fused_scan.default,
            (
                *node.args[:2],
                given,
                node.args[3],
                key,
                mini_batch_size,
                node.args[6],
                backend,
                states,
                interval,
                _recorder.layer_of(node),
                options.tune,
            ),
        )
        new.meta = dict(node.meta)
    for user in list(node.users):
        index = picked(user) - skipped
        if states:
            user.replace_input_with(node, new)
        else:
            user.args = (new, index)
        if tile is not None and index >= 0:
            users = list(user.users)
            made = _inserted(graph, users[0], as_tiles, user, tile.outputs[index], tile.size)
            for u in users:
                u.replace_input_with(user, made)
    graph.erase_node(node)


def _inserted(
    graph: fx.Graph, before: fx.Node, function: Callable[..., Any], x: fx.Node, *rest: Any
) -> fx.Node:
    """A function of a tensor, as a node of a graph that TorchDynamo captured."""
    with graph.inserting_before(before):
        made = graph.call_function(function, (x, *rest))
    value = x.meta["example_value"]
    if isinstance(value, torch.Tensor) and function is as_tokens:
        made.meta["example_value"] = function(value, *rest)
    return made


class DirectScans:
    """The lowering of scans that run outside a captured graph, under a compiled model.

    Args:
        node: the node of a captured graph that holds them, if one does.
        states: whether anybody reads the states they leave.
    """

    def __init__(self, options: Options, node: fx.Node | None = None, states: bool = True) -> None:
        self.options = options
        self.layer = "" if node is None else _recorder.layer_of(node)
        self.node, self.states = node, states

    def takes(self, step: Callable[..., Any], structure: Any, mini_batch_size: int) -> bool:
        """Whether a scan can be lowered from here; says once why not."""
        if structure is None:
            reason = "a container it uses is no tuple, list, dict or named tuple"
        elif not _tracing.is_plain_function(step):
            reason = "its step closes over variables: pass them through shared="
        else:
            return True
        name = getattr(step, "__qualname__", type(step).__name__)
        self._refuse(name, mini_batch_size, NotLowerable(reason, _defined_at(step)))
        return False

    def __call__(self, call: Any, mini_batch_size: int, place: int) -> list[torch.Tensor] | None:
        """The scan by ``tttc::fused_scan``, or None where it can't be lowered."""
        try:
            key, mini_batch_size = requested(call.key, mini_batch_size, self.options)
            program = build_program(interned(key), mini_batch_size, self.options.verify)
            if self.node is not None:
                _recorder.site(self.node, key, mini_batch_size, program)
                self.node = None
        except NotLowerable as error:
            self._refuse(call.key.rpartition("#")[0], mini_batch_size, error)
            return None
        anchor, carry, tokens, shared = call[1:5]
        tile = interned(key).tile
        if tile is not None:
            tokens = [as_tokens(x, a) for x, a in zip(tokens, tile.tokens, strict=True)]
        interval = saving_interval(
            anchor, carry, tokens, shared, key, mini_batch_size, self.options.backend
        )
        out = torch.ops.tttc.fused_scan(
            anchor,
            carry,
            tokens,
            shared,
            key,
            mini_batch_size,
            place,
            self.options.backend,
            self.states,
            interval,
            self.layer,
            self.options.tune,
        )
        if not self.states:
            out = [*anchor, *anchor, *out]
        states = 2 * len(call.anchor)
        z = out[states : states + len(interned(call.key).outputs)]
        if tile is not None:
            z = [as_tiles(x, a, tile.size) for x, a in zip(z, tile.outputs, strict=True)]
        return [*out[:states], *z]

    def _refuse(self, name: str, mini_batch_size: int, error: NotLowerable) -> None:
        if self.options.strict:
            raise error
        warn_once(f"the TTT layer with step {name} runs eagerly: {error}")
        _recorder.eager_site(name, mini_batch_size, str(error))


def _defined_at(step: Callable[..., Any]) -> str | None:
    """The file and line of a step, where it is written in Python."""
    code = getattr(inspect.unwrap(step), "__code__", None)
    return None if code is None else f"{code.co_filename}:{code.co_firstlineno}"
