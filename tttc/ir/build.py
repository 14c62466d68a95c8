"""Building graphs of IR operators: specs and dimensions are written for the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import fx

from tttc.ir import ops
from tttc.ir.spec import Dims


def dims_of(x: Any) -> Dims:
    """The names of a node's axes; a number has none."""
    return tuple(x.meta["dims"]) if isinstance(x, fx.Node) else ()


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they are made of."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def union(operands: Sequence[Any]) -> Dims:
    """The names that operands have together, those of the operand with most first."""
    ordered = sorted(operands, key=lambda x: -len(dims_of(x)))
    return tuple(dict.fromkeys(d for x in ordered for d in dims_of(x)))


class Builder:
    """Appends operators to a graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph

    def call(
        self,
        target: Callable[..., Any],
        head: tuple[Any, ...],
        operands: Sequence[Any],
        result: Dims,
    ) -> fx.Node:
        """One operator, its spec from the names of its operands and of its result."""
        text = f"{', '.join(' '.join(dims_of(x)) for x in operands)} -> {' '.join(result)}"
        node = self.graph.call_function(target, (*head, text, *operands))
        node.meta["dims"] = tuple(result)
        return node

    def elementwise(self, function: str, *operands: Any, result: Dims | None = None) -> fx.Node:
        """A function of aligned operands."""
        dims = union(operands) if result is None else result
        return self.call(ops.elementwise, (function,), operands, dims)

    def contraction(self, operands: Sequence[Any], result: Dims) -> fx.Node:
        """A product, summed over what the result lacks; the operand itself where nothing is to do."""
        if len(operands) == 1 and dims_of(operands[0]) == tuple(result):
            return operands[0]
        return self.call(ops.contraction, (), operands, result)

    def masked_contraction(self, relation: str, operands: Sequence[Any], result: Dims) -> fx.Node:
        """A contraction over pairs of tokens for which the relation holds."""
        return self.call(ops.masked_contraction, (str(relation),), operands, result)

    def masked(self, relation: str, x: fx.Node) -> fx.Node:
        """Zero where the relation does not hold."""
        return self.call(ops.masked, (str(relation),), (x,), dims_of(x))

    def running_product(self, relation: str, x: fx.Node, result: Dims) -> fx.Node:
        """Products over the tokens up to each, or between each two."""
        return self.call(ops.running_product, (str(relation),), (x,), result)

    def triangular_solve(self, relation: str, system: Any, x: fx.Node) -> fx.Node:
        """What solves a unit-triangular system over tokens; its axes are those of ``x``."""
        return self.call(ops.triangular_solve, (str(relation),), (system, x), dims_of(x))

    def rename(self, x: Any, names: dict[str, str]) -> Any:
        """The same value under other names."""
        dims = dims_of(x)
        new = tuple(names.get(d, d) for d in dims)
        if new == dims:
            return x
        if isinstance(x, fx.Node) and x.target is ops.rename:
            x = x.args[1]
            if new == dims_of(x):
                return x
        return self.call(ops.rename, (), (x,), new)

    def last(self, x: fx.Node, token: str) -> fx.Node:
        """The last token's value."""
        return self.call(ops.last, (), (x,), tuple(d for d in dims_of(x) if d != token))

    def copy(self, node: fx.Node, operands: Sequence[Any], result: Dims) -> fx.Node:
        """The operator of ``node`` on other operands."""
        from tttc.ir.body import head_length

        return self.call(node.target, node.args[: head_length(node)], operands, result)  # type: ignore[arg-type]
