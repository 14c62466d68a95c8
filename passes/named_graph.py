"""A graph that is written in operators on named axes: an operator on values says which axes are one."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from torch import fx
from tttc.passes.labels import Label, Labels
from tttc.passes.named_values import Axis, Clash, Value, culprit, rank_of, repeated_in

from tttc.ir import ops
from tttc.ir.errors import NotLowerable

NUMBERS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "neg": operator.neg, "reciprocal": lambda x: 1.0 / x, "exp": math.exp, "sqrt": math.sqrt,
    "rsqrt": lambda x: x**-0.5, "pow": operator.pow, "abs": abs,
}  # fmt: skip


class NamedGraph:
    """A graph and the names of its axes."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.labels = Labels()
        self.where: str | None = None

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
            except Clash as clash:
                value = values[clash.culprit]
                # Where one name after another does not do, the operand gets new ones for all of its axes.
                every = {x.root for axis in value.axes for x in axis}
                values[clash.culprit] = self.freshen(value, clash.labels if i < tries else every)
        raise NotLowerable("could not name the axes of an operation", self.where)

    # -- operators ------------------------------------------------------------------------------

    def pointwise(self, function: str, operands: Sequence[Any]) -> Value:
        """An elementwise function of values and numbers, broadcast as torch does."""
        values = [x if isinstance(x, Value) else Value(x, ()) for x in operands]
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
                        smaller = rank_of(values[owner]) < rank_of(value)
                        raise Clash(owner if smaller else index, clashes)
                    axes[position] = axis
                    setter[position] = index
                    continue
                if [x.size for x in axis] != [x.size for x in axes[position]]:
                    self.mismatch(axis, axes[position], "aligned")
                for x, y in zip(axis, axes[position], strict=True):
                    if not self.labels.unify(x, y):
                        loser = culprit(values, setter[position], index)
                        raise Clash(loser, [y if loser == setter[position] else x])
            seen = [x.root for a in axes for x in a]
            if len(set(seen)) != len(seen):
                raise Clash(index, repeated_in(seen))
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
                            raise Clash(index, axis)
                        axis_of[letter] = axis
                        setter[letter] = index
                        continue
                    known = axis_of[letter]
                    if [x.size for x in axis] != [x.size for x in known]:
                        self.mismatch(axis, known, "contracted")
                    for x, y in zip(axis, known, strict=True):
                        if not self.labels.unify(x, y):
                            small = rank_of(vs[setter[letter]]) < rank_of(value)
                            raise Clash(setter[letter] if small else index, [y if small else x])
                seen = [x.root for a in axis_of.values() for x in a]
                if len(set(seen)) != len(seen):
                    raise Clash(index, repeated_in(seen))
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
