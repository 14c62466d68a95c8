"""Dualise: no token's fast weights are materialised, because a better contraction order never makes them.

Before (primal: ``b * i * j`` numbers are made)::

    S = masked_contraction("s<=t", "s i j -> t i j", u)        # u = k_si * g_sj
    W = elementwise("sub", "i j, t i j -> t i j", A, S)
    z = contraction("t i, t i j -> t j", q, W)

After (dual)::

    p = contraction("t i, i j -> t j", q, A)
    a = contraction("t i, s i -> t s", q, k)
    c = masked_contraction("s<=t", "t s, s j -> t j", a, g)
    z = elementwise("sub", "t j, t j -> t j", p, c)

Products are distributed over the sums inside them, nested contractions become one, like terms are added up,
and each product is evaluated in the order that costs least. Nothing here knows an inner model: it is a
change of contraction order (section 2.5 and appendix A of arXiv 2407.04620, for one layer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from tttc.passes.terms import Expander, Term, collect, linear_kind

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, Body, is_token, operands_of, spec_of
from tttc.ir.build import Builder, dims_of
from tttc.ir.cost import element_count
from tttc.ir.errors import NotLowerable
from tttc.ir.order import Order, best_path
from tttc.ir.spec import Dims, Relation, parse


@dataclass
class _Operand:
    """A partial product: a node (None for ones), its labels, and relations still to be applied."""

    node: Any
    labels: Dims
    pending: tuple[Relation, ...] = ()


@dataclass
class _Final:
    """The last product of a term, not yet made: terms that share ``right`` are added before it."""

    sign: float
    left: Any
    left_labels: Dims
    right: Any
    right_labels: Dims
    relation: Relation | None


class Dualiser:
    """One run of the pass."""

    def __init__(self, body: Body, mini_batch_size: int) -> None:
        self.body = body
        self.sizes = {**body.sizes, TOKEN: mini_batch_size, EARLIER: mini_batch_size}
        for node in body.nodes:
            self.sizes |= {d: mini_batch_size for d in dims_of(node) if is_token(d)}
        self.graph = fx.Graph()
        self.builder = Builder(self.graph)
        self.env: dict[fx.Node, Any] = {}
        self.memo: dict[Any, fx.Node] = {}
        self.orders = list(body.orders)
        self._sums: dict[fx.Node, bool] = {}
        self.heavy = self._heavy()
        self.opened = self._opened()

    # -- what is opened ----------------------------------------------------------------------------

    def _heavy(self) -> set[fx.Node]:
        """Matrices (or more) of which every token has its own, larger than what they are made of: never to be made.

        A vector for every token is what tokens are; so is what a matrix product makes of them.
        """
        largest: dict[fx.Node, int] = {}
        heavy: set[fx.Node] = set()
        for node in self.body.gm.graph.nodes:
            if node.op == "output":
                continue
            size = element_count(dims_of(node), self.sizes)
            features = [d for d in dims_of(node) if d not in (TOKEN, EARLIER)]
            sources = [largest[x] for x in node.all_input_nodes if x in largest]
            if (
                1 < len(features) < len(dims_of(node))
                and linear_kind(node)
                and sources
                and size > max(sources)
                and (not self._sums_up(node) or any(x in heavy for x in node.all_input_nodes))
            ):
                heavy.add(node)
                largest[node] = max(sources)
            else:
                largest[node] = size
        return heavy

    @staticmethod
    def _sums_up(node: fx.Node) -> bool:
        return node.target is ops.contraction and bool(parse(spec_of(node)).summed)

    def _opened(self) -> set[fx.Node]:
        opened = set(self.heavy)
        for node in self.body.nodes:
            if node in opened or not linear_kind(node):
                continue
            if any(x in self.heavy for x in node.all_input_nodes):
                opened.add(node)
        for node in self.heavy:
            for user in node.users:
                if user.op == "output" or not linear_kind(user):
                    raise NotLowerable(
                        "fast weights pass through a nonlinear function token by token: there is no dual form"
                    )
        # A sum into which such a value flows is one sum with it, where nobody else needs the part.
        changed = True
        while changed:
            changed = False
            for node in self.body.nodes:
                if (
                    node in opened
                    or node.target is not ops.elementwise
                    or linear_kind(node) != "sum"
                ):
                    continue
                if any(x in opened and len(x.users) == 1 for x in node.all_input_nodes):
                    opened.add(node)
                    changed = True
            for node in self.body.nodes:
                if node in opened or self._coefficients(node):
                    continue
                if not (self._causal_sum(node) or self._scaled(node)):
                    continue
                users = [u for u in node.users if u.op != "output"]
                at_end = node.target is ops.last
                if (users or at_end) and all(u in opened for u in users):
                    opened.add(node)
                    changed = True
        return opened

    @staticmethod
    def _coefficients(node: fx.Node) -> bool:
        """Numbers for pairs of tokens, and sums of such: small, and factors of many products."""
        dims = dims_of(node)
        pairs = len(dims) > 1 or node.target is ops.masked_contraction
        return pairs and all(is_token(d) for d in dims)

    def _scaled(self, node: fx.Node) -> bool:
        """A value times per-token numbers, or renamed: opened, the numbers join the others of the product."""
        if linear_kind(node) == "view":
            return node.target is ops.rename
        if node.target is not ops.elementwise or linear_kind(node) != "product":
            return False
        return any(self._per_token(x) for x in operands_of(node))

    @staticmethod
    def _per_token(x: Any) -> bool:
        return all(d in (TOKEN, EARLIER) for d in dims_of(x))

    def _causal_sum(self, node: fx.Node) -> bool:
        """A linear value made of a causal sum: worth opening, so that sums share their last product."""
        if node not in self._sums:
            inside = [x for x in node.all_input_nodes if self._causal_sum(x)]
            kind = linear_kind(node)
            passes_on = kind in ("sum", "view") or (
                kind == "product"
                and len(inside) == 1
                and all(self._per_token(x) for x in operands_of(node) if x is not inside[0])
            )
            self._sums[node] = bool(kind) and (
                node.target is ops.masked_contraction or (bool(inside) and passes_on)
            )
        return self._sums[node]

    # -- the walk ----------------------------------------------------------------------------------

    def run(self) -> Body:
        needed = self._needed()
        for node in self.body.gm.graph.nodes:
            if node.op == "placeholder":
                new = self.graph.placeholder(str(node.target))
                new.meta["dims"] = dims_of(node)
                self.env[node] = new
            elif node.op == "call_function" and node in needed:
                self.env[node] = self.root(node) if node in self.opened else self.copied(node)
        self.graph.output(tuple(self.env[x] for x in self.body.results))
        return self.body.with_graph(self.graph, orders=self.orders)

    def _needed(self) -> set[fx.Node]:
        """Nodes that are made: results, and what those are made of once opened nodes are looked through."""
        needed: set[fx.Node] = set()
        stack = list(self.body.results)
        while stack:
            node = stack.pop()
            if node in needed or node.op != "call_function":
                continue
            needed.add(node)
            inputs = list(node.all_input_nodes)
            if node in self.opened:
                inputs = self._atoms(node)
            stack += inputs
        return needed

    def _atoms(self, node: fx.Node) -> list[fx.Node]:
        found: list[fx.Node] = []
        stack = list(node.all_input_nodes)
        while stack:
            x = stack.pop()
            if x in self.opened:
                stack += x.all_input_nodes
            else:
                found.append(x)
        return found

    def copied(self, node: fx.Node) -> fx.Node:
        operands = [self.env.get(x, x) if isinstance(x, fx.Node) else x for x in operands_of(node)]
        return self.builder.copy(node, operands, dims_of(node))

    def root(self, node: fx.Node) -> fx.Node:
        """A value evaluated in the cheapest order."""
        result = dims_of(node)
        expander = Expander(self.opened, self.sizes, self._last_of, self._each)
        terms = collect(expander.expand(node, result), result)
        finals: list[_Final | tuple[float, Any]] = [self.evaluate(t, result) for t in terms]
        return self.whole(self.assemble(finals, result), result)

    @staticmethod
    def whole(made: Any, result: Dims) -> Any:
        """A sum that has all its axes."""
        if dims_of(made) != result:
            raise NotLowerable("a value of the mini-batch is the same along a dimension")
        return made

    def _last_of(self, node: fx.Node, dim: str) -> fx.Node:
        """The last token's value of a node, in terms of the old graph (a stand-in until it is made)."""
        key = ("last", node, dim)
        if key not in self.memo:
            source = self.env.get(node, node)
            self.memo[key] = self.builder.last(source, dim)
            self.env[self.memo[key]] = self.memo[key]
        return self.memo[key]

    # -- one term ----------------------------------------------------------------------------------

    def evaluate(self, term: Term, result: Dims) -> _Final | tuple[float, Any]:
        """Evaluate a product but for its last step."""
        operands = [_Operand(self.env.get(x, x), labels) for x, labels in term.factors]
        operands = self._scaled_by(abs(term.coefficient), operands)
        term = (
            Term(1.0 if term.coefficient > 0 else -1.0, term.factors, term.relations)
            if operands
            else term
        )
        operands = self._scalars_first(operands, term.relations)
        operands += [_Operand(None, (r.later, r.earlier), (r,)) for r in term.relations]
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

    def _scaled_by(self, factor: float, operands: list[_Operand]) -> list[_Operand]:
        """The factors with a number multiplied into the smallest."""
        if factor == 1.0 or not operands:
            return operands
        small = min(operands, key=lambda o: element_count(dims_of(o.node), self.sizes))
        key = ("scaled", small.node, factor)
        if key not in self.memo:
            self.memo[key] = self.builder.elementwise("mul", small.node, factor)
        scaled = _Operand(self.memo[key], small.labels)
        return [scaled if o is small else o for o in operands]

    def _scalars_first(
        self, operands: list[_Operand], relations: Sequence[Relation]
    ) -> list[_Operand]:
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
        self, operands: list[_Operand], numbers: list[_Operand], relation: Relation | None
    ) -> list[_Operand]:
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
            combined = _Operand(self._product([combined, o], labels), labels)
        return [combined, *others]

    def _numbers_first(self, operands: list[_Operand]) -> list[_Operand]:
        """What has no axes goes to the smallest factor: a mask alone would not say how many tokens there are."""
        numbers = [o for o in operands if not o.labels]
        factors = [o for o in operands if o.labels]
        if not numbers or not factors:
            return operands
        small = min(factors, key=lambda o: element_count(dims_of(o.node), self.sizes))
        scaled = small
        for o in numbers:
            scaled = _Operand(self._product([o, scaled], small.labels), small.labels)
        return [scaled if o is small else o for o in factors]

    @staticmethod
    def _is_token(operand: _Operand) -> bool:
        return all(d in (TOKEN, EARLIER) for d in dims_of(operand.node))

    def _size(self, label: str, operands: Sequence[_Operand]) -> int:
        for o in operands:
            if label in o.labels:
                dims = dims_of(o.node) if o.node is not None else (TOKEN, EARLIER)
                return self.sizes[dims[o.labels.index(label)]]
        return self.sizes[label]

    def _order(
        self, operands: Sequence[_Operand], result: Dims
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

    def multiply(self, pair: Sequence[_Operand], rest: set[str], result: Dims | None) -> _Operand:
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
            real = [_Operand(self._ones(masks[0].pending[0]), masks[0].labels), *real]
            pending = tuple(r for o in pair if o is not masks[0] for r in o.pending)
        due = [r for r in pending if r.earlier not in labels or r.later not in labels]
        later = tuple(r for r in pending if r not in due)
        if len(real) == 1 and not due and set(labels) == set(real[0].labels):
            return _Operand(real[0].node, real[0].labels, later)
        if len(real) == 1 and not due and later and len(labels) > len(real[0].labels):
            # Broadcast along the pairs of a relation; it stays pending, so that it masks the last product.
            return _Operand(self._product(real, labels, later[0]), labels, later)
        if len(due) > 1:
            real = [self._apply(o, due[1:]) for o in real]
        return _Operand(self._product(real, labels, due[0] if due else None), labels, later)

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

    def _apply(self, operand: _Operand, relations: Sequence[Relation]) -> _Operand:
        node = operand.node
        for r in relations:
            if r.earlier in operand.labels and r.later in operand.labels:
                names = dict(zip(operand.labels, dims_of(node), strict=True))
                node = self.builder.masked(
                    str(Relation(names[r.earlier], names[r.later], r.strict)), node
                )
        return _Operand(node, operand.labels, ())

    def _settle(self, operand: _Operand, result: Dims) -> Any:
        """The node of a finished product, its pending relations applied, its axes called as the result's."""
        labels = tuple(x for x in result if x in operand.labels)
        done = self._apply(operand, operand.pending)
        if done.labels == labels and dims_of(done.node) == labels:
            return done.node
        return self._product([done], labels)

    def _product(
        self, pair: Sequence[_Operand], labels: Dims, relation: Relation | None = None
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
        self, pair: Sequence[_Operand], labels: Dims, relation: Relation | None
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

    # -- the sum -----------------------------------------------------------------------------------

    def _as_final(self, sign: float, pair: Sequence[_Operand], result: Dims) -> _Final | None:
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
        return _Final(sign, tile[0].node, tile[0].labels, other[0].node, other[0].labels, r)

    def assemble(self, finals: Sequence[_Final | tuple[float, Any]], result: Dims) -> Any:
        """Add the terms up; causal products with the same right side share one product."""
        groups: dict[Any, list[_Final]] = {}
        summands: list[tuple[float, Any]] = []
        for f in finals:
            if isinstance(f, _Final):
                free = tuple(x if x in result else "#" for x in f.right_labels)
                groups.setdefault(
                    (f.right, free, f.relation.strict if f.relation else None), []
                ).append(f)
            else:
                summands.append(f)
        for members in groups.values():
            first = members[0]
            order = (first.relation.later, first.relation.earlier)  # type: ignore[union-attr]
            lead = first.sign
            left: Any = None
            for m in members:
                o = _Operand(m.left, m.left_labels)
                mine = (m.relation.later, m.relation.earlier)  # type: ignore[union-attr]
                tile = self._product([o], mine)
                tile = self._renamed(tile, dict(zip(dims_of(tile), (TOKEN, EARLIER), strict=True)))
                scale = m.sign / lead
                if scale != 1.0:
                    tile = self.builder.elementwise("mul", tile, scale)
                left = tile if left is None else self.builder.elementwise("add", left, tile)
            pair = [_Operand(left, order), _Operand(first.right, first.right_labels)]
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


def dualise(body: Body, mini_batch_size: int) -> Body:
    """The batched body without any value larger than what it is made of; costs are taken at ``mini_batch_size``.

    Raises:
        NotLowerable: where fast weights pass through a nonlinear function token by token.
    """
    return Dualiser(body, mini_batch_size).run()
