"""Normalise: the captured step in the operators of the IR, its axes named.

Before: ATen operators on shapes::

    unsqueeze = aten.unsqueeze(k, 0)
    mm = aten.mm(unsqueeze, W)
    squeeze = aten.squeeze(mm, 0)
    add = aten.add(squeeze, b)

After: operators on named axes, views gone::

    z = contraction("i, i j -> j", k, W)
    a = elementwise("add", "j, j -> j", z, b)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import fx
from tttc.passes.labels import Label, Labels
from tttc.passes.positions import cumulative_sum, entry, part

from tttc.ir import ops
from tttc.ir.body import Body, source_line
from tttc.ir.errors import NotLowerable

aten = torch.ops.aten
prims = torch.ops.prims
Axis = tuple[
    Label, ...
]  # the labels an ATen axis is made of: none for size 1, several where axes were merged


class Value:
    """An ATen value: a node of the IR graph (or a number) and what its axes are called."""

    __slots__ = ("axes", "node")

    def __init__(self, node: fx.Node | float | int | bool, axes: Sequence[Axis]) -> None:
        self.node = node
        self.axes = tuple(axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(x.size for x in axis) for axis in self.axes)


class _Clash(Exception):
    """Two axes that must stay apart would get one name: ``labels`` of the operand ``culprit`` need new ones."""

    def __init__(self, culprit: int, labels: Iterable[Label]) -> None:
        self.culprit = culprit
        self.labels = frozenset(x.root for x in labels)


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
    aten.where: "where",
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
NUMBERS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "neg": operator.neg, "reciprocal": lambda x: 1.0 / x, "exp": math.exp, "sqrt": math.sqrt,
    "rsqrt": lambda x: x**-0.5, "pow": operator.pow, "abs": abs,
}  # fmt: skip


class Normaliser:
    """One run of the pass."""

    def __init__(self, captured: fx.GraphModule, roles: Sequence[str]) -> None:
        self.captured = captured
        self.roles = roles
        self.graph = fx.Graph()
        self.labels = Labels()
        self.env: dict[fx.Node, Value] = {}
        self.constants: list[torch.Tensor] = []
        self.where: str | None = None
        self.whole: set[str] = set()

    # -- emission -------------------------------------------------------------------------------

    def emit(
        self,
        target: Callable[..., Any],
        head: tuple[Any, ...],
        operands: Sequence[Any],
        dims: Sequence[Sequence[Label]],
        result: Sequence[Label],
    ) -> fx.Node:
        """An operator; its spec is written by :meth:`finish`, when all names are known."""
        node = self.graph.call_function(target, (*head, None, *operands))
        node.meta["labels"] = (tuple(map(tuple, dims)), tuple(result), len(head))
        node.meta["where"] = self.where
        # Names of a renaming may return at other axes: it can exchange them.
        scopes = (
            [*dims, result] if target is ops.rename else [[x for d in (*dims, result) for x in d]]
        )
        for scope in scopes:
            self.labels.separate(tuple(dict.fromkeys(x.root for x in scope)))
        return node

    @staticmethod
    def own(value: Value) -> tuple[Label, ...]:
        """The labels of the node behind a value (a value may have more: those it is broadcast along)."""
        if not isinstance(value.node, fx.Node):
            return ()
        return value.node.meta["labels"][1]

    def freshen(self, value: Value, labels: Iterable[Label]) -> Value:
        """The value, some of its axes under new names."""
        own = self.own(value)
        new = {x.root: x.root for x in (*own, *(x for axis in value.axes for x in axis))}
        new |= {x.root: Label(x.size) for x in labels}
        node = value.node
        if isinstance(node, fx.Node):
            node = self.emit(ops.rename, (), (node,), (own,), [new[x.root] for x in own])
        return Value(node, [tuple(new[x.root] for x in axis) for axis in value.axes])

    def retrying(self, build: Callable[[list[Value]], Value], operands: Sequence[Value]) -> Value:
        """``build``, with operands renamed where names clash."""
        values = list(operands)
        tries = 2 * len(values) + 2
        for i in range(2 * tries):
            try:
                return build(values)
            except _Clash as clash:
                value = values[clash.culprit]
                # Where one name after another does not do, the operand gets new ones for all of its axes.
                every = {x.root for axis in value.axes for x in axis}
                values[clash.culprit] = self.freshen(value, clash.labels if i < tries else every)
        raise NotLowerable("could not name the axes of an operation", self.where)

    # -- operators ------------------------------------------------------------------------------

    def pointwise(self, function: str, operands: Sequence[Any]) -> Value:
        """An elementwise function of values and numbers, broadcast as torch does."""
        values = [x if isinstance(x, Value) else Value(x, ()) for x in operands]
        if function == "where" and all(type(v.node) in (int, float) for v in values[1:]):
            values[1] = self.floating(values[1])
        if function in NUMBERS and all(not isinstance(v.node, fx.Node) for v in values):
            axes = self.retrying(lambda vs: Value(0, self.broadcast(vs)), values).axes
            return Value(NUMBERS[function](*(v.node for v in values)), axes)

        def build(vs: list[Value]) -> Value:
            axes = self.broadcast(vs)
            owned = [self.own(v) for v in vs]
            present = {x.root for o in owned for x in o}
            result = [x.root for axis in axes for x in axis if x.root in present]
            node = self.emit(ops.elementwise, (function,), [v.node for v in vs], owned, result)
            return Value(node, axes)

        return self.retrying(build, values)

    def floating(self, value: Value) -> Value:
        """A number as a value of the dtype computed in: alone, neither it nor what it is chosen by says which."""
        roles = dict(zip(self.roles, self.captured.graph.find_nodes(op="placeholder"), strict=True))
        usable = [r for r in roles if r not in self.whole and not r.startswith("carry")]
        like = self.env[roles[min(usable, key=lambda r: r.startswith("anchor"))]]
        owned = [(), self.own(like)]
        return Value(self.emit(ops.broadcast, (), [value.node, like.node], owned, ()), value.axes)

    def broadcast(self, values: list[Value]) -> list[Axis]:
        """The axes of the result of an elementwise operation, the operands' axes unified."""
        rank = max(len(v.axes) for v in values)
        axes: list[Axis] = [()] * rank
        setter = [0] * rank
        for index, value in enumerate(values):
            offset = rank - len(value.axes)
            for position, axis in enumerate(value.axes, offset):
                if not axis:
                    continue
                if not axes[position]:
                    others = {x.root: setter[i] for i, a in enumerate(axes) for x in a}
                    clashes = [x for x in axis if x.root in others]
                    if clashes:
                        owner = others[clashes[0].root]
                        smaller = _rank(values[owner]) < _rank(value)
                        raise _Clash(owner if smaller else index, clashes)
                    axes[position] = axis
                    setter[position] = index
                    continue
                if [x.size for x in axis] != [x.size for x in axes[position]]:
                    self.mismatch(axis, axes[position], "aligned")
                for x, y in zip(axis, axes[position], strict=True):
                    if not self.labels.unify(x, y):
                        culprit = _culprit(values, setter[position], index)
                        raise _Clash(culprit, [y if culprit == setter[position] else x])
            seen = [x.root for a in axes for x in a]
            if len(set(seen)) != len(seen):
                raise _Clash(index, _repeated_in(seen))
        return axes

    def mismatch(self, axis: Axis, other: Axis, meeting: str) -> NoReturn:
        """Two axes meet that are not made of the same."""
        raise NotLowerable(f"merged axes are {meeting} with other axes", self.where)

    def contract(self, operands: Sequence[Value], names: Sequence[str], result: str) -> Value:
        """An einsum of values, one letter an axis."""

        def build(vs: list[Value]) -> Value:
            axis_of: dict[str, Axis] = {}
            setter: dict[str, int] = {}
            for index, (value, letters) in enumerate(zip(vs, names, strict=True)):
                for letter, axis in zip(letters, value.axes, strict=True):
                    if letter not in axis_of:
                        others = {x.root for a in axis_of.values() for x in a}
                        if any(x.root in others for x in axis):
                            raise _Clash(index, axis)
                        axis_of[letter] = axis
                        setter[letter] = index
                        continue
                    known = axis_of[letter]
                    if [x.size for x in axis] != [x.size for x in known]:
                        self.mismatch(axis, known, "contracted")
                    for x, y in zip(axis, known, strict=True):
                        if not self.labels.unify(x, y):
                            small = _rank(vs[setter[letter]]) < _rank(value)
                            raise _Clash(setter[letter] if small else index, [y if small else x])
                seen = [x.root for a in axis_of.values() for x in a]
                if len(set(seen)) != len(seen):
                    raise _Clash(index, _repeated_in(seen))
            owned = [self.own(v) for v in vs]
            present = {x.root for o in owned for x in o}
            axes = [axis_of[letter] for letter in result]
            kept = {x.root for axis in axes for x in axis}
            factor: float = 1.0
            for letter, axis in axis_of.items():
                if letter not in result:
                    factor *= math.prod(x.size for x in axis if x.root not in present)
            numbers = [v.node for v in vs if not isinstance(v.node, fx.Node)]
            factor *= math.prod(numbers) if numbers else 1.0  # type: ignore[arg-type]
            nodes = [
                (v.node, o) for v, o in zip(vs, owned, strict=True) if isinstance(v.node, fx.Node)
            ]
            if not nodes:
                return Value(factor, axes)
            out = [x.root for axis in axes for x in axis if x.root in present]
            node: Any = nodes[0][0]
            if len(nodes) > 1 or any(x.root not in kept for x in nodes[0][1]):
                node = self.emit(
                    ops.contraction, (), [n for n, _ in nodes], [o for _, o in nodes], out
                )
            value = Value(node, axes)
            return value if factor == 1.0 else self.pointwise("mul", [value, factor])

        return self.retrying(build, operands)

    def reduce(self, value: Value, axes: Sequence[int], keepdim: bool, function: str) -> Value:
        """A reduction over axes; ``sum`` is a contraction."""
        rank = len(value.axes)
        gone = {a % rank for a in axes} if rank else set()
        letters = [chr(ord("a") + i) for i in range(rank)]
        if function == "sum":
            kept = "".join(x for i, x in enumerate(letters) if i not in gone)
            out = self.contract([value], ["".join(letters)], kept)
        else:
            owned = self.own(value)
            dropped = {x.root for i in gone for x in value.axes[i]}
            result = [x for x in owned if x.root not in dropped]
            node: Any = value.node
            if len(result) != len(owned):
                node = self.emit(ops.reduction, (function,), [value.node], [owned], result)
            out = Value(node, [a for i, a in enumerate(value.axes) if i not in gone])
        if not keepdim:
            return out
        it = iter(out.axes)
        return Value(out.node, [() if i in gone else next(it) for i in range(rank)])

    def view(self, value: Value, shape: Sequence[int]) -> Value:
        """A reshape that merges whole axes or takes merged ones apart again."""
        flat = [x for axis in value.axes for x in axis]
        total = math.prod(x.size for x in flat)
        sizes = [int(s) for s in shape]
        if -1 in sizes:
            known = math.prod(s for s in sizes if s != -1)
            sizes[sizes.index(-1)] = total // max(known, 1)
        axes: list[Axis] = []
        for size in sizes:
            taken: list[Label] = []
            while math.prod(x.size for x in taken) < size and flat:
                taken.append(flat.pop(0))
            if math.prod(x.size for x in taken) != size:
                raise NotLowerable("a reshape splits an axis of the step", self.where)
            axes.append(tuple(taken))
        return Value(value.node, axes)

    def expand(self, value: Value, shape: Sequence[int]) -> Value:
        """Broadcast size-1 axes."""
        offset = len(shape) - len(value.axes)
        axes: list[Axis] = []
        for i, size in enumerate(shape):
            axis: Axis = value.axes[i - offset] if i >= offset else ()
            if not axis and size not in (1, -1):
                axis = (Label(int(size)),)
            axes.append(axis)
        return Value(value.node, axes)

    # -- the walk -------------------------------------------------------------------------------

    def run(self) -> Body:
        """Translate the captured graph."""
        placeholders: list[fx.Node] = []
        shapes: dict[str, tuple[int, ...]] = {}
        results: list[Value] = []
        leaf: dict[str, fx.Node] = {}
        for node in self.captured.graph.nodes:
            self.where = source_line(node)
            if node.op == "placeholder":
                role = self.roles[len(placeholders)]
                shape = tuple(int(s) for s in node.meta["val"].shape)
                new = self.graph.placeholder(role)
                axes = self.axes_of(role, shape)
                if role.startswith("carry"):  # the same leaf, so the same axes
                    axes[:] = self.env[leaf[role.replace("carry", "anchor")]].axes
                leaf[role] = node
                own = tuple(x for axis in axes for x in axis)
                new.meta["labels"] = ((), own, 0)
                self.labels.separate(own)
                shapes[role] = shape
                if not node.meta["val"].is_floating_point():
                    self.whole.add(role)
                placeholders.append(new)
                self.env[node] = Value(new, axes)
            elif node.op == "get_attr":
                self.env[node] = self.constant(
                    getattr(self.captured, node.target), node.meta.get("known", False)
                )
            elif node.op == "call_function":
                self.env[node] = self.call(node)
            elif node.op == "output":
                results = [self.env[x] for x in node.args[0]]
        return self.finish(placeholders, shapes, results)

    def axes_of(self, role: str, shape: tuple[int, ...]) -> list[Axis]:
        """The axes of an argument, under new names."""
        return [() if s == 1 else (Label(s),) for s in shape]

    def constant(self, tensor: torch.Tensor, made: bool) -> Value:
        """A tensor the step closes over (and may change) or has ``made`` from nothing."""
        if tensor.numel() == 1:
            return Value(tensor.item(), [()] * tensor.ndim)
        if made and tensor.is_floating_point() and tensor.unique().numel() == 1:
            # The ones that a derivative subtracts from, say: a number, however tall the tiles are.
            return self.expand(Value(tensor.flatten()[0].item(), [()] * tensor.ndim), tensor.shape)
        node = self.graph.placeholder(f"constant_{len(self.constants)}")
        axes = [() if s == 1 else (Label(s),) for s in tensor.shape]
        own = tuple(x for axis in axes for x in axis)
        node.meta["labels"] = ((), own, 0)
        self.labels.separate(own)
        self.constants.append(tensor.detach().squeeze())
        return Value(node, axes)

    def call(self, node: fx.Node) -> Any:
        """One ATen operator."""
        packet = _functional(node)
        args: list[Any] = [self.env[a] if isinstance(a, fx.Node) else a for a in node.args]
        if not any(isinstance(a, Value) for a in _flatten(args)) and isinstance(
            node.meta.get("val"), torch.Tensor
        ):
            return self.from_nothing(node)
        if packet in IDENTITIES or packet in (aten._to_copy, prims.convert_element_type):
            return self.cast(node, args[0])
        if packet in (aten.add, aten.sub):
            alpha = node.kwargs.get("alpha", 1)
            other = args[1] if alpha == 1 else self.pointwise("mul", [args[1], alpha])
            return self.pointwise("add" if packet is aten.add else "sub", [args[0], other])
        if packet is aten.div and node.kwargs.get("rounding_mode"):
            raise NotLowerable("aten.div with rounding", self.where)
        if packet in (aten.div, prims.div) and isinstance(args[1], (int, float)):
            return self.pointwise("mul", [args[0], 1.0 / args[1]])
        if packet in POINTWISE:
            return self.pointwise(POINTWISE[packet], args)
        handler = HANDLERS.get(packet)
        if handler is None:
            raise NotLowerable(f"the operator {packet} has no form in named dimensions", self.where)
        return handler(self, node, args)

    def cast(self, node: fx.Node, value: Value) -> Value:
        """A cast between floating dtypes says nothing; one from bool makes a number."""
        source, target = _dtype(node.args[0]), _dtype(node)
        if source is None or target is None or source == target:
            return value
        if target.is_floating_point and source.is_floating_point:
            return value
        if target.is_floating_point:
            return self.pointwise("float", [value, self.floating(Value(1.0, ()))])
        raise NotLowerable(f"a cast from {source} to {target} inside a step", self.where)

    def from_nothing(self, node: fx.Node) -> Value:
        """A tensor made from no input: evaluated now."""
        target: Any = node.target
        packet = target.overloadpacket
        shape = tuple(int(s) for s in node.meta["val"].shape)
        if packet in (aten.full, aten.zeros, aten.ones, aten.empty, aten.scalar_tensor):
            fill: Any = {aten.full: node.args[1] if packet is aten.full else 0, aten.ones: 1,
                    aten.scalar_tensor: node.args[0]}.get(packet, 0)  # fmt: skip
            return self.expand(Value(fill, [()] * len(shape)), shape)
        kwargs = {k: v for k, v in node.kwargs.items() if k not in ("device", "pin_memory")}
        return self.constant(target(*node.args, **kwargs), True)

    def finish(self, placeholders, shapes, results) -> Body:
        """Bind the results to the names of the state, give every axis its letter, write the specs."""
        states = [p for p in placeholders if p.name.startswith("anchor")]
        outputs: list[Any] = []
        output_shapes = []
        for i, value in enumerate(results):
            self.where = None
            if i < len(states):
                anchor = placeholders[i]
                want = anchor.meta["labels"][1]
                value = self.bind(value, want)
                outputs.append(self.settle(value, want, anchor))
            else:
                flat = [x for axis in value.axes for x in axis]
                outputs.append((value, flat))
                output_shapes.append(value.shape)
        final = []
        for out in outputs:
            if isinstance(out, tuple):
                value, flat = out
                out = self.settle(value, flat, None)
            final.append(out)
        self.graph.output(tuple(final))
        every = [x for n in self.graph.nodes if "labels" in n.meta for x in n.meta["labels"][1]]
        every += [
            x
            for n in self.graph.nodes
            if "labels" in n.meta
            for o in n.meta["labels"][0]
            for x in o
        ]
        Labels.name(every)
        sizes = {x.root.name: x.size for x in every if x.root.name is not None}
        for node in list(self.graph.nodes):
            if "labels" not in node.meta:
                continue
            operands, result, head = node.meta.pop("labels")
            node.meta["dims"] = tuple(x.root.name for x in result)
            if node.op == "call_function":
                text = ", ".join(" ".join(x.root.name for x in o) for o in operands)
                spec = f"{text} -> {' '.join(node.meta['dims'])}"
                node.args = (*node.args[:head], spec, *node.args[head + 1 :])
                if (
                    node.target is ops.rename
                    and operands[0]
                    and [x.root.name for x in operands[0]] == list(node.meta["dims"])
                ):
                    node.replace_all_uses_with(node.args[1])
                    self.graph.erase_node(node)
        return Body.make(
            self.graph,
            sizes,
            states=len(states),
            leaf_shapes=shapes,
            output_shapes=output_shapes,
            constants=self.constants,
            whole=frozenset(self.whole),
        )

    def bind(self, value: Value, want: Sequence[Label]) -> Value:
        """The value with its axes named as ``want``."""
        flat = [x for axis in value.axes for x in axis]
        for _ in range(2):
            if all(self.labels.unify(x, y) for x, y in zip(flat, want, strict=True)):
                return value
            value = self.freshen(value, flat)
            flat = [x for axis in value.axes for x in axis]
        raise NotLowerable("a state is returned with its axes exchanged")

    def settle(self, value: Value, want: Sequence[Label], like: fx.Node | None) -> fx.Node:
        """A node whose axes are exactly ``want``."""
        own = [x.root for x in self.own(value)]
        target = [x.root for x in want]
        if isinstance(value.node, fx.Node) and own == target:
            return value.node
        if isinstance(value.node, fx.Node) and sorted(map(id, own)) == sorted(map(id, target)):
            return self.emit(ops.contraction, (), (value.node,), (own,), target)
        if like is None:
            raise NotLowerable("an output of the step is the same along an axis")
        return self.emit(
            ops.broadcast, (), (value.node, like), (own, like.meta["labels"][1]), target
        )


def _rank(value: Value) -> int:
    return sum(map(bool, value.axes))


def _culprit(values: Sequence[Value], first: int, second: int) -> int:
    """Which of two operands is renamed: that with fewer axes, so that states keep theirs; else an argument.

    Renaming an argument keeps what is computed from it under one name.
    """
    one, two = _rank(values[first]), _rank(values[second])
    if one != two:
        return first if one < two else second
    return first if _is_argument(values[first]) else second


def _repeated_in(labels: Sequence[Label]) -> list[Label]:
    return [x for i, x in enumerate(labels) if x in labels[:i]]


def _is_argument(value: Value) -> bool:
    return isinstance(value.node, fx.Node) and value.node.op == "placeholder"


def _functional(node: fx.Node) -> Any:
    """A node's operator. Decompositions of torch write over what they have just made: the same as making it anew."""
    packet: Any = getattr(node.target, "overloadpacket", node.target)
    name = getattr(packet, "__name__", "")
    if name.endswith("_") and not name.endswith("__") and isinstance(node.args[0], fx.Node):
        written = node.args[0]
        if written.op == "call_function" and set(written.users) == {node}:
            return getattr(aten, name[:-1], packet)
    return packet


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None


def _flatten(args: Sequence[Any]) -> list[Any]:
    return [y for x in args for y in (x if isinstance(x, (list, tuple)) else (x,))]


def _axes(value: Value, dims: Any) -> list[int]:
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(len(value.axes)))
    return [dims] if isinstance(dims, int) else list(dims)


def _option(node: fx.Node, args: Sequence[Any], position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else node.kwargs.get(name, default)


def _sum(n: Normaliser, node: fx.Node, args: list[Any]) -> Value:
    axes = _axes(args[0], _option(node, args, 1, "dim", None))
    return n.reduce(args[0], axes, _option(node, args, 2, "keepdim", False), "sum")


def _mean(n: Normaliser, node: fx.Node, args: list[Any]) -> Value:
    axes = _axes(args[0], _option(node, args, 1, "dim", None))
    count = math.prod(args[0].shape[a] for a in axes)
    total = n.reduce(args[0], axes, _option(node, args, 2, "keepdim", False), "sum")
    return n.pointwise("mul", [total, 1.0 / count])


def _variance(n: Normaliser, node: fx.Node, args: list[Any]) -> Value:
    axes = _axes(args[0], args[1])
    correction = _option(node, args, 2, "correction", 1)
    correction = 1 if correction is None else correction
    count = math.prod(args[0].shape[a] for a in axes)
    mean = n.pointwise("mul", [n.reduce(args[0], axes, True, "sum"), 1.0 / count])
    centred = n.pointwise("sub", [args[0], mean])
    squares = n.reduce(n.pointwise("mul", [centred, centred]), axes, False, "sum")
    return n.pointwise("mul", [squares, 1.0 / (count - correction)])


def _extreme(function: str) -> Callable[..., Value]:
    def handle(n: Normaliser, node: fx.Node, args: list[Any]) -> Value:
        axes = _axes(args[0], _option(node, args, 1, "dim", None))
        return n.reduce(args[0], axes, _option(node, args, 2, "keepdim", False), function)

    return handle


def _power(n: Normaliser, node: fx.Node, args: list[Any]) -> Value:
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


def _repeated(n: Normaliser, base: Value, times: int) -> Value:
    if times == 1:
        return base
    half = _repeated(n, base, times // 2)
    square = n.pointwise("mul", [half, half])
    return square if times % 2 == 0 else n.pointwise("mul", [base, square])


def _cosh(n: Normaliser, node: fx.Node, args: list[Any]) -> Value:
    up, down = (n.pointwise("exp", [x]) for x in (args[0], n.pointwise("neg", args[:1])))
    return n.pointwise("mul", [n.pointwise("add", [up, down]), 0.5])


def _sinh(n: Normaliser, node: fx.Node, args: list[Any]) -> Value:
    up, down = (n.pointwise("expm1", [x]) for x in (args[0], n.pointwise("neg", args[:1])))
    return n.pointwise("mul", [n.pointwise("sub", [up, down]), 0.5])


def _exp2(n: Normaliser, node: fx.Node, args: list[Any]) -> Value:
    return n.pointwise("exp", [n.pointwise("mul", [args[0], math.log(2.0)])])


def _log2(n: Normaliser, node: fx.Node, args: list[Any]) -> Value:
    return n.pointwise("mul", [n.pointwise("log", args[:1]), 1.0 / math.log(2.0)])


def _clamp(n: Normaliser, node: fx.Node, args: list[Any]) -> Value:
    low, high = _option(node, args, 1, "min", None), _option(node, args, 2, "max", None)
    value = args[0]
    if low is not None:
        value = n.pointwise("maximum", [value, low])
    return value if high is None else n.pointwise("minimum", [value, high])


def _permute(n: Normaliser, node: fx.Node, args: list[Any]) -> Value:
    return Value(args[0].node, [args[0].axes[i] for i in args[1]])


def _transpose(n: Normaliser, node: fx.Node, args: list[Any]) -> Value:
    axes = list(args[0].axes)
    a, b = (args[1], args[2]) if len(args) > 2 else (0, len(axes) - 1)
    axes[a], axes[b] = axes[b], axes[a]
    return Value(args[0].node, axes)


def _unsqueeze(n: Normaliser, node: fx.Node, args: list[Any]) -> Value:
    axes = list(args[0].axes)
    axes.insert(args[1] % (len(axes) + 1), ())
    return Value(args[0].node, axes)


def _squeeze(n: Normaliser, node: fx.Node, args: list[Any]) -> Value:
    rank = len(args[0].axes)
    gone = {a % rank for a in _axes(args[0], args[1] if len(args) > 1 else None)} if rank else set()
    return Value(args[0].node, [x for i, x in enumerate(args[0].axes) if x or i not in gone])


def _broadcast_in_dim(n: Normaliser, node: fx.Node, args: list[Any]) -> Value:
    value, shape, kept = args
    axes: list[Axis] = [()] * len(shape)
    for position, axis in zip(kept, value.axes, strict=True):
        axes[position] = axis
    return n.expand(Value(value.node, axes), shape)


def _full_like(n: Normaliser, node: fx.Node, args: list[Any]) -> Value:
    packet = getattr(node.target, "overloadpacket", None)
    fill = args[1] if packet is aten.full_like else (1 if packet is aten.ones_like else 0)
    return n.expand(Value(fill, [()] * len(args[0].axes)), args[0].shape)


def _new_full(n: Normaliser, node: fx.Node, args: list[Any]) -> Value:
    packet = getattr(node.target, "overloadpacket", None)
    fill = args[2] if packet is aten.new_full else (1 if packet is aten.new_ones else 0)
    return n.expand(Value(fill, [()] * len(args[1])), args[1])


def _relu(n: Normaliser, node: fx.Node, args: list[Any]) -> Value:
    return n.pointwise("maximum", [args[0], 0.0])


def _product(names: Sequence[str], result: str) -> Callable[..., Value]:
    def handle(n: Normaliser, node: fx.Node, args: list[Any]) -> Value:
        return n.contract(args[:2], names, result)

    return handle


HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.sum: _sum, prims.sum: _sum, aten.mean: _mean, aten.var: _variance, prims.var: _variance,
    aten.amax: _extreme("amax"), aten.amin: _extreme("amin"), prims.amax: _extreme("amax"),
    aten.pow: _power, prims.pow: _power, aten.cosh: _cosh, aten.sinh: _sinh, aten.exp2: _exp2,
    aten.log2: _log2, aten.clamp: _clamp, aten.clamp_min: _clamp, aten.relu: _relu,
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


def normalise(captured: fx.GraphModule, roles: Sequence[str]) -> Body:
    """The captured step as a :class:`~tttc.ir.body.Body` for one token.

    ``roles`` names the placeholders in order: ``anchor_0``, ``carry_0``, ``token_0``, ``shared_0``, ...

    Raises:
        NotLowerable: with the operator and the user's line, where the IR has no form for it.
    """
    return Normaliser(captured, roles).run()
