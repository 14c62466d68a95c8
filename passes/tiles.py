"""Tiles: a step whose token is a tile of tokens, as the body of a mini-batch of those.

A program that takes a mini-batch at a time has its tokens as an axis of its own (``k`` here), and what is causal
as products with constants. Read as the dimension ``t`` of the tokens of a mini-batch, the same program is a body in the
primal form, which ``dualise`` takes from there.

Before (one tile; ``lower`` is a triangle of ones, ``one_hot`` picks the last)::

    G = elementwise("mul", "k i, k j -> k i j", token_0, error)
    C = contraction("l k, k i j -> l i j", lower, G)
    S = elementwise("sub", "i j, l i j -> l i j", carry_0, C)
    new = contraction("l, l i j -> i j", one_hot, S)

After (a mini-batch)::

    G = elementwise("mul", "t i, t j -> t i j", token_0, error)
    C = masked_contraction("s<=t", "s i j -> t i j", rename(G))
    S = elementwise("sub", "i j, t i j -> t i j", anchor_0, C)
    new = last("t i j -> i j", S)

Source: the primal form of section 2.4 of arXiv 2407.04620, read backwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, Body, head_of, operands_of, role, spec_of
from tttc.ir.build import Builder, ancestors, dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.spec import Dims, parse


@dataclass(frozen=True)
class Tile:
    """Where the tokens of a tile are.

    Attributes:
        size: how many.
        tokens, outputs: for each leaf, which of its axes they are.
    """

    size: int
    tokens: tuple[int, ...]
    outputs: tuple[int, ...]


def tile_names(body: Body) -> set[str]:
    """The names of a step's axes that may be those of the tokens of a tile: no state and no parameter has them."""
    fixed = {
        d
        for p in body.placeholders
        if role(p)[0] in ("anchor", "carry", "shared")
        for d in dims_of(p)
    }
    return {d for n in (*body.placeholders, *body.nodes) for d in dims_of(n)} - fixed


def tile_of(body: Body) -> Tile:
    """Where the tokens of a tile are in the leaves of a step.

    Raises:
        NotLowerable: where the step does not take tiles of tokens, or nothing would be gained by reading it so.
    """
    names = tile_names(body)
    sizes = {body.sizes[d] for d in names}
    if len(sizes) != 1:
        raise NotLowerable("its tokens are no tiles of tokens")
    tokens = [p for p in body.placeholders if role(p)[0] == "token"]
    shapes = [body.leaf_shapes[str(p.target)] for p in tokens]
    outputs = body.results[body.states :]
    found = [_axis(shape, dims_of(p), names) for shape, p in zip(shapes, tokens, strict=True)]
    given = [
        _axis(shape, dims_of(x), names)
        for shape, x in zip(body.output_shapes, outputs, strict=True)
    ]
    if not any(_gains(n, names) for n in body.nodes):
        raise NotLowerable("its tiles hold nothing that is causal, and no matrix for every token")
    return Tile(sizes.pop(), tuple(found), tuple(given))


def _axis(shape: tuple[int, ...], dims: Dims, names: set[str]) -> int:
    own = [i for i, d in enumerate(dims) if d in names]
    if len(own) != 1:
        raise NotLowerable("a token or an output has not one axis for the tokens of a tile")
    return [i for i, s in enumerate(shape) if s != 1][own[0]]


def _gains(node: fx.Node, names: set[str]) -> bool:
    dims = dims_of(node)
    inside = [d for d in dims if d in names]
    return len(inside) > 1 or (len(inside) == 1 and len(dims) > 2)


class _Tiles:
    """One run of the pass."""

    def __init__(self, body: Body, tile: Tile) -> None:
        self.body, self.tile = body, tile
        self.names = tile_names(body)
        self.graph = fx.Graph()
        self.builder = Builder(self.graph)
        self.env: dict[fx.Node, Any] = {}
        # Of values that have two of the names: which is the later token, which the earlier.
        self.pairs: dict[fx.Node, dict[str, str]] = {}
        self.constants = {
            p: body.constants[role(p)[1]]
            for p in body.placeholders
            if role(p)[0] == "constant" and self.own(dims_of(p))
        }

    def own(self, dims: Dims) -> Dims:
        """Those of some names that are the tokens'."""
        return tuple(d for d in dims if d in self.names)

    def run(self) -> Body:
        needed = ancestors(self.body.results)
        for node in self.body.placeholders:
            if node in self.constants:
                continue
            new = self.graph.placeholder(str(node.target))
            dims = dims_of(node)
            lead = (TOKEN,) if self.own(dims) else ()
            new.meta["dims"] = lead + tuple(d for d in dims if d not in self.names)
            # As it came, the tokens' axis may be elsewhere.
            self.env[node] = new
        for node in self.body.nodes:
            if node in needed:
                self.env[node] = self.rewritten(node)
        self.graph.output(tuple(self.result(x) for x in self.body.results))
        shapes = dict(self.body.leaf_shapes)
        for i, axis in enumerate(self.tile.tokens):
            shapes[f"token_{i}"] = _without(shapes[f"token_{i}"], axis)
        outputs = [
            _without(s, a) for s, a in zip(self.body.output_shapes, self.tile.outputs, strict=True)
        ]
        made = self.body.with_graph(self.graph, batched=True, output_shapes=outputs)
        made.leaf_shapes = shapes
        made.sizes = {k: v for k, v in made.sizes.items() if k not in self.names}
        return made

    def result(self, node: fx.Node) -> Any:
        new = self.env[node]
        if TOKEN in dims_of(new) and dims_of(new)[0] != TOKEN:
            rest = tuple(d for d in dims_of(new) if d != TOKEN)
            new = self.builder.contraction([new], (TOKEN, *rest))
        return new

    # -- operators -----------------------------------------------------------------------------------

    def rewritten(self, node: fx.Node) -> Any:
        """The node with its tokens named ``t``, earlier ones beside them ``s``."""
        known = [x for x in operands_of(node) if x in self.constants]
        if node.target is ops.rename:
            return self.renamed(node)
        if node.target is ops.reduction:
            (dims,), result = parse(spec_of(node))
            if self.own(dims) != self.own(result):
                raise NotLowerable(f"it takes the {head_of(node)} over the tokens of a tile")
        if known and node.target is ops.contraction:
            return self.product(node, known)
        if known and node.target is ops.elementwise:
            return self.masked(node)
        if known:
            raise NotLowerable("it has a constant of its own for every token of a tile")
        roles = self.roles(node)
        return self.copied(node, list(operands_of(node)), roles)

    def roles(self, node: fx.Node) -> dict[str, str]:
        """What the tokens' names that meet at a node are called there."""
        spec = parse(spec_of(node))
        names = self.own(spec.labels)
        kept = self.own(spec.result)
        if len(names) > 2:
            raise NotLowerable("it relates three tokens of a tile to each other")
        if len(names) < 2:
            return dict.fromkeys(names, TOKEN)
        if len(kept) == 1:
            return {d: TOKEN if d == kept[0] else EARLIER for d in names}
        if not kept:
            raise NotLowerable("it sums over pairs of tokens of a tile")
        for x in operands_of(node):
            if x in self.pairs:
                return self.pairs[x]
        later = self.later(node, names)
        return {d: TOKEN if d == later else EARLIER for d in names}

    def later(self, node: fx.Node, names: Dims) -> str:
        """Which of two tokens is the one that others of the tile are summed up for, as the users have it."""
        seen, stack = {node}, [node]
        while stack:
            for user in stack.pop().users:
                if user.op == "output" or user in seen:
                    continue
                seen.add(user)
                kept = self.own(dims_of(user))
                if len(kept) == 1 and kept[0] in names:
                    return kept[0]
                stack.append(user)
        return names[0]

    def copied(self, node: fx.Node, given: list[Any], roles: dict[str, str]) -> Any:
        """The operator of a node on what its operands have become."""
        operands = [self.operand(x, roles) for x in given]
        result = tuple(roles.get(d, d) for d in dims_of(node))
        have = {d for x in operands for d in dims_of(x)}
        missing = [d for d in (TOKEN, EARLIER) if d in result and d not in have]
        if node.target is ops.broadcast:
            missing = []
        new = self.builder.copy(node, operands, tuple(d for d in result if d not in missing))
        if missing:
            new = self.repeated(new, result)
        if len(set(roles.values())) == 2 and len(self.own(dims_of(node))) == 2:
            self.pairs[node] = roles
        return new

    def repeated(self, x: Any, result: Dims) -> Any:
        """A value for pairs of tokens that is the same along one of them."""
        like = next(
            self.env[p] for p in self.body.placeholders if TOKEN in dims_of(self.env.get(p))
        )
        absent = next(d for d in (TOKEN, EARLIER) if d not in dims_of(x))
        like = like if absent == TOKEN else self.builder.rename(like, {TOKEN: EARLIER})
        return self.builder.call(ops.broadcast, (), (x, like), result)

    def operand(self, x: Any, roles: dict[str, str]) -> Any:
        """An operand under the names that a node has for its tokens."""
        if not isinstance(x, fx.Node):
            return x
        if x in self.constants:
            raise NotLowerable("it has a constant of its own for every token of a tile")
        new = self.env[x]
        own = self.own(dims_of(x))
        if len(own) == 1:
            return self.builder.rename(new, {TOKEN: roles[own[0]]})
        if len(own) == 2:
            return self.builder.rename(new, {self.pairs[x][d]: roles[d] for d in own})
        return new

    def renamed(self, node: fx.Node) -> Any:
        """A renaming: of tokens it says nothing, a value for every token is that under any name."""
        (before,), after = parse(spec_of(node))
        x = operands_of(node)[0]
        if x in self.constants:
            self.constants[node] = self.constants[x]
            return None
        if len(self.own(before)) == 2:
            self.pairs[node] = {
                b: self.pairs[x][a]
                for a, b in zip(before, after, strict=True)
                if a in self.pairs[x]
            }
        names = {a: b for a, b in zip(before, after, strict=True) if a not in self.names}
        return self.builder.rename(self.env[x], names)

    # -- constants -----------------------------------------------------------------------------------

    def product(self, node: fx.Node, known: list[fx.Node]) -> Any:
        """A product with a constant: a causal sum, the last token, or a mask."""
        if len(known) > 1:
            raise NotLowerable("it multiplies constants of tokens of a tile")
        (constant,) = known
        rest = [x for x in operands_of(node) if x is not constant]
        value, dims = self.constants[constant], dims_of(constant)
        if self.own(dims) != dims:
            raise NotLowerable("it has a constant of its own for every token of a tile")
        result = dims_of(node)
        if len(dims) == 1:
            end = torch.zeros_like(value)
            end[-1] = value[-1]
            if dims[0] in result or not torch.equal(end, value):
                raise NotLowerable("it picks a token of a tile that is not the last")
            roles = dict.fromkeys(self.own(tuple(d for x in rest for d in dims_of(x))), TOKEN)
            if len(roles) != 1:
                raise NotLowerable("it picks the last token for every token of a tile")
            operands = [self.operand(x, roles) for x in rest]
            whole = operands[0]
            if len(operands) > 1:
                have = dict.fromkeys(d for x in operands for d in dims_of(x))
                whole = self.builder.contraction(operands, tuple(have))
            new = self.builder.last(whole, TOKEN)
            new = self.builder.contraction([new], result)
            return self.scaled(new, float(value[-1]))
        pattern = _pattern(value)
        if pattern is None:
            raise NotLowerable("it weighs pairs of tokens of a tile by constants that are no mask")
        roles = self.roles(node)
        relation, factor = self.relation(dims, pattern, roles), pattern.factor
        operands = [self.operand(x, roles) for x in rest]
        names = tuple(roles.get(d, d) for d in result)
        if len(self.own(result)) == 2:
            new = self.builder.contraction(operands, tuple(d for d in names if d in {
                e for x in operands for e in dims_of(x)}))  # fmt: skip
            if len(dims_of(new)) < len(names):
                new = self.repeated(new, names)
            self.pairs[node] = roles
            return self.scaled(self.builder.masked(relation, new), factor)
        return self.scaled(self.builder.masked_contraction(relation, operands, names), factor)

    def masked(self, node: fx.Node) -> Any:
        """An elementwise function of a constant: a mask."""
        function, operands = head_of(node), list(operands_of(node))
        mask: Any = None
        if function == "where" and operands[0] in self.constants:
            pattern = _pattern(self.constants[operands[0]].to(torch.float64))
            inverse = _pattern((~self.constants[operands[0]].bool()).to(torch.float64))
            if operands[2] == 0 and pattern is not None:
                mask, value, dims = pattern, operands[1], dims_of(operands[0])
            elif operands[1] == 0 and inverse is not None:
                mask, value, dims = inverse, operands[2], dims_of(operands[0])
        elif function == "mul" and sum(x in self.constants for x in operands) == 1:
            constant = next(x for x in operands if x in self.constants)
            value, dims = next(x for x in operands if x is not constant), dims_of(constant)
            mask = _pattern(self.constants[constant])
        if mask is None or self.own(dims) != dims:
            raise NotLowerable("it has a constant of its own for every token of a tile")
        roles = self.roles(node)
        names = tuple(roles.get(d, d) for d in dims_of(node))
        new = self.operand(value, roles)
        if isinstance(new, fx.Node) and len(dims_of(new)) < len(names):
            new = self.repeated(new, names)
        if not isinstance(new, fx.Node):
            raise NotLowerable("it is a mask of tokens of a tile and nothing else")
        self.pairs[node] = roles
        return self.scaled(self.builder.masked(self.relation(dims, mask, roles), new), mask.factor)

    def relation(self, dims: Dims, pattern: _Pattern, roles: dict[str, str]) -> str:
        """The relation behind a constant ``[row, column]``."""
        row, column = (roles[d] for d in dims)
        earlier, later = (row, column) if pattern.upper else (column, row)
        return f"{earlier}{'<' if pattern.strict else '<='}{later}"

    def scaled(self, x: Any, factor: float) -> Any:
        return x if factor == 1.0 else self.builder.elementwise("mul", x, factor)


@dataclass(frozen=True)
class _Pattern:
    """A triangle of equal numbers: above the diagonal or below it, with it or without."""

    upper: bool
    strict: bool
    factor: float


def _pattern(value: torch.Tensor) -> _Pattern | None:
    value = value.to(torch.float64)
    if value.dim() != 2 or value.shape[0] != value.shape[1] or len(value) < 2:
        return None
    ones = torch.ones_like(value)
    for upper in (False, True):
        corner = value[0, -1] if upper else value[-1, 0]
        for strict in (False, True):
            triangle = ones.triu(int(strict)) if upper else ones.tril(-int(strict))
            if corner and torch.equal(value, corner * triangle):
                return _Pattern(upper, strict, float(corner))
    return None


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def tiles(body: Body, tile: Tile) -> Body:
    """The step of a tile as the body of a mini-batch; its arguments are those of the tokens, all of them.

    Raises:
        NotLowerable: where the tokens of a tile meet in a way that the IR has no form for, with the reason.
    """
    return _Tiles(body, tile).run()
