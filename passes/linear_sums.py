"""The sum of a value over a dimension, as a polynomial of what is known earlier.

Linearity is all it takes: of ``c x - m`` with ``c`` and ``m`` the same along ``j`` the sum is ``c sum(x) - 64 m``, and
where ``m`` is the mean of ``x`` and ``c`` is 1 the two cancel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx

from tttc.ir import ops
from tttc.ir.body import operands_of, spec_of
from tttc.ir.build import dims_of
from tttc.ir.spec import parse

ZERO = 1e-12  # of the largest coefficient: what cancels but for rounding
MOST_TERMS = 8  # of a polynomial: what is longer is not looked into


@dataclass(frozen=True)
class Term:
    """Factors that are the same along the summed dimension, and what is added up along it, None for a number of ones."""

    factors: tuple[fx.Node, ...]
    summed: fx.Node | None


Polynomial = dict[Term, float]


def _sorted(factors: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    return tuple(sorted(factors, key=lambda n: n.name))


def times(terms: Polynomial, number: float = 1.0, factors: tuple[fx.Node, ...] = ()) -> Polynomial:
    """A polynomial times a number and factors."""
    return {
        Term(_sorted((*term.factors, *factors)), term.summed): c * number
        for term, c in terms.items()
    }


def plus(a: Polynomial, b: Polynomial) -> Polynomial:
    """The sum of two polynomials."""
    total = dict(a)
    for term, c in b.items():
        total[term] = total.get(term, 0.0) + c
        if abs(total[term]) <= ZERO * max(abs(c), abs(a.get(term, 0.0))):
            del total[term]
    return total


@dataclass
class SumsOver:
    """The sums over one dimension, as polynomials of what is known earlier."""

    dim: str
    size: int
    existing: dict[fx.Node, fx.Node]  # what is added up -> its sum
    depth: dict[fx.Node, int]
    known: dict[fx.Node, Polynomial] = field(default_factory=dict)

    def waits(self, terms: Polynomial) -> int:
        """How many sums and products lie on the way to a polynomial."""
        depths = [self.depth[n] for term in terms for n in term.factors]
        return max([*depths, *(self.depth[t.summed] + 1 for t in terms if t.summed)], default=0)

    def added(self, terms: Polynomial) -> int:
        """How many sums a polynomial needs that there are not yet."""
        return len({t.summed for t in terms if t.summed and t.summed not in self.existing})

    def value(self, node: fx.Node) -> Polynomial:
        """A value without the summed dimension, by sums."""
        if node.target is ops.contraction and len(operands_of(node)) == 1:
            (x,) = operands_of(node)
            if parse(spec_of(node)).summed == (self.dim,):
                return self.of(x)
        made = self._linear(node, self.value) if node.target is ops.elementwise else None
        return {Term((node,), None): 1.0} if made is None or len(made) > MOST_TERMS else made

    def of(self, node: fx.Node) -> Polynomial:
        """The sum of a value over the dimension."""
        if node not in self.known:
            self.known[node] = self._of(node)
        return self.known[node]

    def _of(self, node: fx.Node) -> Polynomial:
        if self.dim not in dims_of(node):
            return times(self.value(node), self.size)
        whole: Polynomial = {Term((), node): 1.0}
        made = None
        if node.target is ops.elementwise:
            made = self._linear(node, self.of)
        elif node.target in (ops.contraction, ops.masked_contraction, ops.rename):
            holders = [x for x in operands_of(node) if self.dim in dims_of(x)]
            if len(holders) == 1 and self._keeps(node) and not self.of(holders[0]):
                made = {}
        if made is None or len(made) > MOST_TERMS or self._cost(made) > (1, self.waits(whole)):
            return whole
        return made

    def _keeps(self, node: fx.Node) -> bool:
        """Whether the dimension of a product, or of what is renamed, is the one of its operand."""
        if node.target is not ops.rename:
            return True
        (x,) = operands_of(node)
        at = dims_of(node).index(self.dim)
        return dims_of(x)[at] == self.dim

    def _cost(self, terms: Polynomial) -> tuple[int, int]:
        """Sums to make, then what a polynomial waits for."""
        return self.added(terms), self.waits(terms)

    def _linear(self, node: fx.Node, of: Callable[[fx.Node], Polynomial]) -> Polynomial | None:
        """A linear function of operands, None where it is none."""
        function, operands = str(node.args[0]), operands_of(node)
        if function in ("add", "sub"):
            parts = []
            for x in operands:
                if not isinstance(x, fx.Node):
                    repeated = self.size if self.dim in dims_of(node) else 1
                    parts.append({Term((), None): float(x) * repeated} if x else {})
                elif self.dim in dims_of(node) and self.dim not in dims_of(x):
                    parts.append(times(self.value(x), self.size))
                else:
                    parts.append(of(x))
            return plus(parts[0], times(parts[1], -1.0 if function == "sub" else 1.0))
        if function == "neg":
            return times(of(operands[0]), -1.0)
        if function != "mul":
            return None
        for x, y in (operands, operands[::-1]):
            if not isinstance(x, fx.Node):
                continue
            if not isinstance(y, fx.Node):
                return times(of(x), float(y))
            if self.dim in dims_of(x) and self.dim not in dims_of(y):
                return times(of(x), 1.0, (y,))
        return None
