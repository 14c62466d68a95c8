"""Affine: how the new state of a step depends on the old one, where it does so by sums and scalar factors.

The step::

    S = elementwise("sub", "i j, i j -> i j", beta * carry_S, u)       # u = theta * G(anchor)
    W = elementwise("add", "i j, i j -> i j", (1 - alpha) * carry_W, S)

is the system::

    S: own beta,       added {u: -1}
    W: own 1 - alpha,  coupled {S: 1}

Coefficients are sympy expressions: what cancels is zero, what is one is one. Each of their symbols stands for a
node of the step that may differ from token to token but along one feature dimension of the leaf at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx
from tttc.passes.terms import linear_kind

from tttc.ir import ops
from tttc.ir.body import Body, head_of, operands_of, role
from tttc.ir.build import Builder, dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.spec import Dims

Terms = dict[Any, sympy.Expr]  # a node (or the number 1.0) and its coefficient
SIGNS = {"add": (1, 1), "sub": (1, -1), "neg": (-1,)}


class Coefficients:
    """Nodes of a step as sympy symbols, and expressions of them as nodes of another graph."""

    def __init__(self) -> None:
        self.nodes: dict[sympy.Symbol, fx.Node] = {}

    def of(self, x: Any) -> sympy.Expr:
        """The expression of a node or number."""
        if isinstance(x, fx.Node):
            symbol = sympy.Symbol(x.name)
            self.nodes[symbol] = x
            return symbol
        return sympy.Integer(int(x)) if x == int(x) else sympy.Float(x)

    def dims(self, expr: sympy.Expr) -> Dims:
        """The feature dimensions along which an expression differs."""
        found = [d for x in sorted(expr.free_symbols, key=str) for d in dims_of(self.nodes[x])]
        return tuple(dict.fromkeys(found))

    def write(self, expr: sympy.Expr, builder: Builder, node_of: Callable[[fx.Node], Any]) -> Any:
        """The expression as operators; ``node_of`` gives the node of a symbol's. A number stays one."""
        if expr.is_Number:
            return int(expr) if expr.is_Integer else float(expr)
        if expr.is_Symbol:
            return node_of(self.nodes[expr])
        if expr.is_Add:
            # Positive terms first: a difference is written as one.
            parts = sorted(expr.args, key=lambda x: (x.could_extract_minus_sign(), str(x)))
            total: Any = None
            for part in parts:
                negative = total is not None and part.could_extract_minus_sign()
                x = self.write(-part if negative else part, builder, node_of)
                function = "sub" if negative else "add"
                total = x if total is None else builder.elementwise(function, total, x)
            return total
        if expr.is_Mul:
            number, factors = expr.as_coeff_mul()
            total = None
            for factor in factors:
                x = self.write(factor, builder, node_of)
                total = x if total is None else builder.elementwise("mul", total, x)
            if number == 1:
                return total
            if number == -1:
                return builder.elementwise("neg", total)
            return builder.elementwise("mul", total, self.write(number, builder, node_of))
        base, exponent = expr.as_base_exp()
        if not exponent.is_Integer:
            raise NotLowerable(f"a coefficient of the state is a power {exponent}")
        x = self.write(base, builder, node_of)
        power = x
        for _ in range(abs(int(exponent)) - 1):
            power = builder.elementwise("mul", power, x)
        return power if exponent > 0 else builder.elementwise("reciprocal", power)


@dataclass
class Update:
    """A new state leaf as a sum: ``own`` times what the leaf was, and the rest.

    ``coupled``: other leaves as they were (keys are carries) or as they become (keys are their new values);
    ``added``: whatever else, none of which depends on the leaf.
    """

    leaf: fx.Node
    own: sympy.Expr
    coupled: Terms
    added: Terms


class System:
    """The updates of all state leaves of a one-token body, each analysed when asked for."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self.coefficients = Coefficients()
        self.carries = [p for p in body.placeholders if role(p)[0] == "carry"]
        self.values = dict(zip(self.carries, body.results[: body.states], strict=True))
        self.touched = {c: dependents(body, c) for c in self.carries}
        self._updates: dict[fx.Node, Update] = {}
        self._running: set[fx.Node] = set()

    def depends(self, node: Any, leaf: fx.Node) -> bool:
        """Whether a node of the step needs a carry."""
        return node in self.touched[leaf]

    def recurrent(self, leaf: fx.Node) -> bool:
        """Whether the new leaf depends on the old one."""
        return self.depends(self.values[leaf], leaf)

    def leaf_of(self, node: fx.Node) -> tuple[fx.Node, bool]:
        """The leaf of a key of ``coupled``, and whether it is meant as it becomes (else as it was)."""
        if node in self.touched:
            return node, False
        return next(c for c, value in self.values.items() if value is node), True

    def update(self, leaf: fx.Node) -> Update:
        """The update of a leaf.

        Raises:
            NotLowerable: where it is not affine in the leaf, its coefficients have too many axes, or leaves
                depend on each other.
        """
        if leaf not in self._updates:
            if leaf in self._running:
                raise NotLowerable("leaves of the state depend on each other in a circle")
            self._running.add(leaf)
            update = self._analysed(leaf)
            for x in update.coupled:
                self.update(self.leaf_of(x)[0])
            self._running.discard(leaf)
            self._updates[leaf] = update
        return self._updates[leaf]

    def _analysed(self, leaf: fx.Node) -> Update:
        terms = affine_in(self.values[leaf], leaf, self)
        own = terms.pop(leaf, sympy.Integer(0))
        update = Update(leaf, own, {}, {})
        for x, coefficient in terms.items():
            if isinstance(x, fx.Node) and self.depends(x, leaf):
                raise NotLowerable(
                    "the new state is not affine in the old one with scalar coefficients"
                )
            other = x in self.touched or (x in self.values.values() and x is not self.values[leaf])
            other = other and set(dims_of(x)) == set(dims_of(leaf))
            (update.coupled if other else update.added)[x] = coefficient
        for coefficient in (own, *update.coupled.values()):
            if len(self.coefficients.dims(coefficient)) > 1:
                raise NotLowerable("the state decays differently along more than one dimension")
        return update


def affine_in(node: Any, leaf: fx.Node, system: System) -> Terms:
    """``node`` as a sum of the leaf, other leaves, new values of other leaves and *atoms*, each with a coefficient.

    Opened is what depends on a carry: sums, and products with one factor that does so. Whatever else there is
    stays as an atom, the number 1.0 for what is the same everywhere; an atom may depend on the leaf.
    """
    memo: dict[Any, Terms] = {}
    others = {v for c, v in system.values.items() if c is not leaf}

    def touched(x: Any, carries: Any) -> bool:
        return isinstance(x, fx.Node) and any(system.depends(x, c) for c in carries)

    def terms(x: Any) -> Terms:
        if not isinstance(x, fx.Node):
            return {1.0: system.coefficients.of(x)} if x else {}
        if x not in memo:
            memo[x] = opened(x)
        return memo[x]

    def opened(x: fx.Node) -> Terms:
        one: Terms = {x: sympy.Integer(1)}
        if x in system.touched or not touched(x, system.carries):
            return one
        if x in others and not system.depends(x, leaf):
            return one
        operands = operands_of(x)
        kind = linear_kind(x) if x.target in (ops.elementwise, ops.contraction) else ""
        if kind == "sum":
            inside = [y for y in operands if touched(y, system.carries)]
            if any(set(dims_of(y)) != set(dims_of(x)) for y in inside):
                return one
            total: Terms = {}
            for sign, y in zip(SIGNS[head_of(x)], operands, strict=True):
                for key, coefficient in terms(y).items():
                    total[key] = total.get(key, sympy.Integer(0)) + sign * coefficient
            return {k: c for k, c in total.items() if sympy.expand(c) != 0}
        if kind == "product":
            return product(x, operands) or one
        if x.target is ops.elementwise and head_of(x) == "div":
            over = operands[1]
            if not touched(over, [leaf]) and factor(over, operands[0], x):
                return scaled(terms(operands[0]), 1 / system.coefficients.of(over))
        return one

    def product(x: fx.Node, operands: tuple[Any, ...]) -> Terms | None:
        inside = [y for y in operands if touched(y, [leaf])]
        if not inside:
            inside = [y for y in operands if touched(y, system.carries)]
        rest = [y for y in operands if y is not inside[0]]
        summed = set(dims_of(inside[0])) != set(dims_of(x))  # where there is no other factor
        if len(inside) != 1 or summed or not all(factor(y, inside[0], x) for y in rest):
            return None
        coefficient = sympy.Integer(1)
        for y in rest:
            over = head_of(x) == "div" if x.target is ops.elementwise else False
            coefficient *= 1 / system.coefficients.of(y) if over else system.coefficients.of(y)
        return scaled(terms(inside[0]), coefficient)

    def factor(y: Any, of: Any, result: fx.Node) -> bool:
        """Whether multiplying by ``y`` only scales: alike along all dimensions but one of the result."""
        same = set(dims_of(of)) == set(dims_of(result))
        return same and len(dims_of(y)) <= 1 and set(dims_of(y)) <= set(dims_of(result))

    def scaled(some: Terms, by: sympy.Expr) -> Terms:
        return {k: c * by for k, c in some.items()}

    return terms(node)


def dependents(body: Body, leaf: fx.Node) -> set[fx.Node]:
    """The nodes that depend on a placeholder, itself included."""
    found = {leaf}
    for node in body.gm.graph.nodes:
        if node.op == "call_function" and any(x in found for x in node.all_input_nodes):
            found.add(node)
    return found
