"""Chunkwise: online updates (every token sees the state of the token before it), a chunk of tokens at a time, exactly.

A chunk starts from the carry. Where the update does not depend on the carry it is a mini-batch, and nothing is to
solve. Where it depends on the carry through a few numbers ``g`` per token, and these are affine in the carry,
the numbers of all tokens of a chunk solve a unit-lower-triangular system.

Before (one token; a gradient taken at the carry)::

    g = contraction("i, i j -> j", k, carry_W) - v
    W = carry_W - outer(k, g)
    z = contraction("i, i j -> j", q, W)

After (a chunk)::

    A = contraction("t i, s i -> t s", k, k)              # how the g of token s enters that of token t
    r = contraction("t i, i j -> t j", k, anchor_W) - v    # what g were if no token of the chunk had changed W
    g = triangular_solve("s<t", "t s, t j -> t j", A, r)
    W = anchor_W - contraction("s i, s j -> i j", k, g)
    z = contraction("t i, i j -> t j", q, anchor_W) - masked_contraction("s<=t", ..., contraction(q, k), g)

Which values are ``g`` follows from the graph: the smallest value that all dependence of the update on the carry
passes through. Source: the WY representation of arXiv 2406.06484 (section 3.2), with gates arXiv 2412.06464,
for any update that is affine in the state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx
from tttc.passes.at_anchor import at_anchor
from tttc.passes.batch import batch
from tttc.passes.dualise import Dualiser
from tttc.passes.terms import Expander, Term, collect, linear_kind

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, Body, head_of, operands_of, role
from tttc.ir.build import Builder, ancestors, dims_of
from tttc.ir.cost import element_count
from tttc.ir.errors import NotLowerable
from tttc.ir.functions import FUNCTIONS
from tttc.ir.spec import Dims, Relation

# Tokens of a chunk: sides of tiles that matrix units take well. With 64 features and the default schedule for a few
# programs, DeltaNet's kernel for sm_90 spills nothing at 16, 1408 B a thread at 32, 6784 B at 64 (counted offline, not
# timed); larger chunks take fewer turns.
SMALLEST, LARGEST = 16, 32


def chunk_size(body: Body) -> int:
    """Tokens of a chunk: about as many as the state has rows, so that products among tokens cost what those with it do."""
    states = [p for p in body.placeholders if role(p)[0] == "carry"]
    rows = max((body.sizes[d] for p in states for d in dims_of(p)), default=SMALLEST)
    size = SMALLEST
    while size < min(rows, LARGEST):
        size *= 2
    return size


# -- what the update depends on the carry through ------------------------------------------------------


def dependents(body: Body, sources: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on any of some nodes, these included."""
    found = set(sources)
    for node in body.nodes:
        if any(x in found for x in node.all_input_nodes):
            found.add(node)
    return found


def scales(node: fx.Node, touched: set[fx.Node]) -> bool:
    """Whether a node is a sum of its touched operands, or one of them times something untouched."""
    parts = operands_of(node)
    inside = [x for x in parts if x in touched]
    if node.target is ops.elementwise:
        kind = FUNCTIONS[head_of(node)].linear
        if kind == "sum":
            return all(dims_of(x) == dims_of(node) for x in inside)
        return kind == "product" and len(inside) == 1 and dims_of(inside[0]) == dims_of(node)
    product = node.target is ops.contraction and len(inside) == 1
    return product and set(dims_of(node)) == {d for x in parts for d in dims_of(x)} == set(
        dims_of(inside[0])
    )


def _separates(
    body: Body, cut: fx.Node | None, carries: list[fx.Node], touched: set[fx.Node]
) -> bool:
    """Whether the new states are sums of multiples of the old ones once ``cut`` is known."""
    scaled, otherwise = set(carries), set()
    for node in body.nodes:
        if node is cut:
            continue
        if any(x in otherwise for x in node.all_input_nodes):
            otherwise.add(node)
        if any(x in scaled for x in node.all_input_nodes):
            (scaled if scales(node, touched) else otherwise).add(node)
    return not otherwise & set(body.results[: body.states])


def _unknown(body: Body) -> fx.Node | None:
    """The smallest value, of these the last, that the updates depend on the carry through; None: they do not.

    Raises:
        NotLowerable: where there is no such value.
    """
    carries = [p for p in body.placeholders if role(p)[0] == "carry"]
    touched = dependents(body, carries)
    if _separates(body, None, carries, touched):
        return None
    needed = ancestors(body.results[: body.states])
    candidates = [n for n in body.nodes if n in touched and n in needed]
    candidates = [n for n in candidates if n not in body.results[: body.states]]
    found = [n for n in candidates if _separates(body, n, carries, touched)]
    found = [n for n in found if len(dims_of(n)) < 2]  # a matrix for every token is another state
    if not found:
        raise NotLowerable(
            "the update depends on the state otherwise than through one value per token"
        )
    size = min(element_count(dims_of(n), body.sizes) for n in found)
    return [n for n in found if element_count(dims_of(n), body.sizes) == size][-1]


# -- the body with the unknown given ---------------------------------------------------------------------


def _quotients_as_products(body: Body) -> Body:
    """The body with what depends on the carry multiplied where it was divided: a product is linear in each factor."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(body.gm.graph, mapping))  # type: ignore[arg-type]
    copy = body.with_graph(graph)
    touched = dependents(copy, (p for p in copy.placeholders if role(p)[0] == "carry"))
    for node in copy.nodes:
        if node.target is not ops.elementwise or head_of(node) != "div":
            continue
        x, y = operands_of(node)
        if x in touched and isinstance(y, fx.Node) and y not in touched:
            with copy.gm.graph.inserting_before(node):
                builder = Builder(copy.gm.graph)
                inverse = builder.elementwise("reciprocal", y)
                product = builder.elementwise("mul", x, inverse, result=dims_of(node))
            node.replace_all_uses_with(product)
    return copy.with_graph(copy.gm.graph)


def _with_unknown(body: Body, cut: fx.Node) -> tuple[Body, str]:
    """The body with ``cut`` as an argument, and its own value as the last result; the name of the argument."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    results: Any = graph.graph_copy(body.gm.graph, mapping)
    count = sum(role(p)[0] == "token" for p in body.placeholders)
    name = f"token_{count}"
    with graph.inserting_before(next(iter(graph.nodes))):
        unknown = graph.placeholder(name)
    unknown.meta["dims"] = dims_of(cut)
    value = mapping[cut]
    value.replace_all_uses_with(unknown)
    graph.output((*(unknown if x is value else x for x in results), value))
    return body.with_graph(graph, output_shapes=[*body.output_shapes, ()]), name


# -- solving for it ----------------------------------------------------------------------------------------


class _Solver(Dualiser):
    """Dualises a chunk in which one token argument stands for the last result, and solves for it."""

    def __init__(self, body: Body, tokens: int, unknown: str | None) -> None:
        super().__init__(body, tokens)
        self.unknown = next((p for p in body.placeholders if str(p.target) == unknown), None)
        self.reached = dependents(body, [self.unknown] if self.unknown else [])

    def run(self) -> Body:
        """The dual form, the unknown computed where it is first needed."""
        for node in self.body.placeholders:
            if node is not self.unknown:
                new = self.graph.placeholder(str(node.target))
                new.meta["dims"] = dims_of(node)
                self.env[node] = new
        results = self.body.results
        shapes = self.body.output_shapes
        if self.unknown is not None:
            self.env[self.unknown] = self.solution(results[-1])
            results, shapes = results[:-1], shapes[:-1]
        self.graph.output(tuple(self.made(x) for x in results))
        return self.body.with_graph(self.graph, orders=self.orders, output_shapes=shapes)

    def made(self, node: fx.Node) -> Any:
        """The new node of an old one, with all it is made of."""
        if node not in self.env:
            opened = node in self.opened
            for x in self._atoms(node) if opened else node.all_input_nodes:
                self.made(x)
            self.env[node] = self.root(node) if opened else self.copied(node)
        return self.env[node]

    def solution(self, definition: fx.Node) -> Any:
        """What the unknown is, from its definition ``r + sum over earlier tokens of A * unknown``."""
        result = dims_of(definition)
        linear = {n for n in self.reached if linear_kind(n)} & ancestors([definition])
        expander = Expander(self.opened | linear, self.sizes, self._last_of, self._each)
        known: list[Term] = []
        system: list[Term] = []
        for term in collect(expander.expand(definition, result), result):
            if any(f in self.reached for f, _ in term.factors):
                system.append(self.coefficient(term, result))
            else:
                known.append(term)
        for term in (*known, *system):
            for factor, _ in term.factors:
                self.made(factor)
        pair = (TOKEN, EARLIER)
        right = self.evaluated(known, result)
        if not system:
            return right
        total = self.assemble([self.evaluate(t, pair) for t in system], pair)
        return self.builder.triangular_solve(f"{EARLIER}<{TOKEN}", total, right)

    def coefficient(self, term: Term, result: Dims) -> Term:
        """A term without the unknown, negated: it stands left of the equation, for a pair of tokens.

        Raises:
            NotLowerable: where the term is not the unknown of an earlier token times a number.
        """
        unknowns = [(f, labels) for f, labels in term.factors if f is self.unknown]
        others = [(f, labels) for f, labels in term.factors if f is not self.unknown]
        if len(unknowns) != 1 or any(f in self.reached for f, _ in others):
            raise NotLowerable("the update is not affine in the state it is taken at")
        (earlier, *columns) = unknowns[0][1]
        if tuple(columns) != result[1:] or earlier in result:
            raise NotLowerable("the update mixes the features of the state it is taken at")
        if any(x in columns for _, labels in others for x in labels):
            raise NotLowerable("the update treats each feature of the state differently")
        named = [(f, tuple(EARLIER if x == earlier else x for x in labels)) for f, labels in others]
        relations = []
        for r in term.relations:
            before, after = (EARLIER if x == earlier else x for x in (r.earlier, r.later))
            if (before, after) != (EARLIER, TOKEN):  # only earlier tokens are solved for anyway
                relations.append(Relation(before, after, r.strict))
        return Term(-term.coefficient, tuple(named), tuple(relations))


def chunkwise(body: Body, tokens: int, from_anchor: bool = True) -> Body:
    """The body for a chunk of ``tokens`` tokens, which starts at its anchor or from any carry.

    Raises:
        NotLowerable: where tokens can only run one after another, with the reason.
    """
    body = _quotients_as_products(body)
    if any(len(dims_of(p)) > 1 for p in body.placeholders if role(p)[0] == "token"):
        raise NotLowerable("a token is a tile of tokens already")
    cut, name = _unknown(body), None
    if cut is not None:
        body, name = _with_unknown(body, cut)
    primal = batch(body)
    return _Solver(at_anchor(primal) if from_anchor else primal, tokens, name).run()
