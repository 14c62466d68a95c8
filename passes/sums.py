"""Sums: a sum over a feature dimension is made of what is known earlier, where linearity says that it can be.

Each sum waits for what it adds up, and makes the threads of a kernel wait for each other. Much of what a norm and its
derivative add up is known beforehand: what a mean was taken from adds up to nothing, and a factor without the summed
dimension stands outside.

Before (``e`` is what the norm's derivative hands on, ``z`` the output before a norm of its own)::

    m = contraction("s j -> s", g);  e = elementwise("sub", g, m / 64)
    z = elementwise("sub", q W, masked_contraction("s<=t", "t s, s j -> t j", a, e))
    total = contraction("t j -> t", z)        # waits for e

After, as the rows of ``e`` add up to nothing::

    total = contraction("t j -> t", q W)
"""

from __future__ import annotations

from torch import fx
from tttc.passes.linear_sums import Polynomial, SumsOver, Term
from tttc.passes.simplify import simplify

from tttc.ir import ops
from tttc.ir.body import Body, is_token, operands_of, spec_of
from tttc.ir.build import Builder, dims_of
from tttc.ir.depth import depths
from tttc.ir.spec import Dims, parse


def sums(body: Body) -> Body:
    """The body with sums made of what is known earlier.

    A sum is replaced where what replaces it waits for fewer products and sums and adds at most one sum; what adds up to
    nothing stays as it is, so that what is not finite shows.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(body.gm.graph, {}))
    while _replace_one(graph, body.sizes) or _join_one(graph):
        pass
    return simplify(body.with_graph(graph))


def _sums_over(graph: fx.Graph) -> dict[str, dict[fx.Node, fx.Node]]:
    """By dimension, what is added up over that dimension alone, and its sum."""
    found: dict[str, dict[fx.Node, fx.Node]] = {}
    for node in graph.nodes:
        if node.target is ops.contraction and len(operands_of(node)) == 1:
            summed = parse(spec_of(node)).summed
            if len(summed) == 1 and not is_token(summed[0]):
                found.setdefault(summed[0], {})[operands_of(node)[0]] = node
    return found


def _write(graph: fx.Graph, terms: Polynomial, sums: SumsOver, result: Dims) -> fx.Node:
    """The nodes of a polynomial, before where the graph is written now; its sums right after what they add up."""
    builder = Builder(graph)
    total: fx.Node | None = None
    for term, coefficient in terms.items():
        factors = list(term.factors)
        if term.summed is not None:
            if term.summed not in sums.existing:
                left = tuple(d for d in dims_of(term.summed) if d != sums.dim)
                with graph.inserting_after(term.summed):
                    sums.existing[term.summed] = builder.contraction([term.summed], left)
            factors.append(sums.existing[term.summed])
        value = factors[0] if factors else None
        for factor in factors[1:]:
            value = builder.elementwise("mul", value, factor)
        if value is not None and coefficient != 1.0:
            value = builder.elementwise("mul", value, coefficient)
        if value is None or set(dims_of(value)) != set(result):
            raise AssertionError("a sum has the dimensions of what it stands for")
        total = value if total is None else builder.elementwise("add", total, value, result=result)
    assert total is not None
    return total


def _replace_one(graph: fx.Graph, sizes: dict[str, int]) -> bool:
    """Replace the first sum that can be; whether there was one."""
    depth = depths(graph.nodes)
    for dim, existing in _sums_over(graph).items():
        found = SumsOver(dim, sizes[dim], existing, depth)
        for x, node in existing.items():
            terms = found.of(x)
            if len(dims_of(node)) > 1:  # its parts would have to lie as it does
                continue
            if not terms or found.added(terms) > 1 or found.waits(terms) >= depth[node]:
                continue
            if any(_dims(term, dim) != set(dims_of(node)) for term in terms):
                continue
            with graph.inserting_before(node):
                made = _write(graph, terms, found, dims_of(node))
            node.replace_all_uses_with(made)
            graph.erase_node(node)
            return True
    return False


def _join_one(graph: fx.Graph) -> bool:
    """Replace the first sum of two sums by a sum of their operands' sum; whether there was one."""
    for node in graph.nodes:
        for later in _summands(node):
            if not _is_sum(later) or later.users != {node: None}:
                continue
            chain = node
            while (chain := next((x for x in _summands(chain) if _is_link(x)), None)) is not None:
                for sooner in _summands(chain):
                    if sooner is not later and _is_sum(sooner) and _alike(sooner, later):
                        _join(graph, chain, sooner, later)
                        return True
    return False


def _join(graph: fx.Graph, chain: fx.Node, sooner: fx.Node, later: fx.Node) -> None:
    """Take ``sooner`` out of the chain of additions and into ``later``."""
    x, y = operands_of(sooner)[0], operands_of(later)[0]
    rest = [z for z in _summands(chain) if z is not sooner]
    builder = Builder(graph)
    with graph.inserting_before(later):
        both = builder.elementwise("add", x, y, result=dims_of(y))
        joined = builder.contraction([both], dims_of(later))
    later.replace_all_uses_with(joined)
    chain.replace_all_uses_with(rest[0])
    for node in (later, chain, sooner):
        graph.erase_node(node)


def _summands(node: fx.Node) -> tuple[fx.Node, ...]:
    """The two operands of an addition of values with the same dimensions."""
    if node.target is not ops.elementwise or node.args[0] != "add":
        return ()
    x, y = operands_of(node)
    alike = isinstance(x, fx.Node) and isinstance(y, fx.Node) and dims_of(x) == dims_of(y)
    return (x, y) if alike and x is not y else ()


def _is_link(node: fx.Node) -> bool:
    return bool(_summands(node)) and len(node.users) == 1


def _is_sum(node: fx.Node) -> bool:
    return node.target is ops.contraction and len(operands_of(node)) == 1 and len(node.users) == 1


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two sums are over the same dimensions of operands that lie alike."""
    return spec_of(a) == spec_of(b)


def _dims(term: Term, dim: str) -> set[str]:
    """The dimensions of a term."""
    parts = [*term.factors, *([term.summed] if term.summed else [])]
    return {d for n in parts for d in dims_of(n)} - {dim}
