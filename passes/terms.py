"""Sums of products: how a value that is linear in others is written while its evaluation order is chosen."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from tttc.ir import ops
from tttc.ir.body import head_of, is_token, operands_of, spec_of
from tttc.ir.build import dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.functions import FUNCTIONS
from tttc.ir.spec import Dims, Relation, parse, parse_relation

LARGEST_SUM = (
    256  # products: what is distributed grows exponentially with how sums and products are nested
)
Factor = tuple[Any, Dims]  # a node and the labels of its axes


@dataclass(frozen=True)
class Term:
    """A number times factors, summed over labels that are not the result's, under causal relations."""

    coefficient: float
    factors: tuple[Factor, ...] = ()
    relations: tuple[Relation, ...] = ()

    def times(self, other: Term) -> Term:
        """The product of two terms."""
        return Term(
            self.coefficient * other.coefficient,
            self.factors + other.factors,
            self.relations + other.relations,
        )

    def labels(self) -> set[str]:
        """All labels of the factors and relations."""
        found = {x for _, dims in self.factors for x in dims}
        return found | {x for r in self.relations for x in (r.earlier, r.later)}


def linear_kind(node: fx.Node) -> str:
    """How a node is linear: "sum", "product", "view", or "" where it isn't."""
    if node.op != "call_function":
        return ""
    if node.target in (ops.contraction, ops.masked_contraction):
        return "product"
    if node.target in (ops.rename, ops.last):
        return "view"
    if node.target is ops.elementwise:
        kind = FUNCTIONS[head_of(node)].linear
        if kind == "first" and isinstance(node.args[3], (int, float)):
            return "product"
        return kind if kind != "first" else ""
    return ""


class Expander:
    """Writes nodes as sums of products of nodes that are not to be opened."""

    def __init__(
        self,
        opened: set[fx.Node],
        sizes: Mapping[str, int],
        last: Callable[[fx.Node, str], fx.Node],
        each: Callable[[], fx.Node],
    ) -> None:
        self.opened = opened
        self.sizes = sizes
        self.last = last  # makes the node of a factor at the last token
        self.each = each  # makes the node that is one for each token
        self._fresh = (f"z{i}" for i in itertools.count())

    def expand(self, node: Any, labels: Dims) -> list[Term]:
        """The terms of ``node`` with its axes called ``labels``."""
        if isinstance(node, (int, float)):
            return [Term(float(node))] if node else []
        if node not in self.opened:
            return [Term(1.0, ((node, labels),))]
        names = dict(zip(dims_of(node), labels, strict=True))
        kind = linear_kind(node)
        if kind == "sum":
            return self._sum(node, names)
        if kind == "product":
            return self._product(node, names)
        source = operands_of(node)[0]
        if node.target is ops.rename:
            return self.expand(source, labels)
        return self._last(source, names)

    def _sum(self, node: fx.Node, names: dict[str, str]) -> list[Term]:
        signs = {"add": (1.0, 1.0), "sub": (1.0, -1.0), "neg": (-1.0,)}[head_of(node)]
        terms = []
        for sign, x in zip(signs, operands_of(node), strict=True):
            inner = self.expand(x, tuple(names[d] for d in dims_of(x)))
            terms += [Term(sign * t.coefficient, t.factors, t.relations) for t in inner]
        return terms

    def _product(self, node: fx.Node, names: dict[str, str]) -> list[Term]:
        spec = parse(spec_of(node))
        names = dict(names)
        relations: tuple[Relation, ...] = ()
        if node.target is ops.masked_contraction:
            r = parse_relation(head_of(node))
            for d in (r.earlier, r.later):
                names.setdefault(d, next(self._fresh))
            relations = (Relation(names[r.earlier], names[r.later], r.strict),)
        for d in spec.summed:
            names.setdefault(d, next(self._fresh))
        terms = [Term(1.0, (), relations)]
        for i, (x, dims) in enumerate(zip(operands_of(node), spec.operands, strict=True)):
            if node.target is ops.elementwise and node.args[0] == "div" and i == 1:
                terms = [t.times(Term(1.0 / x)) for t in terms]
                continue
            inner = self.expand(x, tuple(names[d] for d in dims))
            if len(terms) * len(inner) > LARGEST_SUM:
                raise NotLowerable(f"distributed, it is a sum of more than {LARGEST_SUM} products")
            terms = [t.times(u) for t in terms for u in inner]
        for d in spec.summed:
            terms = [t if names[d] in t.labels() else self._repeated(t, d) for t in terms]
        return terms

    def _repeated(self, term: Term, dim: str) -> Term:
        """A term that is the same along a dimension, summed over it."""
        if is_token(dim):  # how many there are is known at run time only
            raise NotLowerable("a sum over tokens of what is the same for all of them")
        return Term(term.coefficient * self.sizes[dim], term.factors, term.relations)

    def _last(self, source: fx.Node, names: dict[str, str]) -> list[Term]:
        label = next(self._fresh)
        inner = self.expand(source, tuple(names.get(d, label) for d in dims_of(source)))
        terms = []
        for term in inner:
            relations = tuple(r for r in term.relations if r.later != label)
            if any(r.strict for r in term.relations if r.later == label):
                raise ValueError("a strict relation at the last token")
            factors = []
            for x, labels in term.factors:
                while label in labels:
                    dim = dims_of(x)[labels.index(label)]
                    x, labels = self.last(x, dim), tuple(y for y in labels if y != label)
                factors.append((x, labels))
            kept = Term(term.coefficient, tuple(factors), relations)
            # What earlier tokens add alike, each of them adds.
            for earlier in {r.earlier for r in term.relations if r.later == label} - kept.labels():
                kept = kept.times(Term(1.0, ((self.each(), (earlier,)),)))
            terms.append(kept)
        return terms


def collect(terms: Sequence[Term], result: Dims) -> list[Term]:
    """Like terms added up, those that cancel gone."""
    merged: dict[Any, Term] = {}
    for term in terms:
        key = _canonical(term, result)
        before = merged[key].coefficient if key in merged else 0.0
        merged[key] = Term(before + term.coefficient, term.factors, term.relations)
    return [t for t in merged.values() if abs(t.coefficient) > 1e-14]


def _canonical(term: Term, result: Dims) -> Any:
    factors = sorted(term.factors, key=lambda f: (f[0].name, f[1]))
    names = {x: x for x in result}
    for _, labels in factors:
        for x in labels:
            names.setdefault(x, f"#{len(names)}")
    for r in term.relations:
        for x in (r.earlier, r.later):
            names.setdefault(x, f"#{len(names)}")
    return (
        # Not their names: factors at the last token are of another graph.
        tuple((f, tuple(names[x] for x in labels)) for f, labels in factors),
        tuple(sorted((names[r.earlier], names[r.later], r.strict) for r in term.relations)),
    )
