"""The body of a scan: a graph of IR operators, what its arguments are, and a checker of its rules."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import fx

from tttc.ir.errors import CheckError
from tttc.ir.lazy_graph import LazyGraph
from tttc.ir.ops import OPERATORS
from tttc.ir.order import Order
from tttc.ir.spec import parse, parse_relation

TOKEN = "t"  # the dimension of the tokens of a mini-batch
EARLIER = "s"  # the same tokens, seen from later ones

# Operators whose first argument is a function's name or a relation.
HEADED = (
    "elementwise",
    "reduction",
    "masked",
    "masked_contraction",
    "running_product",
    "triangular_solve",
)
_TORCH = Path(torch.__file__).parent
_PACKAGE = Path(__file__).parents[1]


def is_token(dim: str) -> bool:
    """Whether a dimension is that of tokens, or a numbered copy of it."""
    return dim.rstrip("0123456789") in (TOKEN, EARLIER)


@dataclass
class Body:
    """What a scan does with one token, or with one mini-batch of tokens.

    The placeholders of ``gm`` are named by role: ``anchor_k`` and ``carry_k`` (state leaf k), ``token_k``,
    ``shared_k``, ``constant_k``. Its results are those of the new carry, then the outputs. Arguments come
    with axes of size 1 squeezed away; ``leaf_shapes`` and ``output_shapes`` say how they really look.
    """

    gm: fx.GraphModule
    sizes: dict[str, int]  # of each named dimension but the token dimensions
    states: int
    leaf_shapes: dict[str, tuple[int, ...]]
    output_shapes: list[tuple[int, ...]]
    constants: list[torch.Tensor] = field(default_factory=list)
    batched: bool = False  # whether it handles a mini-batch (dimension t) or one token
    orders: list[Order] = field(default_factory=list)  # of products, as they were chosen
    whole: frozenset[str] = frozenset()  # the arguments that are not floating

    @classmethod
    def make(cls, graph: fx.Graph, sizes: dict[str, int], **rest) -> Body:
        """A checked body around a graph, dead code removed."""
        _sort_placeholders(graph)
        graph.eliminate_dead_code()
        graph.lint()
        gm = LazyGraph(torch.nn.Module(), graph)  # which few ask for its Python
        body = cls(gm, {k: v for k, v in sizes.items() if k not in (TOKEN, EARLIER)}, **rest)
        check(body)
        return body

    def with_graph(self, graph: fx.Graph, **changes) -> Body:
        """The same body around another graph."""
        made = Body.make(
            graph,
            {**self.sizes, **changes.pop("sizes", {})},
            states=changes.pop("states", self.states),
            leaf_shapes=self.leaf_shapes,
            output_shapes=changes.pop("output_shapes", self.output_shapes),
            constants=self.constants,
            orders=list(self.orders),
            whole=self.whole,
            batched=changes.pop("batched", self.batched),
        )
        return replace(made, **changes) if changes else made

    @property
    def placeholders(self) -> list[fx.Node]:
        """The arguments, in order."""
        return [n for n in self.gm.graph.nodes if n.op == "placeholder"]

    @property
    def results(self) -> list[fx.Node]:
        """The nodes returned: new carry, then outputs."""
        return list(self.gm.graph.output_node().args[0])  # type: ignore[arg-type]

    @property
    def nodes(self) -> list[fx.Node]:
        """The operators, in order."""
        return [n for n in self.gm.graph.nodes if n.op == "call_function"]


def role(node: fx.Node) -> tuple[str, int]:
    """What a placeholder is: ``("token", 2)``."""
    kind, _, index = str(node.target).rpartition("_")
    return kind, int(index)


_ORDER = {"anchor": 0, "carry": 1, "token": 2, "shared": 3, "constant": 4}


def _sort_placeholders(graph: fx.Graph) -> None:
    nodes = [n for n in graph.nodes if n.op == "placeholder"]
    known = [n for n in nodes if role(n)[0] in _ORDER]
    known.sort(key=lambda n: (_ORDER[role(n)[0]], role(n)[1]))
    others = [n for n in nodes if n not in known]
    first = next(iter(graph.nodes))
    anchor = first
    for node in [*known, *others]:
        if node is not anchor:
            anchor.prepend(node)
        else:
            anchor = anchor.next


@functools.cache
def is_users(file: str) -> bool:
    """Whether a source file may hold steps: it is neither torch's nor the compiler's."""
    path = Path(file)
    if path.is_relative_to(_PACKAGE):
        return path.is_relative_to(_PACKAGE / "nn")
    return not path.is_relative_to(_TORCH) and path.is_absolute()


def source_line(node: fx.Node) -> str | None:
    """The file and line of the step behind a captured node: the innermost that is neither torch's nor ours."""
    trace = node.meta.get("stack_trace") or node.stack_trace or ""
    for file, line in reversed(re.findall(r'File "([^"]+)", line (\d+)', trace)):
        if is_users(file):
            return f"{file}:{line}"
    return None


def spec_of(node: fx.Node) -> str:
    """The spec of an operator node."""
    return node.args[head_length(node)]  # type: ignore[return-value]


def head_of(node: fx.Node) -> str:
    """What precedes the spec: the name of a function, or a relation."""
    return node.args[0]  # type: ignore[return-value]


def head_length(node: fx.Node) -> int:
    """How many arguments precede the spec: a function's name or a relation."""
    return int(OPERATORS[node.target] in HEADED)


def operands_of(node: fx.Node) -> tuple:
    """The operands of an operator node."""
    return node.args[head_length(node) + 1 :]


def check(body: Body) -> None:
    """Raise :class:`CheckError` where a graph breaks a rule of the IR."""
    for node in body.gm.graph.nodes:
        if node.op == "call_function":
            _check_operator(node, body)
        elif node.op not in ("placeholder", "output"):
            raise CheckError(f"{node.name}: {node.op} is not part of the IR")
        if node.op != "output":
            dims: Sequence[str] = node.meta.get("dims", ())
            if len(set(dims)) != len(dims):
                raise CheckError(f"{node.name}: the dimensions {dims} are not distinct")
    for node in body.results:
        if not isinstance(node, fx.Node):
            raise CheckError(f"result {node!r}: expected a node")


def _check_operator(node: fx.Node, body: Body) -> None:
    if node.target not in OPERATORS:
        raise CheckError(f"{node.name}: {node.target} is not an operator of the IR")
    spec = parse(spec_of(node))
    operands = operands_of(node)
    if len(operands) != len(spec.operands):
        raise CheckError(f"{node.name}: {len(operands)} operands, spec {spec}")
    for operand, dims in zip(operands, spec.operands, strict=True):
        have = operand.meta["dims"] if isinstance(operand, fx.Node) else ()
        if tuple(have) != dims:
            raise CheckError(f"{node.name}: operand {operand} has dimensions {have}, spec {spec}")
    if tuple(node.meta["dims"]) != spec.result:
        raise CheckError(f"{node.name}: meta says {node.meta['dims']}, spec {spec}")
    known = {*body.sizes, TOKEN, EARLIER}
    for d in spec.labels:
        if d not in known and not is_token(d):
            raise CheckError(f"{node.name}: the dimension {d} has no size")
    name = OPERATORS[node.target]
    if name in (
        "contraction",
        "masked_contraction",
        "running_product",
        "elementwise",
        "broadcast",
        "at_last",
    ):
        allowed = {d for o in spec.operands for d in o}
        if name in ("masked_contraction", "running_product"):
            r = parse_relation(head_of(node))
            allowed |= {r.earlier, r.later}
        if not set(spec.result) <= allowed:
            raise CheckError(f"{node.name}: the result names a dimension no operand has: {spec}")
    if name == "running_product":
        r = parse_relation(head_of(node))
        if set(spec.result) - {r.earlier} != set(spec.operands[0]) or r.later not in spec.result:
            raise CheckError(f"{node.name}: {r} is no relation of the tokens of {spec}")
    if name == "triangular_solve":
        r = parse_relation(head_of(node))
        pair, given = ({*d} for d in spec.operands)
        own = {r.earlier, r.later} & given
        if not r.strict or len(own) != 1 or given != {*spec.result} or not pair <= {*r[:2]}:
            raise CheckError(f"{node.name}: {spec} is no triangular system of {r}")
    if name == "elementwise" and spec.summed:
        raise CheckError(f"{node.name}: an elementwise operator sums over {spec.summed}")
