"""PyTorch's own ``scan``, as TorchDynamo captures it, becomes a ``tttc.scan``.

Before (``combine`` is a graph of its own)::

    scan = torch.ops.higher_order.scan(combine, [W], [q, k, v], [rate])

After (``planned`` holds what :mod:`tttc.capture.plan` made of ``combine``)::

    scan = planned([W], [q, k, v], [rate])

A scan over mini-batches whose ``combine`` scans over their tokens is one scan over tokens, the state of the outer one
its anchor. What the outer ``combine`` does to tokens before the inner scan and to outputs after it runs for all
mini-batches at once.
"""

from __future__ import annotations

import ast
import contextvars
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.scan import scan_op
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tttc._within import within
from tttc.capture.for_all import for_all
from tttc.capture.generated import compiled_source
from tttc.capture.iterations import NoTokens
from tttc.capture.layout import Joined
from tttc.capture.loop_source import LoopSource
from tttc.capture.plan import Plan, Planner
from tttc.capture.step import WithLines
from tttc.ir.body import source_line
from tttc.ir.errors import NotLowerable
from tttc.scan import scan

Tensors = list[Any]
_capturing: contextvars.ContextVar[bool] = contextvars.ContextVar("tttc_capturing", default=False)


def capturing(on: bool) -> AbstractContextManager[None]:
    """Within, scans on tensors without values only say what comes out of them.

    TorchDynamo runs a scan on such tensors to know the shapes of its results; where they require gradients, PyTorch
    derives the backward of the whole scan for that, and of a scan inside a scan it cannot.
    """
    return within(_capturing, on)


def _shapes_alone(original: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(combine: Any, init: Any, xs: Any, additional: Any) -> Any:
        leaves = [x for x in (*init, *xs, *additional) if isinstance(x, torch.Tensor)]
        if not _capturing.get() or not all(isinstance(x, FakeTensor) for x in leaves):
            return original(combine, init, xs, additional)
        with torch._C._AutoDispatchBelowAutograd(), torch.no_grad():
            out = scan_op(combine, init, xs, additional)
        needed = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
        return [x.requires_grad_() if needed and x.is_floating_point() else x for x in out]

    return kernel


_key = torch._C.DispatchKey.Autograd  # type: ignore[attr-defined]
scan_op.py_kernels[_key] = _shapes_alone(scan_op.py_kernels[_key])
scan_op._dispatch_cache.clear()


def is_scan(node: fx.Node) -> bool:
    """Whether a node is PyTorch's ``scan``."""
    return node.op == "call_function" and node.target is torch.ops.higher_order.scan


def scans_of(gm: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, fx.Node]]:
    """The outermost scans of a captured graph, and the graph each is in."""
    inside = {n.args[0].target for n in gm.graph.nodes if is_scan(n)}  # type: ignore[union-attr]
    for node in list(gm.graph.nodes):
        if is_scan(node):
            yield gm, node
    for name, inner in gm.named_children():
        if isinstance(inner, fx.GraphModule) and name not in inside:
            yield from scans_of(inner)


@dataclass
class _Combine:
    """What one token does: ``anchor`` is empty where there is but one scan.

    ``before`` and ``after`` are what a scan over mini-batches does to tokens and outputs, of one mini-batch.
    """

    step: Callable[[Tensors, Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]
    anchored: bool = False
    before: Callable[[Tensors, Tensors], Tensors] | None = None
    after: Callable[[Tensors, Tensors, Tensors], Tensors] | None = None
    order: list[int] = field(
        default_factory=list
    )  # the outer state behind each state of the inner scan


class _Slice:
    """A part of a graph: some of its results, from some of its values."""

    def __init__(self, gm: fx.GraphModule, given: Sequence[fx.Node], wanted: Sequence[Any]) -> None:
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in given:
            mapping[node] = graph.placeholder(node.name)
        nodes = [x for x in wanted if isinstance(x, fx.Node)]
        needed = _needed(nodes, set(given))
        for node in gm.graph.nodes:
            if node in needed and node not in mapping:
                if node.op == "placeholder":
                    raise NotLowerable(f"it depends on {node.name}", source_line(node))
                mapping[node] = graph.node_copy(node, lambda x: mapping[x])
        graph.output([mapping[x] if isinstance(x, fx.Node) else x for x in wanted])
        self.gm = fx.GraphModule(gm, graph)
        self.trivial = all(x in given for x in wanted)

    def __call__(self, *args: Any) -> list[Any]:
        return WithLines(self.gm).run(*args)


def _needed(wanted: Iterable[fx.Node], given: set[fx.Node]) -> set[fx.Node]:
    """The nodes behind others, and whatever has an effect and no users (levels of ``torch.func``)."""
    found: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if node not in given:
                stack += node.all_input_nodes
    if any(n.target is torch._C._functorch._grad_increment_nesting for n in _graph_nodes(found)):
        found |= {n for n in _graph_nodes(found) if n.op == "call_function" and not n.users}
    return found


def _graph_nodes(nodes: set[fx.Node]) -> list[fx.Node]:
    return list(next(iter(nodes)).graph.nodes) if nodes else []


def _combine_of(gm: fx.GraphModule, states: int, tokens: int) -> _Combine:
    """What the graph of a scan's ``combine`` does with one token.

    Raises:
        NotLowerable: where a scan inside is none over the tokens of a mini-batch, with the reason.
    """
    inner = [n for n in gm.graph.nodes if is_scan(n)]
    if not inner:

        def once(anchor: Tensors, carry: Tensors, token: Tensors, rest: Tensors) -> Any:
            out = WithLines(gm).run(*carry, *token, *rest)
            return out[:states], out[states:]

        return _Combine(once)
    if len(inner) > 1:
        raise NotLowerable("it holds several scans", source_line(inner[1]))
    return _nested(gm, inner[0], states, tokens)


def _nested(gm: fx.GraphModule, node: fx.Node, states: int, tokens: int) -> _Combine:
    where = source_line(node)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    outer, given = placeholders[:states], placeholders[states : states + tokens]
    extra = placeholders[states + tokens :]
    combine, init, xs, additional = node.args
    inner_gm: Any = getattr(gm, str(combine.target))  # type: ignore[union-attr]
    if any(is_scan(n) for n in inner_gm.graph.nodes):
        raise NotLowerable("it is a scan in a scan in a scan", where)
    begins = [_origin(x) for x in init]  # type: ignore[union-attr]
    if sorted(map(str, begins)) != sorted(map(str, outer)):
        raise NotLowerable(
            "a scan inside does not start from the state of the one around it", where
        )
    order = [outer.index(x) for x in begins]
    results: list[Any] = list(gm.graph.output_node().args[0])  # type: ignore[arg-type]
    picked: dict[Any, fx.Node] = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    for i, x in enumerate(results[:states]):
        if _origin(x) is not picked.get(order.index(i)):
            raise NotLowerable("the state of a scan is not what the scan inside leaves", where)
    count = len(init)  # type: ignore[arg-type]
    outputs = [picked[k] for k in sorted(picked) if k >= count]
    before = _Slice(gm, [*given, *extra], list(xs))  # type: ignore[arg-type]
    anchored = _Slice(gm, [*outer, *extra], list(additional))  # type: ignore[arg-type]
    after = _Slice(gm, [*outputs, *given, *extra], results[states:])

    def once(anchor: Tensors, carry: Tensors, token: Tensors, rest: Tensors) -> Any:
        more = anchored(*anchor, *rest)
        out = WithLines(inner_gm).run(*(carry[i] for i in order), *token, *more)
        new = [out[order.index(i)] for i in range(states)]
        made = {k: out[k] for k in range(count, len(out))}
        return new, [made[k] for k in sorted(picked) if k >= count]

    return _Combine(
        once,
        True,
        None if before.trivial else lambda x, rest: before(*x, *rest),
        None if after.trivial else lambda z, x, rest: after(*z, *x, *rest),
        order,
    )


def _origin(x: Any) -> Any:
    """What a value is a copy of."""
    while isinstance(x, fx.Node) and x.target in ("clone", "contiguous", torch.clone):
        x = x.args[0]
    return x


def plan_scan(
    gm: fx.GraphModule, node: fx.Node, verify: bool = False
) -> Callable[[Tensors, Tensors, Tensors], Any]:
    """What runs in the place of a scan: from its state, tokens ``[T, ...]`` and further arguments to its results.

    Raises:
        NotLowerable: where its ``combine`` has no form in the compiler, with the reason and the line.
        NoTokens: where it is not the compiler's business.
    """
    combine_node, init, xs, extra = node.args
    name = str(combine_node.target)  # type: ignore[union-attr]
    combine = _combine_of(getattr(gm, name), len(init), len(xs))  # type: ignore[arg-type]
    where = source_line(node) or "a scan"
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    example = [[_example(x, mode) for x in group] for group in (init, xs, extra)]  # type: ignore[union-attr]
    length = example[1][0].shape[0]
    size = None
    if combine.anchored:
        with mode, torch.no_grad():
            example[1] = _before(combine, example[1], example[2])
        length, size = example[1][0].shape[0], int(example[1][0].shape[0] // length)
    # The first token tells how many outputs there are.
    with mode, torch.no_grad(), torch._guards.tracing(None):
        start = [x.clone() for x in example[0]]
        outputs = len(combine.step(start, start, [x[0] for x in example[1]], example[2])[1])
    source = _source(combine, example, outputs, size, name, where)
    values = _values(example[0], example[1], example[2], outputs, size)
    planner = Planner(source, (0, length, 1), values, mode, scan, verify)
    plan = planner.plan()
    return lambda i, x, e: _run(plan, combine, i, x, e, outputs, size)


def _example(x: Any, mode: FakeTensorMode) -> Any:
    value = x.meta["example_value"] if isinstance(x, fx.Node) else x
    if isinstance(value, torch.SymInt):
        return _hint(value)
    if not isinstance(value, torch.Tensor):
        return value
    with mode:
        made = torch.empty_strided(
            [_hint(n) for n in value.shape],
            [_hint(n) for n in value.stride()],
            dtype=value.dtype,
            device=value.device,
        )
    return made.requires_grad_(value.requires_grad)


def _hint(n: Any) -> int:
    return int(n.node.hint) if isinstance(n, torch.SymInt) else int(n)


def _source(
    combine: _Combine,
    example: list[Tensors],
    outputs: int,
    size: int | None,
    name: str,
    where: str,
) -> LoopSource:
    """The scan as a loop of Python, for the planner."""
    states, tokens, extra = (range(len(group)) for group in example)
    names = [f"c_{i}" for i in states]
    if size is not None:
        names += ["size", *(f"a_{i}" for i in states)]
    names += [f"outs_{k}" for k in range(outputs)]
    names += [*(f"x_{i}" for i in tokens), *(f"e_{i}" for i in extra)]
    lines = [f"def body(n, {', '.join(names)}):"]
    if size is not None:
        lines.append("    if n % size == 0 and n // size > 0:")
        lines += [f"        a_{i} = c_{i}" for i in states]
    anchor = ", ".join(f"a_{i}" for i in states) if size is not None else ""
    lines += [
        f"    new, outs = step([{anchor}], [{', '.join(f'c_{i}' for i in states)}], "
        f"[{', '.join(f'x_{i}[n]' for i in tokens)}], [{', '.join(f'e_{i}' for i in extra)}])",
        f"    {', '.join(f'c_{i}' for i in states)}, = new",
        *(f"    outs_{k}.append(outs[{k}])" for k in range(outputs)),
        "    return locals()",
    ]
    body = compiled_source("body", "\n".join(lines) + "\n", {"step": combine.step})
    carried = ", ".join(x for x in names if x.startswith(("c_", "a_")))
    statement: Any = ast.parse(f"for n in range(T):\n    {carried}, = 0,").body[0]
    statement.lineno = int(where.rpartition(":")[2]) if where.rpartition(":")[2].isdigit() else 0
    lists = [f"outs_{k}" for k in range(outputs)]
    return LoopSource(
        statement,
        where,
        name,
        0,
        inputs=names,
        results=[*(f"c_{i}" for i in states), *lists],
        joined=set(lists),
        body=body,
    )


def _values(init: Tensors, xs: Tensors, extra: Tensors, outputs: int, size: int | None) -> Tensors:
    anchors = [] if size is None else [size, *init]
    lists: Tensors = [[] for _ in range(outputs)]
    return [*init, *anchors, *lists, *xs, *extra]


def _before(combine: _Combine, xs: Tensors, extra: Tensors) -> Tensors:
    """The tokens of all mini-batches, ``[T, ...]``."""
    before, rest = combine.before, list(extra)
    if before is not None:
        xs = for_all(lambda *x: before(list(x), rest), *xs)
    return [x.flatten(0, 1) for x in xs]


def _run(
    plan: Plan,
    combine: _Combine,
    init: Tensors,
    xs: Tensors,
    extra: Tensors,
    outputs: int,
    size: int | None,
) -> tuple[Any, ...]:
    tokens = xs if size is None else _before(combine, xs, extra)
    values = _values(list(init), list(tokens), list(extra), outputs, size)
    bounds = (0, tokens[0].shape[0], 1)
    if not plan.fits(bounds, values):
        raise NotLowerable("a scan was met with other sizes than it was captured with")
    found = plan.run(bounds, values)
    states = list(found[: len(init)])
    z = [x.values if isinstance(x, Joined) else torch.stack(x) for x in found[len(init) :]]
    if size is not None:
        z = [x.unflatten(0, (x.shape[0] // size, size)) for x in z]
        after, rest, count = combine.after, list(extra), len(z)
        if after is not None:
            z = for_all(lambda *x: after(list(x[:count]), list(x[count:]), rest), *z, *xs)
    return (*states, *z)


__all__ = ["NoTokens", "is_scan", "plan_scan", "scans_of"]
