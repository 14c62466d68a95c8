"""Products of a dual form: a pair of factors at a time, each made once, with the masks of causal sums still to come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, Body, is_token
from tttc.ir.build import Builder, dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.spec import Dims, Relation


@dataclass
class Operand:
    """A partial product: a node (None for ones), its labels, and relations still to be applied."""

    node: Any
    labels: Dims
    pending: tuple[Relation, ...] = ()


class Products:
    """Writes products into a new graph. Labels tell apart what one dimension name would confuse.

    Attributes:
        env: what stands in the new graph for a node of the old one.
        sizes: of all dimensions, tokens among them.
    """

    def __init__(self, body: Body, mini_batch_size: int) -> None:
        self.body = body
        self.sizes = {**body.sizes, TOKEN: mini_batch_size, EARLIER: mini_batch_size}
        for node in body.nodes:
            self.sizes |= {d: mini_batch_size for d in dims_of(node) if is_token(d)}
        self.graph = fx.Graph()
        self.builder = Builder(self.graph)
        self.env: dict[fx.Node, Any] = {}
        self.memo: dict[Any, fx.Node] = {}

    def multiply(self, pair: Sequence[Operand], rest: set[str], result: Dims | None) -> Operand:
        """A pairwise product, summed over the labels nobody needs any more."""
        every = tuple(dict.fromkeys(x for o in pair for x in o.labels))
        pending = tuple(r for o in pair for r in o.pending)
        labels = tuple(x for x in every if x in rest)
        if result is not None:
            labels = tuple(x for x in result if x in labels)
        real = [o for o in pair if o.node is not None]
        masks = [o for o in pair if o.node is None]
        if masks and not any(set(o.labels) & set(masks[0].labels) for o in real):
            # Two masks, or one and what has no tokens: it alone would not say how many there are, and is made.
            real = [Operand(self._ones(masks[0].pending[0]), masks[0].labels), *real]
            pending = tuple(r for o in pair if o is not masks[0] for r in o.pending)
        due = [r for r in pending if r.earlier not in labels or r.later not in labels]
        later = tuple(r for r in pending if r not in due)
        if len(real) == 1 and not due and set(labels) == set(real[0].labels):
            return Operand(real[0].node, real[0].labels, later)
        if len(real) == 1 and not due and later and len(labels) > len(real[0].labels):
            # Broadcast along the pairs of a relation; it stays pending, so that it masks the last product.
            return Operand(self._product(real, labels, later[0]), labels, later)
        if len(due) > 1:
            real = [self._apply(o, due[1:]) for o in real]
        return Operand(self._product(real, labels, due[0] if due else None), labels, later)

    def _ones(self, relation: Relation) -> fx.Node:
        """One for every pair of tokens for which the relation holds."""
        key = ("ones", relation.strict)
        if key not in self.memo:
            text = str(Relation(EARLIER, TOKEN, relation.strict))
            self.memo[key] = self.builder.running_product(text, self._each(), (TOKEN, EARLIER))
        return self.memo[key]

    def _each(self) -> fx.Node:
        """One for every token."""
        key = ("each",)
        if key not in self.memo:
            like = next(
                self.env[p] for p in self.body.placeholders
                if TOKEN in dims_of(p) and str(p.target) not in self.body.whole and p in self.env
            )  # fmt: skip
            self.memo[key] = self.builder.call(ops.broadcast, (), (1.0, like), (TOKEN,))
            self.env[self.memo[key]] = self.memo[key]
        return self.memo[key]

    def _apply(self, operand: Operand, relations: Sequence[Relation]) -> Operand:
        node = operand.node
        for r in relations:
            if r.earlier in operand.labels and r.later in operand.labels:
                names = dict(zip(operand.labels, dims_of(node), strict=True))
                node = self.builder.masked(
                    str(Relation(names[r.earlier], names[r.later], r.strict)), node
                )
        return Operand(node, operand.labels, ())

    def _settle(self, operand: Operand, result: Dims) -> Any:
        """The node of a finished product, its pending relations applied, its axes called as the result's."""
        labels = tuple(x for x in result if x in operand.labels)
        done = self._apply(operand, operand.pending)
        if done.labels == labels and dims_of(done.node) == labels:
            return done.node
        return self._product([done], labels)

    def _product(
        self, pair: Sequence[Operand], labels: Dims, relation: Relation | None = None
    ) -> Any:
        """Emit a product. Labels become dimension names; two that would share one are told apart."""
        names = self._names(pair, labels, relation)
        operands = [
            self._renamed(
                o.node, dict(zip(dims_of(o.node), (names[x] for x in o.labels), strict=True))
            )
            for o in pair
        ]
        out = tuple(names[x] for x in labels)
        key: tuple[Any, ...] = (tuple(operands), out)
        if relation is None:
            if not {*out} <= {d for x in operands for d in dims_of(x)}:
                raise NotLowerable(
                    f"a product along {' '.join(out)} whose factors lack a dimension"
                )
            key = ("product", *key)
            if key not in self.memo:
                self.memo[key] = self.builder.contraction(operands, out)
            return self.memo[key]
        text = str(Relation(names[relation.earlier], names[relation.later], relation.strict))
        key = (text, *key)
        if key not in self.memo:
            self.memo[key] = self.builder.masked_contraction(text, operands, out)
        return self.memo[key]

    def _renamed(self, node: Any, names: dict[str, str]) -> Any:
        if all(k == v for k, v in names.items()):
            return node
        key = ("rename", node, tuple(names.items()))
        if key not in self.memo:
            self.memo[key] = self.builder.rename(node, names)
        return self.memo[key]

    def _names(
        self, pair: Sequence[Operand], labels: Dims, relation: Relation | None
    ) -> dict[str, str]:
        """A dimension name for each label: the result's own, else what an operand calls it, made distinct."""
        names: dict[str, str] = {}
        every = [x for o in pair for x in o.labels]
        tokens = set()
        for o in pair:
            for label, dim in zip(o.labels, dims_of(o.node), strict=True):
                if dim in (TOKEN, EARLIER):
                    tokens.add(label)
        if relation is not None:
            tokens |= {relation.earlier, relation.later}
            every += [relation.later, relation.earlier]
        for label in dict.fromkeys((*labels, *every)):
            if label in self.sizes:
                names[label] = label
        for label in dict.fromkeys((*labels, *every)):
            if label in names:
                continue
            own = next(
                (dims_of(o.node)[o.labels.index(label)] for o in pair if label in o.labels),
                None,
            )
            wanted = (EARLIER, TOKEN) if label in tokens else (own,)
            free = [w for w in wanted if w is not None and w not in names.values()]
            names[label] = free[0] if free else self._extra(own or EARLIER, names)
        return names

    def _extra(self, like: str, names: dict[str, str]) -> str:
        for i in range(1, 100):
            name = f"{like.rstrip('0123456789')}{i}"
            if (
                name not in names.values()
                and self.sizes.get(name, self.sizes[like]) == self.sizes[like]
            ):
                self.sizes[name] = self.sizes[like]
                if like.rstrip("0123456789") not in (TOKEN, EARLIER):
                    self.body.sizes[name] = self.sizes[like]
                return name
        raise NotLowerable("too many dimensions of one name")
