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

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from tttc.passes.aten_operators import HANDLERS, IDENTITIES, POINTWISE
from tttc.passes.labels import Label, Labels
from tttc.passes.named_graph import NamedGraph
from tttc.passes.named_values import Axis, Value

from tttc.ir import ops
from tttc.ir.body import Body, source_line
from tttc.ir.errors import NotLowerable

aten = torch.ops.aten
prims = torch.ops.prims


class Normaliser(NamedGraph):
    """One run of the pass."""

    def __init__(self, captured: fx.GraphModule, roles: Sequence[str]) -> None:
        super().__init__()
        self.captured = captured
        self.roles = roles
        self.env: dict[fx.Node, Value] = {}
        self.constants: list[torch.Tensor] = []
        self.whole: set[str] = set()

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

    def floating(self, value: Value) -> Value:
        """A number as a value of the dtype computed in: alone, neither it nor what it is chosen by says which."""
        roles = dict(zip(self.roles, self.captured.graph.find_nodes(op="placeholder"), strict=True))
        usable = [r for r in roles if r not in self.whole and not r.startswith("carry")]
        like = self.env[roles[min(usable, key=lambda r: r.startswith("anchor"))]]
        owned = [(), self.own(like)]
        return Value(self.emit(ops.broadcast, (), [value.node, like.node], owned, ()), value.axes)

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


def normalise(captured: fx.GraphModule, roles: Sequence[str]) -> Body:
    """The captured step as a :class:`~tttc.ir.body.Body` for one token.

    ``roles`` names the placeholders in order: ``anchor_0``, ``carry_0``, ``token_0``, ``shared_0``, ...

    Raises:
        NotLowerable: with the operator and the user's line, where the IR has no form for it.
    """
    return Normaliser(captured, roles).run()
