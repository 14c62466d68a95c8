"""What each ATen operator is on named axes; those of positions along an axis are in ``positions.py``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from tttc.passes.named_graph import NamedGraph
from tttc.passes.named_values import Axis, Value
from tttc.passes.positions import cumulative_sum, entry, part

aten = torch.ops.aten
prims = torch.ops.prims

POINTWISE: dict[Any, str] = {
    aten.neg: "neg",
    aten.exp: "exp",
    aten.log: "log",
    aten.log1p: "log1p",
    aten.expm1: "expm1",
    aten.sqrt: "sqrt",
    aten.rsqrt: "rsqrt",
    aten.sin: "sin",
    aten.cos: "cos",
    aten.tanh: "tanh",
    aten.sigmoid: "sigmoid",
    aten.erf: "erf",
    aten.abs: "abs",
    aten.sign: "sign",
    aten.sgn: "sign",
    aten.reciprocal: "reciprocal",
    aten.mul: "mul",
    aten.div: "div",
    prims.div: "div",
    aten.maximum: "maximum",
    aten.minimum: "minimum",
    aten.gt: "gt",
    aten.ge: "ge",
    aten.lt: "lt",
    aten.le: "le",
    aten.eq: "eq",
    aten.ne: "ne",
    aten.logical_and: "and",
    aten.logical_or: "or",
    aten.logical_not: "not",
    aten.bitwise_and: "and",
    aten.bitwise_or: "or",
    aten.bitwise_not: "not",
    aten.isnan: "isnan",
}
IDENTITIES = {aten.clone, aten.detach, aten.lift_fresh_copy, aten.alias, aten.contiguous}


def _axes(value: Value, dims: Any) -> list[int]:
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(len(value.axes)))
    return [dims] if isinstance(dims, int) else list(dims)


def _option(node: fx.Node, args: Sequence[Any], position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else node.kwargs.get(name, default)


def _sum(n: NamedGraph, node: fx.Node, args: list[Any]) -> Value:
    axes = _axes(args[0], _option(node, args, 1, "dim", None))
    return n.reduce(args[0], axes, _option(node, args, 2, "keepdim", False), "sum")


def _mean(n: NamedGraph, node: fx.Node, args: list[Any]) -> Value:
    axes = _axes(args[0], _option(node, args, 1, "dim", None))
    count = math.prod(args[0].shape[a] for a in axes)
    total = n.reduce(args[0], axes, _option(node, args, 2, "keepdim", False), "sum")
    return n.pointwise("mul", [total, 1.0 / count])


def _variance(n: NamedGraph, node: fx.Node, args: list[Any]) -> Value:
    axes = _axes(args[0], args[1])
    correction = _option(node, args, 2, "correction", 1)
    correction = 1 if correction is None else correction
    count = math.prod(args[0].shape[a] for a in axes)
    mean = n.pointwise("mul", [n.reduce(args[0], axes, True, "sum"), 1.0 / count])
    centred = n.pointwise("sub", [args[0], mean])
    squares = n.reduce(n.pointwise("mul", [centred, centred]), axes, False, "sum")
    return n.pointwise("mul", [squares, 1.0 / (count - correction)])


def _extreme(function: str) -> Callable[..., Value]:
    def handle(n: NamedGraph, node: fx.Node, args: list[Any]) -> Value:
        axes = _axes(args[0], _option(node, args, 1, "dim", None))
        return n.reduce(args[0], axes, _option(node, args, 2, "keepdim", False), function)

    return handle


def _power(n: NamedGraph, node: fx.Node, args: list[Any]) -> Value:
    base, exponent = args
    if isinstance(exponent, (int, float)) and exponent == int(exponent) and 0 < abs(exponent) <= 16:
        # Products: exact for a negative base, which a power by logarithms is not.
        whole = _repeated(n, base, abs(int(exponent)))
        return whole if exponent > 0 else n.pointwise("reciprocal", [whole])
    if exponent == 0.5:
        return n.pointwise("sqrt", [base])
    if exponent == -0.5:
        return n.pointwise("rsqrt", [base])
    return n.pointwise("pow", [base, exponent])


def _repeated(n: NamedGraph, base: Value, times: int) -> Value:
    if times == 1:
        return base
    half = _repeated(n, base, times // 2)
    square = n.pointwise("mul", [half, half])
    return square if times % 2 == 0 else n.pointwise("mul", [base, square])


def _cosh(n: NamedGraph, node: fx.Node, args: list[Any]) -> Value:
    up, down = (n.pointwise("exp", [x]) for x in (args[0], n.pointwise("neg", args[:1])))
    return n.pointwise("mul", [n.pointwise("add", [up, down]), 0.5])


def _sinh(n: NamedGraph, node: fx.Node, args: list[Any]) -> Value:
    up, down = (n.pointwise("expm1", [x]) for x in (args[0], n.pointwise("neg", args[:1])))
    return n.pointwise("mul", [n.pointwise("sub", [up, down]), 0.5])


def _exp2(n: NamedGraph, node: fx.Node, args: list[Any]) -> Value:
    return n.pointwise("exp", [n.pointwise("mul", [args[0], math.log(2.0)])])


def _log2(n: NamedGraph, node: fx.Node, args: list[Any]) -> Value:
    return n.pointwise("mul", [n.pointwise("log", args[:1]), 1.0 / math.log(2.0)])


def _clamp(n: NamedGraph, node: fx.Node, args: list[Any]) -> Value:
    low, high = _option(node, args, 1, "min", None), _option(node, args, 2, "max", None)
    value = args[0]
    if low is not None:
        value = n.pointwise("maximum", [value, low])
    return value if high is None else n.pointwise("minimum", [value, high])


def _permute(n: NamedGraph, node: fx.Node, args: list[Any]) -> Value:
    return Value(args[0].node, [args[0].axes[i] for i in args[1]])


def _transpose(n: NamedGraph, node: fx.Node, args: list[Any]) -> Value:
    axes = list(args[0].axes)
    a, b = (args[1], args[2]) if len(args) > 2 else (0, len(axes) - 1)
    axes[a], axes[b] = axes[b], axes[a]
    return Value(args[0].node, axes)


def _unsqueeze(n: NamedGraph, node: fx.Node, args: list[Any]) -> Value:
    axes = list(args[0].axes)
    axes.insert(args[1] % (len(axes) + 1), ())
    return Value(args[0].node, axes)


def _squeeze(n: NamedGraph, node: fx.Node, args: list[Any]) -> Value:
    rank = len(args[0].axes)
    gone = {a % rank for a in _axes(args[0], args[1] if len(args) > 1 else None)} if rank else set()
    return Value(args[0].node, [x for i, x in enumerate(args[0].axes) if x or i not in gone])


def _broadcast_in_dim(n: NamedGraph, node: fx.Node, args: list[Any]) -> Value:
    value, shape, kept = args
    axes: list[Axis] = [()] * len(shape)
    for position, axis in zip(kept, value.axes, strict=True):
        axes[position] = axis
    return n.expand(Value(value.node, axes), shape)


def _full_like(n: NamedGraph, node: fx.Node, args: list[Any]) -> Value:
    packet = getattr(node.target, "overloadpacket", None)
    fill = args[1] if packet is aten.full_like else (1 if packet is aten.ones_like else 0)
    return n.expand(Value(fill, [()] * len(args[0].axes)), args[0].shape)


def _new_full(n: NamedGraph, node: fx.Node, args: list[Any]) -> Value:
    packet = getattr(node.target, "overloadpacket", None)
    fill = args[2] if packet is aten.new_full else (1 if packet is aten.new_ones else 0)
    return n.expand(Value(fill, [()] * len(args[1])), args[1])


def _relu(n: NamedGraph, node: fx.Node, args: list[Any]) -> Value:
    return n.pointwise("maximum", [args[0], 0.0])


def _product(names: Sequence[str], result: str) -> Callable[..., Value]:
    def handle(n: NamedGraph, node: fx.Node, args: list[Any]) -> Value:
        return n.contract(args[:2], names, result)

    return handle


def _where(n: Any, node: fx.Node, args: list[Any]) -> Value:
    values = [x if isinstance(x, Value) else Value(x, ()) for x in args]
    if all(type(v.node) in (int, float) for v in values[1:]):
        values[1] = n.floating(values[1])
    return n.pointwise("where", values)


HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.sum: _sum, prims.sum: _sum, aten.mean: _mean, aten.var: _variance, prims.var: _variance,
    aten.amax: _extreme("amax"), aten.amin: _extreme("amin"), prims.amax: _extreme("amax"),
    aten.pow: _power, prims.pow: _power, aten.cosh: _cosh, aten.sinh: _sinh, aten.exp2: _exp2,
    aten.log2: _log2, aten.where: _where, aten.clamp: _clamp, aten.clamp_min: _clamp, aten.relu: _relu,
    aten.permute: _permute, aten.t: _transpose, aten.transpose: _transpose,
    aten.unsqueeze: _unsqueeze, aten.squeeze: _squeeze, prims.squeeze: _squeeze,
    aten.view: lambda n, node, args: n.view(args[0], args[1]),
    aten._unsafe_view: lambda n, node, args: n.view(args[0], args[1]),
    aten.reshape: lambda n, node, args: n.view(args[0], args[1]),
    aten.expand: lambda n, node, args: n.expand(args[0], args[1]),
    prims.broadcast_in_dim: _broadcast_in_dim,
    aten.full_like: _full_like, aten.zeros_like: _full_like, aten.ones_like: _full_like,
    aten.new_full: _new_full, aten.new_zeros: _new_full, aten.new_ones: _new_full,
    aten.mm: _product(["ab", "bc"], "ac"), aten.mv: _product(["ab", "b"], "a"),
    aten.bmm: _product(["nab", "nbc"], "nac"), aten.dot: _product(["a", "a"], ""),
    aten.vdot: _product(["a", "a"], ""),
    aten.cumsum: cumulative_sum, aten.select: entry, aten.slice: part,
}  # fmt: skip
