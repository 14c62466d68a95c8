"""Simplify: fold numbers, drop what does nothing, share what is computed twice.

Before::

    a = elementwise("mul", "j,  -> j", x, 2.0)
    b = elementwise("mul", ", j -> j", 0.5, a)
    c = elementwise("sub", "j,  -> j", y, m)
    d = elementwise("sub", "j,  -> j", y, m)

After (``b`` is ``x``, ``d`` is ``c``)::

    c = elementwise("sub", "j,  -> j", y, m)
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tttc.ir import ops
from tttc.ir.body import Body, operands_of
from tttc.ir.build import Builder, dims_of
from tttc.ir.functions import FUNCTIONS

Number = (int, float)
COMMUTATIVE = {"add", "mul", "maximum", "minimum"}
# What a function of numbers is, where it is exact to fold it.
FOLDED = {"add", "sub", "mul", "div", "neg", "reciprocal"}


def _is_number(x: Any) -> bool:
    return isinstance(x, Number) and not isinstance(x, bool)


class _Simplifier:
    def __init__(self, body: Body) -> None:
        self.body = body
        self.graph = fx.Graph()
        self.builder = Builder(self.graph)
        self.env: dict[fx.Node, Any] = {}
        self.seen: dict[Any, fx.Node] = {}

    def run(self) -> Body:
        for node in self.body.gm.graph.nodes:
            if node.op == "placeholder":
                new = self.graph.placeholder(str(node.target))
                new.meta["dims"] = dims_of(node)
                self.env[node] = new
            elif node.op == "call_function":
                operands = [self.env[x] if isinstance(x, fx.Node) else x for x in operands_of(node)]
                self.env[node] = self.rewrite(node, operands)
        self.graph.output(tuple(self.env[x] for x in self.body.results))
        return self.body.with_graph(self.graph)

    def rewrite(self, node: fx.Node, operands: list[Any]) -> Any:
        """The node on new operands, simpler where a rule says so."""
        if node.target is ops.elementwise:
            return self.elementwise(str(node.args[0]), operands, dims_of(node))
        if node.target is ops.rename:
            return self.renamed(operands[0], dims_of(node))
        if (
            node.target is ops.contraction
            and len(operands) == 1
            and dims_of(operands[0]) == dims_of(node)
        ):
            return operands[0]
        return self.shared(self.builder.copy(node, operands, dims_of(node)))

    def elementwise(self, function: str, operands: list[Any], result: tuple[str, ...]) -> Any:
        """An elementwise function, simplified."""
        if function in FOLDED and all(_is_number(x) for x in operands):
            return FUNCTIONS[function].torch(*operands)
        if function in COMMUTATIVE and _is_number(operands[0]):
            operands = operands[::-1]
        x: Any = operands[0]
        y: Any = operands[1] if len(operands) > 1 else None
        same = isinstance(x, fx.Node) and dims_of(x) == result
        if function == "mul" and same and y == 1 and _is_number(y):
            return x
        if function in ("add", "sub") and same and _is_number(y) and y == 0:
            return x
        if function == "div" and _is_number(y):
            return self.elementwise("mul", [x, 1.0 / y], result)
        if function == "neg" and _is(x, "neg"):
            return operands_of(x)[0]
        if function == "mul" and _is_number(y) and _is(x, "mul") and _is_number(operands_of(x)[1]):
            inner = operands_of(x)
            return self.elementwise("mul", [inner[0], inner[1] * y], result)
        if function == "mul" and _is_number(y) and y == -1 and same:
            return self.elementwise("neg", [x], result)
        if function == "add" and _is(y, "neg"):
            return self.elementwise("sub", [x, operands_of(y)[0]], result)
        if function == "sub" and _is(y, "neg"):
            return self.elementwise("add", [x, operands_of(y)[0]], result)
        if function == "mul" and same and dims_of(y) == result:
            (x, c), (y, d) = _scaled(x), _scaled(y)
            if c * d != 1 or c != 1:
                product = self.elementwise("mul", [x, y], result)
                return self.elementwise("mul", [product, c * d], result)
        for rule in (self.logistic, self.factored, self.scaled_factor):
            simpler = rule(function, x, y, result)
            if simpler is not None:
                return simpler
        return self.shared(self.builder.elementwise(function, *operands, result=result))

    def factored(self, function: str, x: Any, y: Any, result: tuple[str, ...]) -> Any:
        """``x + q x c`` as ``x (q c + 1)``: a polynomial, whose coefficients take up a factor outside it."""
        if function != "add" or not isinstance(x, fx.Node) or dims_of(x) != result:
            return None
        product, c = _scaled(y) if isinstance(y, fx.Node) else (y, 1.0)
        if not _is(product, "mul") or dims_of(product) != result or c == 1.0:
            return None
        first, second = operands_of(product)
        if x not in (first, second):
            return None
        q = second if first is x else first
        if not isinstance(q, fx.Node) or dims_of(q) != result:
            return None
        inner = self.elementwise("add", [self.elementwise("mul", [q, c], result), 1.0], result)
        return self.elementwise("mul", [x, inner], result)

    def scaled_factor(self, function: str, x: Any, y: Any, result: tuple[str, ...]) -> Any:
        """``x (q c + d) k`` as ``x (q c k + d k)``."""
        if function != "mul" or not _is_number(y) or not _is(x, "mul") or dims_of(x) != result:
            return None
        for other, inner in (operands_of(x), operands_of(x)[::-1]):
            if not _is(inner, "add") or not _is_number(operands_of(inner)[1]):
                continue
            q, c = _scaled(operands_of(inner)[0])
            if c == 1.0 or dims_of(q) != result or not isinstance(other, fx.Node):
                continue
            scaled = self.elementwise("mul", [q, c * y], result)
            constant = operands_of(inner)[1] * y
            total = self.elementwise("add", [scaled, constant], result)
            return self.elementwise("mul", [other, total], result)
        return None

    def logistic(self, function: str, x: Any, y: Any, result: tuple[str, ...]) -> Any:
        """``1 + tanh u`` and ``1 - tanh^2 u``, as gelu and its derivative have them, by ``s = sigmoid 2u``.

        They are ``2 s`` and ``4 s (1 - s)``: no numbers that nearly cancel, and fewer operations.
        """
        if function == "add" and _is_number(y) and y == 1 and _is(x, "tanh"):
            return self.elementwise("mul", [self.sigmoid_of_double(x), 2.0], result)
        square = function == "sub" and _is_number(x) and x == 1 and _is(y, "mul")
        if square and _is(operands_of(y)[0], "tanh") and operands_of(y)[0] is operands_of(y)[1]:
            s = self.sigmoid_of_double(operands_of(y)[0])
            rest = self.elementwise("sub", [1, s], result)
            return self.elementwise(
                "mul", [self.elementwise("mul", [s, rest], result), 4.0], result
            )
        return None

    def sigmoid_of_double(self, tanh: fx.Node) -> Any:
        """``sigmoid(2 u)`` for a node ``tanh(u)``."""
        dims = dims_of(tanh)
        double = self.elementwise("mul", [operands_of(tanh)[0], 2.0], dims)
        return self.elementwise("sigmoid", [double], dims)

    def renamed(self, x: Any, result: tuple[str, ...]) -> Any:
        """A renaming of renamings is one; one that changes nothing is none."""
        while isinstance(x, fx.Node) and x.target is ops.rename:
            x = x.args[1]
        if dims_of(x) == result:
            return x
        return self.shared(self.builder.call(ops.rename, (), (x,), result))

    def shared(self, node: fx.Node) -> fx.Node:
        """The node, or an earlier one that computes the same."""
        arguments = node.args
        if node.target is ops.elementwise and node.args[0] in COMMUTATIVE and len(node.args) == 4:
            spec, x, y = node.args[1:]
            pairs = sorted(zip(str(spec).split("->")[0].split(","), (x, y), strict=True), key=str)
            arguments = (node.args[0], str(pairs))
        key = (node.target, str(arguments), dims_of(node))
        if key in self.seen:
            self.graph.erase_node(node)
            return self.seen[key]
        self.seen[key] = node
        return node


def _scaled(x: fx.Node) -> tuple[Any, float]:
    """A node as another one times a number."""
    if _is(x, "mul") and _is_number(operands_of(x)[1]) and dims_of(operands_of(x)[0]) == dims_of(x):
        return operands_of(x)[0], operands_of(x)[1]
    return x, 1.0


def _is(x: Any, function: str) -> bool:
    return isinstance(x, fx.Node) and x.target is ops.elementwise and x.args[0] == function


def simplify(body: Body) -> Body:
    """The body with its graph simplified until nothing changes."""
    while True:
        before = len(body.gm.graph.nodes)
        body = _Simplifier(body).run()
        if len(body.gm.graph.nodes) == before:
            return body
