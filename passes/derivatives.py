"""Derivatives of the elementwise functions of the IR: each a rule from the cotangent of the result to those of operands."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import fx

from tttc.ir.build import Builder


class Value:
    """A node or number of a graph under arithmetic: writing ``g * (1 - r * r)`` appends its operators."""

    def __init__(self, builder: Builder, node: fx.Node | float) -> None:
        self.builder = builder
        self.node = node

    def apply(self, function: str, *operands: Any) -> Value:
        """An elementwise function of values and numbers."""
        nodes = [x.node if isinstance(x, Value) else x for x in operands]
        return Value(self.builder, self.builder.elementwise(function, *nodes))

    def __add__(self, other: Any) -> Value:
        return self.apply("add", self, other)

    def __radd__(self, other: Any) -> Value:
        return self.apply("add", other, self)

    def __sub__(self, other: Any) -> Value:
        return self.apply("sub", self, other)

    def __rsub__(self, other: Any) -> Value:
        return self.apply("sub", other, self)

    def __mul__(self, other: Any) -> Value:
        return self.apply("mul", self, other)

    def __rmul__(self, other: Any) -> Value:
        return self.apply("mul", self, other)

    def __truediv__(self, other: Any) -> Value:
        return self.apply("div", self, other)

    def __neg__(self) -> Value:
        return self.apply("neg", self)


Rule = Callable[..., Value]


def _pow_base(g: Value, r: Value, x: Value, y: Value) -> Value:
    return g * y * g.apply("pow", x, y - 1.0)


def _pow_exponent(g: Value, r: Value, x: Value, y: Value) -> Value:
    # The logarithm of 0 is no number, but 0**y has no slope for y > 0.
    slope = r * g.apply("log", x)
    return g * g.apply("where", g.apply("eq", x, 0.0), 0.0, slope)


def _extreme(comparison: str) -> tuple[Rule, Rule]:
    """``maximum`` and ``minimum``: tensors that tie share the cotangent, as in torch.

    A number is a bound: ``clamp`` passes cotangents at its bounds. At the number 0 the IR can't tell ``clamp``
    from ``relu``, which has slope 0 there; networks hold exact zeros, so ``relu`` is taken.
    """
    strict, wide = {"maximum": ("gt", "ge"), "minimum": ("lt", "le")}[comparison]

    def side(g: Value, own: Value, other: Value) -> Value:
        if isinstance(other.node, (int, float)):
            condition = g.apply(wide if other.node else strict, own, other)
            return g.apply("where", condition, g, 0.0)
        share = g.apply("where", g.apply("eq", own, other), 0.5, 1.0)
        return g.apply("where", g.apply(wide, own, other), g * share, 0.0)

    return (lambda g, r, x, y: side(g, x, y)), (lambda g, r, x, y: side(g, y, x))


# One rule an operand: from the cotangent g, the result r and the operands. None: no cotangent.
DERIVATIVES: dict[str, tuple[Rule | None, ...]] = {
    "add": (lambda g, r, x, y: g, lambda g, r, x, y: g),
    "sub": (lambda g, r, x, y: g, lambda g, r, x, y: -g),
    "neg": (lambda g, r, x: -g,),
    "mul": (lambda g, r, x, y: g * y, lambda g, r, x, y: g * x),
    "div": (lambda g, r, x, y: g / y, lambda g, r, x, y: -(g * r / y)),
    "reciprocal": (lambda g, r, x: -(g * (r * r)),),
    "exp": (lambda g, r, x: g * r,),
    "log": (lambda g, r, x: g / x,),
    "log1p": (lambda g, r, x: g / (x + 1.0),),
    "expm1": (lambda g, r, x: g * (r + 1.0),),
    "sqrt": (lambda g, r, x: g / (r * 2.0),),
    "rsqrt": (lambda g, r, x: g * (r * r * r * -0.5),),
    "sin": (lambda g, r, x: g * g.apply("cos", x),),
    "cos": (lambda g, r, x: -(g * g.apply("sin", x)),),
    "tanh": (lambda g, r, x: g * (1.0 - r * r),),
    "sigmoid": (lambda g, r, x: g * (r * (1.0 - r)),),
    "erf": (lambda g, r, x: g * (g.apply("exp", -(x * x)) * (2.0 / math.sqrt(math.pi))),),
    "abs": (lambda g, r, x: g * g.apply("sign", x),),
    "pow": (_pow_base, _pow_exponent),
    "maximum": _extreme("maximum"),
    "minimum": _extreme("minimum"),
    "where": (
        None,
        lambda g, r, c, x, y: g.apply("where", c, g, 0.0),
        lambda g, r, c, x, y: g.apply("where", c, 0.0, g),
    ),
    # Constant wherever they are smooth.
    "sign": (None,),
    "gt": (None, None),
    "ge": (None, None),
    "lt": (None, None),
    "le": (None, None),
    "eq": (None, None),
    "ne": (None, None),
    "and": (None, None),
    "or": (None, None),
    "not": (None,),
    "isnan": (None,),
    "float": (None, None),
}
