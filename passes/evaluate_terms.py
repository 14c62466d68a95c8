"""Sums of products: each product in the order that costs least, those that share a last factor added before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tttc.passes.products import Operand, Products
from tttc.passes.terms import Term

from tttc.ir.body import EARLIER, TOKEN, Body
from tttc.ir.build import dims_of
from tttc.ir.cost import element_count
from tttc.ir.order import Order, best_path
from tttc.ir.spec import Dims, Relation


@dataclass
class Final:
    """The last product of a term, not yet made: terms that share ``right`` are added before it."""

    sign: float
    left: Any
    left_labels: Dims
    right: Any
    right_labels: Dims
    relation: Relation


class TermEvaluator(Products):
    """Writes terms and their sums into the new graph; ``orders`` are those that were chosen."""

    def __init__(self, body: Body, mini_batch_size: int) -> None:
        super().__init__(body, mini_batch_size)
        self.orders = list(body.orders)

    def evaluate(self, term: Term, result: Dims) -> Final | tuple[float, Any]:
        """Evaluate a product but for its last step."""
        operands = [Operand(self.env.get(x, x), labels) for x, labels in term.factors]
        operands = self._scaled_by(abs(term.coefficient), operands)
        term = (
            Term(1.0 if term.coefficient > 0 else -1.0, term.factors, term.relations)
            if operands
            else term
        )
        operands = self._scalars_first(operands, term.relations)
        operands += [Operand(None, (r.later, r.earlier), (r,)) for r in term.relations]
        if not operands:
            return term.coefficient, None
        path, chosen = self._order(operands, result)
        if len(operands) > 2:
            self.orders.append(chosen)
        for count, step in enumerate(path):
            pair = [operands.pop(i) for i in sorted(step, reverse=True)][::-1]
            rest = {x for o in operands for x in o.labels} | set(result)
            if count == len(path) - 1 and len(pair) == 2:
                final = self._as_final(term.coefficient, pair, result)
                if final is not None:
                    return final
            operands.append(self.multiply(pair, rest, result if not operands else None))
        (only,) = operands
        return term.coefficient, self._settle(only, result)

    def _scaled_by(self, factor: float, operands: list[Operand]) -> list[Operand]:
        """The factors with a number multiplied into the smallest."""
        if factor == 1.0 or not operands:
            return operands
        small = min(operands, key=lambda o: element_count(dims_of(o.node), self.sizes))
        key = ("scaled", small.node, factor)
        if key not in self.memo:
            self.memo[key] = self.builder.elementwise("mul", small.node, factor)
        scaled = Operand(self.memo[key], small.labels)
        return [scaled if o is small else o for o in operands]

    def _scalars_first(
        self, operands: list[Operand], relations: Sequence[Relation]
    ) -> list[Operand]:
        """Per-token numbers are multiplied with each other first: terms then share the product."""
        operands = self._numbers_first(operands)
        if not relations:
            vectors = [o for o in operands if len(o.labels) == 1 and self._is_token(o)]
            return self._combined(operands, vectors, None)
        for r in relations:
            pair = {r.earlier, r.later}
            operands = self._combined(operands, [o for o in operands if pair >= set(o.labels)], r)
        return operands

    def _combined(
        self, operands: list[Operand], numbers: list[Operand], relation: Relation | None
    ) -> list[Operand]:
        """The operands with some that are per-token numbers multiplied into one."""
        if len(numbers) < 2:
            return operands
        others = [o for o in operands if o not in numbers]
        numbers = sorted(numbers, key=lambda o: (len(o.labels), o.node.name))
        combined = numbers[0]
        for o in numbers[1:]:
            labels = tuple(dict.fromkeys((*combined.labels, *o.labels)))
            if relation is not None:
                labels = tuple(x for x in (relation.later, relation.earlier) if x in labels)
            combined = Operand(self._product([combined, o], labels), labels)
        return [combined, *others]

    def _numbers_first(self, operands: list[Operand]) -> list[Operand]:
        """What has no axes goes to the smallest factor: a mask alone would not say how many tokens there are."""
        numbers = [o for o in operands if not o.labels]
        factors = [o for o in operands if o.labels]
        if not numbers or not factors:
            return operands
        small = min(factors, key=lambda o: element_count(dims_of(o.node), self.sizes))
        scaled = small
        for o in numbers:
            scaled = Operand(self._product([o, scaled], small.labels), small.labels)
        return [scaled if o is small else o for o in factors]

    @staticmethod
    def _is_token(operand: Operand) -> bool:
        return all(d in (TOKEN, EARLIER) for d in dims_of(operand.node))

    def _size(self, label: str, operands: Sequence[Operand]) -> int:
        for o in operands:
            if label in o.labels:
                dims = dims_of(o.node) if o.node is not None else (TOKEN, EARLIER)
                return self.sizes[dims[o.labels.index(label)]]
        return self.sizes[label]

    def _order(
        self, operands: Sequence[Operand], result: Dims
    ) -> tuple[list[tuple[int, ...]], Order]:
        """The order of pairwise products that takes the fewest operations."""
        labels = dict.fromkeys(x for o in operands for x in o.labels)
        sizes = {x: self._size(x, operands) for x in labels}
        path, info = best_path([o.labels for o in operands], result, sizes)
        return path, Order(
            tuple((o.node.name if o.node is not None else "", tuple(o.labels)) for o in operands),
            tuple(result),
            tuple(sizes.items()),
            tuple(path),
            int(info.opt_cost),
            int(info.naive_cost),
        )

    def _as_final(self, sign: float, pair: Sequence[Operand], result: Dims) -> Final | None:
        """The last product, kept open: a tile over token pairs, and what it is multiplied with."""
        if any(o.node is None for o in pair):
            return None
        summed = {x for o in pair for x in o.labels if x not in result}
        due = [r for o in pair for r in o.pending if r.earlier in summed or r.later in summed]
        if len(due) != 1 or any(r not in due for o in pair for r in o.pending):
            return None
        r = due[0]
        tile = [o for o in pair if set(o.labels) == {r.earlier, r.later}]
        other = [o for o in pair if o not in tile]
        if len(tile) != 1 or r.earlier not in summed:
            return None
        return Final(sign, tile[0].node, tile[0].labels, other[0].node, other[0].labels, r)

    def assemble(self, finals: Sequence[Final | tuple[float, Any]], result: Dims) -> Any:
        """Add the terms up; causal products with the same right side share one product."""
        groups: dict[Any, list[Final]] = {}
        summands: list[tuple[float, Any]] = []
        for f in finals:
            if isinstance(f, Final):
                free = tuple(x if x in result else "#" for x in f.right_labels)
                groups.setdefault((f.right, free, f.relation.strict), []).append(f)
            else:
                summands.append(f)
        for members in groups.values():
            first = members[0]
            order = (first.relation.later, first.relation.earlier)
            lead = first.sign
            left: Any = None
            for m in members:
                o = Operand(m.left, m.left_labels)
                mine = (m.relation.later, m.relation.earlier)
                tile = self._product([o], mine)
                tile = self._renamed(tile, dict(zip(dims_of(tile), (TOKEN, EARLIER), strict=True)))
                scale = m.sign / lead
                if scale != 1.0:
                    tile = self.builder.elementwise("mul", tile, scale)
                left = tile if left is None else self.builder.elementwise("add", left, tile)
            pair = [Operand(left, order), Operand(first.right, first.right_labels)]
            labels = tuple(x for x in result if x in (*order, *first.right_labels))
            summands.append((lead, self._product(pair, labels, first.relation)))
        return self._add_up(summands, result)

    def _add_up(self, summands: Sequence[tuple[float, Any]], result: Dims) -> Any:
        ordered = sorted(summands, key=lambda s: s[0] < 0)
        total: Any = None
        for coefficient, node in ordered:
            if node is None:
                node, coefficient = abs(coefficient), (1.0 if coefficient > 0 else -1.0)
            elif abs(coefficient) != 1.0:
                node = self.builder.elementwise("mul", node, abs(coefficient))
            if total is None:
                total = node if coefficient > 0 else self.builder.elementwise("neg", node)
            else:
                function = "add" if coefficient > 0 else "sub"
                dims = tuple(d for d in result if d in dims_of(total) or d in dims_of(node))
                total = self.builder.elementwise(function, total, node, result=dims)
        return 0.0 if total is None else total
