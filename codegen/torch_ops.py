"""IR operators as direct torch calls: what a spec says is worked out once, not at every call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx

from tttc.ir import ops
from tttc.ir.body import head_length
from tttc.ir.functions import FUNCTIONS
from tttc.ir.spec import Dims, parse

Tensor = torch.Tensor
View = Callable[[Any], Any]


def _view(dims: Dims, target: Dims) -> View | None:
    """How an operand is aligned with ``target``; None where it lies right."""
    if not dims or dims == target[len(target) - len(dims) :]:
        return None
    order = [d for d in target if d in dims]
    turned = tuple(order) != dims
    # Positions counted from the end, so that any number of leading axes may come before.
    added = [i - len(target) for i, d in enumerate(target) if d not in dims]
    first = next(i for i, d in enumerate(target) if d in dims) - len(target)
    added = [i for i in added if i > first]
    if turned and len(dims) == 2:

        def turn(x: Tensor) -> Tensor:
            return x.transpose(-1, -2)
    elif turned:
        moves = tuple(dims.index(d) - len(dims) for d in order)

        def turn(x: Tensor) -> Tensor:
            lead = x.ndim - len(moves)
            return x.permute(*range(lead), *(x.ndim + m for m in moves))
    else:
        turn = None  # type: ignore[assignment]

    def view(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if turn is not None:
            x = turn(x)
        for i in reversed(added):
            x = x.unsqueeze(i)
        return x

    return view


@cache
def _elementwise(function: str, spec: str) -> Callable[..., Any] | None:
    parsed = parse(spec)
    run = FUNCTIONS[function].torch
    target = parsed.result
    views: list[View | None] = []
    for dims in parsed.operands:
        missing_first = bool(dims) and bool(target) and target[0] not in dims
        if missing_first or (not dims and target):
            views.append(functools.partial(ops.align, dims=dims, target=target))
        else:
            views.append(_view(dims, target))
    if all(v is None for v in views):
        return run
    if len(views) == 1:
        (only,) = views
        return lambda x: run(only(x))  # type: ignore[misc]
    if len(views) == 2:
        left, right = views
        if left is None:
            return lambda x, y: run(x, right(y))  # type: ignore[misc]
        if right is None:
            return lambda x, y: run(left(x), y)
        return lambda x, y: run(left(x), right(y))
    return lambda *xs: run(*(x if v is None else v(x) for x, v in zip(xs, views, strict=True)))


@cache
def _contraction(spec: str) -> Callable[..., Any] | None:
    parsed = parse(spec)
    plan = ops.product_plan(spec)
    if plan is None or plan[0][2:] or parsed.result != plan[2]:
        return None
    left, right, _ = plan
    if len(left) != 2:
        return None
    turn_left, turn_right = parsed.operands[0] != left, parsed.operands[1] != right

    def product(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.matmul(x.mT if turn_left else x, y.mT if turn_right else y, out=out)

    return product


def _added(sign: int, spec: str) -> Callable[..., Any] | None:
    """``x + a @ b`` (or minus) as one operation, where the product has the axes of ``x`` and one inner axis."""
    parsed = parse(spec)
    plan = ops.product_plan(spec)
    if plan is None or len(plan[0]) != 2:
        return None
    left, right, result = plan
    turn_left, turn_right = parsed.operands[0] != left, parsed.operands[1] != right
    swap = parsed.result != result

    def run(x: Tensor, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        a, b = (a.mT if turn_left else a), (b.mT if turn_right else b)
        if swap:
            a, b = b.mT, a.mT
        lead = x.shape[:-2]
        if not lead or a.shape[:-2] != lead or b.shape[:-2] != lead:
            return torch.add(x, a @ b, alpha=sign, out=out)
        flat = torch.baddbmm(
            x.reshape(-1, *x.shape[-2:]),
            a.reshape(-1, *a.shape[-2:]),
            b.reshape(-1, *b.shape[-2:]),
            alpha=sign,
            out=None if out is None else out.view(-1, *x.shape[-2:]),
        )
        return flat.view(x.shape)

    return run


def _fused_sum(node: fx.Node) -> tuple[Callable[..., Any], tuple[Any, ...], fx.Node] | None:
    """A sum whose second operand is a product nobody else reads: one operation, its operands, the product."""
    if node.target is not ops.elementwise or node.args[0] not in ("add", "sub"):
        return None
    sign = 1 if node.args[0] == "add" else -1
    spec = parse(str(node.args[1]))
    orders = [(2, 3), (3, 2)] if sign > 0 else [(2, 3)]
    for i, k in orders:
        x, y = node.args[i], node.args[k]
        if not isinstance(x, fx.Node) or not isinstance(y, fx.Node) or x is y or len(y.users) != 1:
            continue
        if spec.operands[0] != spec.result or spec.operands[1] != spec.result:
            continue
        if y.target is ops.contraction and len(spec.result) == 2:
            bound = _added(sign, str(y.args[0]))
            if bound is not None:
                return bound, (x, *y.args[1:]), y
        if (
            y.target is ops.elementwise
            and y.args[0] == "mul"
            and isinstance(y.args[3], (int, float))
        ):
            run = torch.add if sign > 0 else torch.sub
            return _scaled(run, y.args[3]), (x, y.args[2]), y
    return None


def _scaled(run: Callable[..., Any], factor: float) -> Callable[..., Any]:
    return lambda x, y: run(x, y, alpha=factor)


def direct(gm: fx.GraphModule, into: bool = False) -> fx.GraphModule:
    """The same graph with operators bound to their specs where that saves time.

    ``into``: after its other arguments the graph takes, for each result, the tensor to write it into, or None.
    Only products use it, so the tensor returned is what counts.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    results = list(gm.graph.output_node().args[0])  # type: ignore[arg-type]
    outs: dict[fx.Node, fx.Node] = {}
    fused = {n: f for n in gm.graph.nodes if (f := _fused_sum(n)) is not None}
    inside = {f[2] for f in fused.values()}
    for node in gm.graph.nodes:
        if into and node.op != "placeholder" and not outs:
            outs = {x: graph.placeholder(f"into_{i}") for i, x in enumerate(results)}
        if node in inside:
            continue
        out: dict[str, Any] = {"out": outs[node]} if node in outs else {}
        if node in fused:
            run, operands, product = fused[node]
            kwargs = out if product.target is ops.contraction else {}
            mapping[node] = graph.call_function(run, tuple(mapping[x] for x in operands), kwargs)
            continue
        bound = None
        if node.op == "call_function" and node.target is ops.elementwise:
            bound = _elementwise(str(node.args[0]), str(node.args[1]))
        elif node.op == "call_function" and node.target is ops.contraction:
            bound = _contraction(str(node.args[0]))
        if node.op == "call_function" and node.target is ops.rename:
            mapping[node] = mapping[node.args[1]]
        elif bound is not None:
            operands = node.args[head_length(node) + 1 :]
            new = tuple(mapping[x] if isinstance(x, fx.Node) else x for x in operands)
            kwargs = out if node.target is ops.contraction else {}
            mapping[node] = graph.call_function(bound, new, kwargs)
        else:
            mapping[node] = graph.node_copy(node, lambda x: mapping[x])
    return fx.GraphModule(gm, graph)
