"""Backward: the vector-Jacobian product of a body, as another body.

Before::

    z = contraction("t i, i j -> t j", q, A)
    y = elementwise("add", "t j, t j -> t j", z, c)
    return A_new, y

After (``gstate_0`` and ``goutput_0`` are the cotangents of ``A_new`` and ``y``)::

    dq = contraction("t j, i j -> t i", goutput_0, A)
    dA = contraction("t i, t j -> i j", q, goutput_0)
    dA = elementwise("add", "i j, i j -> i j", gstate_0, dA)
    return dA, dq, ...

Every operator has a rule of its own; a contraction's are contractions. A cotangent that is the same along a
feature dimension is kept without it, as elementwise operators repeat their operands anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import opt_einsum
from torch import fx
from tttc.passes.derivatives import DERIVATIVES, Value

from tttc.ir import ops
from tttc.ir.body import Body, head_length, is_token, operands_of, role
from tttc.ir.build import Builder, dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.spec import Dims, Relation, parse_relation

TYPICAL_TOKENS = 16  # the mini-batch size at which orders of products are chosen


@dataclass
class Backward:
    """The VJP of a body.

    ``body`` takes the arguments of the forward body, then ``gstate_k`` and ``goutput_k``; its results are the
    cotangents of the leaves in ``wanted`` (``"anchor_0"``, ``"token_2"``, ...), those of shared leaves summed
    over the tokens.
    """

    body: Body
    wanted: list[str]
    zero: set[str]  # of the wanted, those that no given cotangent reaches


class _Reverse:
    """One run of the pass."""

    def __init__(self, body: Body, wanted: Sequence[str], states: Iterable[int]) -> None:
        self.body = body
        self.wanted = wanted
        self.states = set(states)
        self.graph = fx.Graph()
        self.builder = Builder(self.graph)
        self.env: dict[fx.Node, fx.Node] = {}  # of the forward graph -> of the new one
        self.cotangents: dict[fx.Node, fx.Node] = {}  # of the forward graph -> cotangent so far
        self.active = self._active()

    def _active(self) -> set[fx.Node]:
        """The nodes through which a wanted leaf reaches a result."""
        active = {n for n in self.body.placeholders if str(n.target) in self.wanted}
        for node in self.body.nodes:
            operands = operands_of(node)
            rules: Sequence[Any] = [True] * len(operands)
            if node.target is ops.elementwise:
                rules = DERIVATIVES[str(node.args[0])]
            elif node.target in (ops.broadcast, ops.at_last):
                rules = [True, None]
            if any(x in active and rule for x, rule in zip(operands, rules, strict=True)):
                active.add(node)
        return active

    def run(self) -> Backward:
        body = self.body
        for node in body.gm.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = self.placeholder(str(node.target), dims_of(node))
            elif node.op == "call_function":
                operands = [self.env.get(x, x) for x in operands_of(node)]
                self.env[node] = self.builder.copy(node, operands, dims_of(node))
        for i, node in enumerate(body.results):
            if i < body.states and i not in self.states:
                continue
            name = f"gstate_{i}" if i < body.states else f"goutput_{i - body.states}"
            given = self.placeholder(name, dims_of(node))
            if node in self.active:
                self.add(node, given)
        for node in reversed(body.nodes):
            if node in self.cotangents:
                self.visit(node)
        by_name = {str(n.target): n for n in body.placeholders}
        self.graph.output(tuple(self.result(by_name[name]) for name in self.wanted))
        states = sum(role(by_name[name])[0] in ("anchor", "carry") for name in self.wanted)
        made = body.with_graph(self.graph, states=states, output_shapes=[])
        zero = {name for name in self.wanted if by_name[name] not in self.cotangents}
        return Backward(made, list(self.wanted), zero)

    def placeholder(self, name: str, dims: Dims) -> fx.Node:
        """An argument of the new graph."""
        node = self.graph.placeholder(name)
        node.meta["dims"] = dims
        return node

    def result(self, leaf: fx.Node) -> fx.Node:
        """The cotangent of a leaf, all its axes there."""
        if leaf not in self.cotangents:
            return self.filled(0.0, leaf)
        return self.filled(self.cotangents[leaf], leaf)

    def filled(self, x: Any, node: fx.Node) -> fx.Node:
        """``x`` with the axes of a forward node, repeated along those it lacks."""
        dims = dims_of(node)
        if isinstance(x, fx.Node) and set(dims_of(x)) == set(dims):
            return self.builder.contraction([x], dims)
        return self.builder.call(ops.broadcast, (), (x, self.env[node]), dims)

    def add(self, node: Any, cotangent: Any) -> None:
        """Add to the cotangent of a forward node; it may lack axes along which it is the same."""
        if node not in self.active:
            return
        if node in self.cotangents:
            before = self.cotangents[node]
            have = {*dims_of(before), *dims_of(cotangent)}
            dims = tuple(d for d in dims_of(node) if d in have)
            cotangent = self.builder.elementwise("add", before, cotangent, result=dims)
        self.cotangents[node] = cotangent

    def visit(self, node: fx.Node) -> None:
        """Hand a node's cotangent on to its operands."""
        g = self.cotangents[node]
        rules: dict[Any, Callable[[fx.Node, fx.Node], None]] = {
            ops.elementwise: self.elementwise,
            ops.contraction: self.contraction,
            ops.masked_contraction: self.contraction,
            ops.masked: self.masked,
            ops.running_product: self.running_product,
            ops.triangular_solve: self.triangular_solve,
            ops.reduction: self.reduction,
            ops.rename: self.rename,
            ops.broadcast: self.broadcast,
            ops.last: self.last,
            ops.at_last: self.at_last,
        }
        rules[node.target](node, g)

    # -- sums ----------------------------------------------------------------------------------------

    def summed(self, x: fx.Node, node: fx.Node, operand: fx.Node) -> Any:
        """A cotangent with the axes of ``node``, added up along those that ``operand`` lacks."""
        lacking = [d for d in dims_of(node) if d not in dims_of(operand)]
        times = 1
        for d in lacking:
            if d not in dims_of(x):
                if is_token(d):  # how many there are is known at run time only
                    x = self.filled(x, node)
                else:
                    times *= self.body.sizes[d]
        dims = tuple(d for d in dims_of(operand) if d in dims_of(x))
        if set(dims) != set(dims_of(x)):
            x = self.builder.contraction([x], dims)
        return x if times == 1 else self.builder.elementwise("mul", x, float(times))

    def product(self, operands: Sequence[Any], result: Dims) -> fx.Node:
        """A product of operands, two at a time, in the order that takes the fewest operations."""
        operands = list(operands)
        while len(operands) > 2:
            i, j = self.first_pair(operands, result)
            pair = [operands[i], operands[j]]
            rest = [x for k, x in enumerate(operands) if k not in (i, j)]
            needed = {d for x in rest for d in dims_of(x)} | set(result)
            every = dict.fromkeys(d for x in pair for d in dims_of(x))
            operands = [
                *rest,
                self.builder.contraction(pair, tuple(d for d in every if d in needed)),
            ]
        return self.builder.contraction(operands, result)

    def first_pair(self, operands: Sequence[fx.Node], result: Dims) -> tuple[int, int]:
        """The pair of operands to multiply first."""
        labels = list(dict.fromkeys(d for x in operands for d in dims_of(x)))
        letter = {d: opt_einsum.get_symbol(i) for i, d in enumerate(labels)}
        inputs = ",".join("".join(letter[d] for d in dims_of(x)) for x in operands)
        shapes = [
            tuple(TYPICAL_TOKENS if is_token(d) else self.body.sizes[d] for d in dims_of(x))
            for x in operands
        ]
        text = f"{inputs}->{''.join(letter[d] for d in result)}"
        path, _ = opt_einsum.contract_path(text, *shapes, shapes=True, optimize="optimal")
        return tuple(path[0])  # type: ignore[return-value]

    # -- operators -----------------------------------------------------------------------------------

    def elementwise(self, node: fx.Node, g: fx.Node) -> None:
        """By the table of derivatives; summed along the axes an operand was repeated."""
        rules = DERIVATIVES[str(node.args[0])]
        operands = operands_of(node)
        values = [Value(self.builder, self.env.get(x, x)) for x in operands]
        for x, rule in zip(operands, rules, strict=True):
            if x in self.active and rule is not None:
                got = rule(Value(self.builder, g), Value(self.builder, self.env[node]), *values)
                assert isinstance(got.node, fx.Node)
                self.add(x, self.summed(got.node, node, x))

    def contraction(self, node: fx.Node, g: fx.Node) -> None:
        """A contraction of the cotangent with the other operands, under the same relation of tokens."""
        operands = operands_of(node)
        relation = str(node.args[0]) if head_length(node) else None
        related = {*parse_relation(relation)[:2]} if relation else set()
        for i, x in enumerate(operands):
            if x not in self.active:
                continue
            others = [self.env[y] for k, y in enumerate(operands) if k != i]
            have = {d for y in (g, *others) for d in dims_of(y)}
            dims = tuple(d for d in dims_of(x) if d in have)
            if relation is None:
                self.add(x, self.product([g, *others], dims))
            elif related <= set(dims_of(x)):
                tile = self.filled(self.product([g, *others], dims), x)
                self.add(x, self.builder.masked(relation, tile))
            else:
                if related & set(dims_of(node)) - have:
                    g = self.filled(g, node)
                dims = tuple(d for d in dims_of(x) if d in have | related | set(dims_of(g)))
                self.add(x, self.causal(relation, [g, *others], dims))

    def causal(self, relation: str, operands: Sequence[fx.Node], result: Dims) -> fx.Node:
        """A causal product: of more than two operands, all but that with most axes first."""
        ordered = sorted(operands, key=lambda x: len(dims_of(x)))
        if len(ordered) > 2:
            *some, widest = ordered
            needed = {*parse_relation(relation)[:2], *result, *dims_of(widest)}
            every = dict.fromkeys(d for x in some for d in dims_of(x))
            ordered = [self.product(some, tuple(d for d in every if d in needed)), widest]
        return self.builder.masked_contraction(relation, ordered, result)

    def masked(self, node: fx.Node, g: fx.Node) -> None:
        """The cotangent under the same mask."""
        (x,) = operands_of(node)
        self.add(x, self.builder.masked(str(node.args[0]), self.filled(g, node)))

    def running_product(self, node: fx.Node, g: fx.Node) -> None:
        """Of one factor: the products of those after it times the products of those before it.

        For ``P_ts``, the product over the tokens r after s and up to t: ``sum_t P_tr sum_(s<r) g_ts P_rs / x_r``, where
        the last product leaves out r instead of dividing by it.
        """
        (x,) = operands_of(node)
        earlier, later, strict = parse_relation(str(node.args[0]))
        features = tuple(d for d in dims_of(x) if d != later)
        pairs = earlier in dims_of(node)
        factor = f"{earlier}1" if pairs else earlier
        value, given = self.env[x], self.filled(g, node)
        before = f"{earlier}<{later}"
        after = self.builder.running_product(str(node.args[0]), value, (later, earlier, *features))
        after = self.builder.rename(
            after, {earlier: factor}
        )  # of the tokens between a factor and t
        until = self.builder.running_product(
            before, value, (later, earlier, *features) if pairs else (later, *features)
        )
        until = self.builder.rename(until, {later: factor})  # of those before the factor
        if pairs:
            given = self.builder.masked_contraction(
                f"{earlier}<{factor}", [given, until], (later, factor, *features)
            )
        relation = f"{factor}{'<' if strict else '<='}{later}"
        got = self.builder.masked_contraction(relation, [given, after], (factor, *features))
        if not pairs:
            got = self.builder.elementwise("mul", got, until)
        got = self.builder.rename(got, {factor: later})
        self.add(x, self.builder.contraction([got], dims_of(x)))

    def triangular_solve(self, node: fx.Node, g: fx.Node) -> None:
        """The cotangent solved by the transposed system; that of the system is its product with the solution."""
        system, x = operands_of(node)
        r = parse_relation(str(node.args[0]))
        (own,) = {r.earlier, r.later} & set(dims_of(node))
        other = r.earlier if own == r.later else r.later
        swap = {own: other, other: own}
        transposed = self.builder.rename(self.env.get(system, system), swap)
        backwards = str(Relation(swap[r.earlier], swap[r.later], True))
        made = self.builder.triangular_solve(backwards, transposed, self.filled(g, node))
        self.add(x, made)
        if system in self.active:
            solution = self.builder.rename(self.env[node], {own: other})
            pair = self.builder.contraction([made, solution], (own, other))
            pair = self.builder.masked(str(node.args[0]), self.builder.elementwise("neg", pair))
            have = tuple(d for d in dims_of(system))
            self.add(system, self.builder.contraction([pair], have))

    def reduction(self, node: fx.Node, g: fx.Node) -> None:
        """The extreme elements share the cotangent, as in torch."""
        if node.args[0] not in ("amax", "amin"):
            raise NotLowerable(f"the reduction {node.args[0]} has no derivative")
        (x,) = operands_of(node)
        hit = self.builder.elementwise("eq", self.env[x], self.env[node])
        ones = self.builder.elementwise("where", hit, 1.0, 0.0, result=dims_of(x))
        count = self.builder.contraction([ones], dims_of(node))
        share = self.builder.elementwise("div", g, count)
        self.add(x, self.builder.elementwise("where", hit, share, 0.0, result=dims_of(x)))

    def rename(self, node: fx.Node, g: fx.Node) -> None:
        """The cotangent under the old names."""
        (x,) = operands_of(node)
        self.add(x, self.builder.rename(g, dict(zip(dims_of(node), dims_of(x), strict=True))))

    def broadcast(self, node: fx.Node, g: fx.Node) -> None:
        """The cotangent summed along the axes that were repeated."""
        x, _ = operands_of(node)
        self.add(x, self.summed(g, node, x))

    def last(self, node: fx.Node, g: fx.Node) -> None:
        """The cotangent at the last token, zero at the others."""
        (x,) = operands_of(node)
        have = {*dims_of(g), *(set(dims_of(x)) - set(dims_of(node)))}
        dims = tuple(d for d in dims_of(x) if d in have)
        self.add(x, self.builder.call(ops.at_last, (), (g, self.env[x]), dims))

    def at_last(self, node: fx.Node, g: fx.Node) -> None:
        """The cotangent of the last token."""
        x, _ = operands_of(node)
        (token,) = [d for d in dims_of(node) if d not in dims_of(x)]
        self.add(x, self.builder.last(g, token) if token in dims_of(g) else g)


def backward(body: Body, wanted: Sequence[str], states: Iterable[int] | None = None) -> Backward:
    """The VJP of any body with respect to the leaves named in ``wanted``.

    State leaves (``anchor_k``, ``carry_k``) come first in ``wanted``. ``states``: the new state leaves that have
    cotangents, all where None.

    Raises:
        NotLowerable: where an operator has no derivative.
    """
    given = range(body.states) if states is None else states
    return _Reverse(body, wanted, given).run()
