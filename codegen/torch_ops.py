"""IR operators as direct torch calls: what a spec says is worked out once, not at every call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from tttc.codegen.torch_memory import place, write_over

from tttc.ir import ops
from tttc.ir.body import Body, operands_of, role
from tttc.ir.build import dims_of
from tttc.ir.functions import FUNCTIONS
from tttc.ir.spec import Dims, parse

Tensor = torch.Tensor
_TRUTH = {"gt", "ge", "lt", "le", "eq", "ne", "and", "or", "not", "isnan"}
# Functions whose torch operator writes into ``out`` and takes tensors alone.
_WRITING = {
    f: getattr(torch, f)
    for f in (
        *("add", "sub", "mul", "div", "neg", "reciprocal", "exp", "log", "log1p", "expm1", "sqrt", "rsqrt"),
        *("sin", "cos", "tanh", "sigmoid", "erf", "abs", "sign", "maximum", "minimum"),
    )
}  # fmt: skip
_ELEMENTWISE = {*_WRITING.values(), torch.addcmul}


@dataclass
class Facts:
    """What is known of a body's values, by the names of their nodes."""

    computed: set[str]  # of the dtype computed in
    owned: set[str]  # of these, those of full size: one for each mini-batch, sequence and head


def facts(body: Body, other_dtype: Iterable[str] = ()) -> Facts:
    """What is known of the values of a body whose arguments ``other_dtype`` are not of the dtype computed in."""
    found = Facts({"number"}, set())
    others = set(other_dtype)
    others |= {f"constant_{i}" for i, x in enumerate(body.constants) if not x.is_floating_point()}
    for node in body.gm.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "placeholder":
            known, varies = str(node.target) not in others, role(node)[0] == "token"
        elif node.op == "call_function":
            function = node.args[0] if node.target is ops.elementwise else None
            read = inputs[1:] if function == "where" else inputs
            known = function not in {*_TRUTH, "float"} and all(
                x.name in found.computed for x in read
            )
            varies = any(x.meta.get("varies") for x in inputs)
        else:
            continue
        node.meta["varies"] = varies
        if known:
            found.computed.add(node.name)
        if known and varies:
            found.owned.add(node.name)
    return found


@dataclass
class Direct:
    """A graph bound to torch operators. Numbers are tensors to it, which spares their conversion at every call."""

    run: Callable[..., Any]
    numbers: list[float]
    spaces: list[Dims]  # of full size, with these axes: more arguments, memory that it writes to
    owned: dict[str, Dims]  # the axes of results of full size, by name
    made: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    def at(self, like: Tensor) -> Callable[..., Any]:
        """The function of the graph's arguments, computing in the dtype and on the device of ``like``."""
        key = like.dtype, like.device
        if key not in self.made:
            numbers = [torch.tensor(x, dtype=like.dtype, device=like.device) for x in self.numbers]
            self.made[key] = functools.partial(self.run, *numbers) if numbers else self.run
        return self.made[key]


def _permuted(x: Tensor, moves: tuple[int, ...]) -> Tensor:
    lead = x.ndim - len(moves)
    return x.permute(*range(lead), *(x.ndim + m for m in moves))


def _added(x: Tensor, a: Tensor, b: Tensor, sign: int, out: Tensor | None = None) -> Tensor:
    """``x + a @ b`` (or minus) as one operation, where the product has the axes of ``x``."""
    lead = x.shape[:-2]
    if not lead or a.shape[:-2] != lead or b.shape[:-2] != lead:
        return torch.add(x, a @ b, alpha=sign, out=out)
    flat = torch.baddbmm(
        x.reshape(-1, *x.shape[-2:]),
        a.reshape(-1, *a.shape[-2:]),
        b.reshape(-1, *b.shape[-2:]),
        alpha=sign,
        out=None if out is None else out.view(-1, *x.shape[-2:]),
    )
    return flat.view(x.shape)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b``, into ``out`` without a copy."""
    lead = a.shape[:-2]
    if out is None or not lead or b.shape[:-2] != lead:
        return torch.matmul(a, b, out=out)
    shape = (-1, *out.shape[-2:])
    torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out=out.view(shape))
    return out


_FRESH = {*_ELEMENTWISE, _product}  # what writes its result to memory of its own, or to ``out``
_READERS = {*_FRESH, torch.sum, _added}  # what returns no view of its operands


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _results(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.output_node().args[0])  # type: ignore[arg-type]


class _Binder:
    def __init__(self, gm: fx.GraphModule, known: Facts, into: bool) -> None:
        self.known = known
        self.nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
        self.results = [self.named(x) for x in _results(gm)]
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.views: dict[Any, fx.Node] = {}
        self.numbers: dict[float, fx.Node] = {}
        arguments = [n for n in gm.graph.nodes if n.op == "placeholder"]
        for node in arguments:
            self.env[node] = self.graph.placeholder(node.name)
        self.first = self.env[arguments[0]] if arguments else None
        self.outs: dict[fx.Node, fx.Node] = {}
        if into:
            places = [self.graph.placeholder(f"into_{i}") for i in range(len(self.results))]
            self.outs = dict(zip(self.results, places, strict=True))
        # What is computed inside the operation that alone reads it.
        self.inside = {y for n in self.nodes if (y := self.absorbed(n)) is not None}
        for node in self.nodes:
            if node.target is not ops.rename and node not in self.inside:
                made = self.bind(node)
                made.meta["dims"] = dims_of(node)
                made.meta["owned"] = node.name in known.owned
                self.env[node] = made
        self.graph.output(tuple(self.env[x] for x in self.results))
        write_over(self.graph, _ELEMENTWISE, _FRESH, _READERS)
        self.spaces = place(self.graph, _FRESH, _READERS)

    # -- reading the graph of the IR

    @staticmethod
    def named(x: Any) -> Any:
        """A node under its first name."""
        while isinstance(x, fx.Node) and x.target is ops.rename:
            x = x.args[1]
        return x

    def operands(self, node: fx.Node) -> list[tuple[Any, Dims]]:
        """The operands of an operator, each with the names that its spec gives the axes."""
        head = 1 if node.target is ops.elementwise else 0
        return [
            (self.named(x), dims)
            for x, dims in zip(operands_of(node), parse(str(node.args[head])).operands, strict=True)
        ]

    def computed(self, node: Any) -> bool:
        return _is_number(node) or node.name in self.known.computed

    def factors(self, node: Any) -> list[tuple[Any, Dims]] | None:
        """The two operands of a product without a sum."""
        if not isinstance(node, fx.Node) or not self.computed(node):
            return None
        product = node.target is ops.elementwise and node.args[0] == "mul"
        if node.target is ops.contraction and len(node.args) == 3:
            product = not parse(str(node.args[0])).summed
        return self.operands(node) if product else None

    def matrices(self, node: Any) -> tuple[Any, ...] | None:
        """A contraction as a product of matrices: left and right, their names in order, those of the result."""
        if (
            not isinstance(node, fx.Node)
            or node.target is not ops.contraction
            or len(node.args) != 3
        ):
            return None
        (x, left), (y, right) = self.operands(node)
        result, summed = dims_of(node), parse(str(node.args[0])).summed
        if (
            len(summed) != 1
            or summed[0] not in left
            or summed[0] not in right
            or set(left) & set(right) != {*summed}
        ):
            return None
        if len(left) > 2 or len(right) > 2:
            return None
        rows = tuple(d for d in left if d not in summed)
        columns = tuple(d for d in right if d not in summed)
        if result != (*rows, *columns):
            x, left, rows, y, right, columns = y, right, columns, x, left, rows
        return x, left, (*rows, *summed), y, right, (*summed, *columns)  # fmt: skip

    def absorbed(self, node: fx.Node) -> fx.Node | None:
        """The product that a sum takes up, which nobody else reads."""
        if node.target is not ops.elementwise or node.args[0] not in ("add", "sub"):
            return None
        if not self.computed(node):
            return None
        (x, first), (y, second) = self.operands(node)
        result = dims_of(node)
        for other, product in ((x, y), (y, x)) if node.args[0] == "add" else ((x, y),):
            if not isinstance(product, fx.Node) or product in self.results or other is product:
                continue
            if sum(u.op != "output" for u in self.readers(product)) != 1:
                continue
            if self.factors(product) is not None:
                return product
            same = isinstance(other, fx.Node) and len(result) == 2 and first == result == second
            if same and self.matrices(product) is not None:
                return product
        return None

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Who reads a node, under any name."""
        found = []
        for user in node.users:
            found += self.readers(user) if user.target is ops.rename else [user]
        return found

    # -- writing that of torch

    def number(self, x: float) -> fx.Node:
        """A number as a tensor, one of the first arguments."""
        if x not in self.numbers:
            assert self.first is not None
            with self.graph.inserting_before(self.first):
                self.numbers[x] = self.graph.placeholder(f"number_{len(self.numbers)}")
        return self.numbers[x]

    def view(self, x: Any, dims: Dims, target: Dims) -> Any:
        """An operand whose last axes are those of ``target``, of size 1 where it lacks one."""
        if not isinstance(x, fx.Node):
            return self.number(x)
        new = self.env[x]
        if dims == target:
            return new
        key = (new, dims, target)
        if key not in self.views:
            order = tuple(d for d in target if d in dims)
            if order != dims:
                if len(dims) == 2:
                    new = self.graph.call_function(torch.transpose, (new, -1, -2))
                else:
                    moves = tuple(dims.index(d) - len(dims) for d in order)
                    new = self.graph.call_function(_permuted, (new, moves))
            for i in reversed(range(-len(target), 0)):
                if target[i] not in dims:
                    new = self.graph.call_function(torch.unsqueeze, (new, i))
            self.views[key] = new
        return self.views[key]

    def bind(self, node: fx.Node) -> fx.Node:
        result = dims_of(node)
        out: dict[str, Any] = {"out": self.outs[node]} if node in self.outs else {}
        product = self.absorbed(node)
        if product is not None:
            return self.sum(node, product, out)
        factors = self.factors(node)
        if factors is not None:
            new = tuple(self.view(x, dims, result) for x, dims in factors)
            return self.graph.call_function(torch.mul, new, out)
        if node.target is ops.elementwise:
            return self.elementwise(node, out)
        plan = self.matrices(node)
        if plan is not None:
            return self.product(plan, result, out)
        if node.target is ops.contraction and len(node.args) == 2:
            ((x, dims),) = self.operands(node)
            axes = tuple(i - len(dims) for i, d in enumerate(dims) if d not in result)
            if axes and tuple(d for d in dims if d in result) == result:
                return self.graph.call_function(torch.sum, (self.env[x], axes), out)
        return self.graph.node_copy(node, lambda x: self.env[self.named(x)])

    def elementwise(self, node: fx.Node, out: dict[str, Any]) -> fx.Node:
        function, result = str(node.args[0]), dims_of(node)
        operands = self.operands(node)
        if function in _WRITING and self.computed(node):
            new = tuple(self.view(x, dims, result) for x, dims in operands)
            return self.graph.call_function(_WRITING[function], new, out)
        new = tuple(
            self.view(x, dims, result) if isinstance(x, fx.Node) else x for x, dims in operands
        )
        return self.graph.call_function(FUNCTIONS[function].torch, new)

    def product(self, plan: tuple[Any, ...], result: Dims, out: dict[str, Any]) -> fx.Node:
        """A product of matrices; a vector is a matrix of one row or column."""
        x, left, rows, y, right, columns = plan
        a, b = self.view(x, left, rows), self.view(y, right, columns)
        if len(result) == 2:
            return self.graph.call_function(_product, (a, b), out)
        one_row, one_column = len(rows) == 1, len(columns) == 1
        a = self.graph.call_function(torch.unsqueeze, (a, -2)) if one_row else a
        b = self.graph.call_function(torch.unsqueeze, (b, -1)) if one_column else b
        new = self.graph.call_function(torch.matmul, (a, b))
        if one_column:
            new = self.graph.call_function(torch.squeeze, (new, -1))
        return (
            self.graph.call_function(torch.squeeze, (new, -1 if one_column else -2))
            if one_row
            else new
        )

    def sum(self, node: fx.Node, product: fx.Node, out: dict[str, Any]) -> fx.Node:
        """A sum with the product inside it."""
        result = dims_of(node)
        operands = self.operands(node)
        at = next(i for i in (1, 0) if operands[i][0] is product)
        other, other_dims = operands[1 - at]
        sign = 1 if node.args[0] == "add" else -1
        x = self.view(other, other_dims, result)
        factors = self.factors(product)
        if factors is None:
            a, left, rows, b, right, columns = self.matrices(product)  # type: ignore[misc]
            # The sum may name its axes otherwise than the product does.
            new = (x, self.view(a, left, rows), self.view(b, right, columns), sign)
            return self.graph.call_function(_added, new, out)
        names = dict(zip(dims_of(product), operands[at][1], strict=True))
        (a, left), (b, right) = factors
        new = tuple(
            self.view(y, tuple(names[d] for d in dims), result)
            for y, dims in ((a, left), (b, right))
        )
        keywords = {**out, "value": sign} if sign < 0 else out
        return self.graph.call_function(torch.addcmul, (x, *new), keywords)


def direct(gm: fx.GraphModule, known: Facts, into: bool = False) -> Direct:
    """A graph of the IR as torch operators bound to their specs, sums with the products inside them.

    ``known``: of the body the graph is part of. ``into``: after its other arguments the function takes, for each
    result, the tensor to write it into, or None. Not every operator does, so the tensor returned is what counts.
    """
    binder = _Binder(gm, known, into)
    made = fx.GraphModule(gm, binder.graph)
    owned = {x.name: dims_of(x) for x in _results(gm) if x.name in known.owned}
    return Direct(made.forward, list(binder.numbers), binder.spaces, owned)
