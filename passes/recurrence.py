"""Recurrence: the state at every token of a mini-batch, in closed form, as operators of a batched graph.

The system of :mod:`tttc.passes.affine` has one solution; with ``F`` the products of the own coefficients over
the tokens between s and t, and ``p`` those up to t::

    S_t = p_t S_0 + sum_{s<=t} F_ts u_s            F = running_product("s<=t", "t -> t s", beta)
    W_t = ... + sum_{r<=t} D_tr S_r                D = running_product("s<=t", "t -> t s", 1 - alpha)
        = ... + sum_{s<=t} (sum_r D_tr F_rs) u_s

The coefficient matrices have a number for every pair of tokens; no state is made for the sake of another's. They
are products, never quotients of products: a coefficient may be zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx
from tttc.passes.affine import System

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN
from tttc.ir.build import Builder, dims_of
from tttc.ir.spec import Dims

BETWEEN = f"{EARLIER}1"  # tokens between an earlier and a later one


def _relation(earlier: str, later: str, strict: bool) -> str:
    return f"{earlier}{'<' if strict else '<='}{later}"


@dataclass
class Response:
    """What a leaf at token t has of one that was added at token s.

    ``pairs``: a value ``[t, s, ...]``, zero where s does not reach t; None for one wherever it does. ``strict``:
    it reaches later tokens only.
    """

    pairs: fx.Node | None
    strict: bool


class Recurrence:
    """The solution of a system, written into a graph as far as it is asked for.

    Args:
        system: the updates of the one-token body.
        builder: of the batched graph.
        batched: the batched node of one of the step's.
        start: the batched graph's node of each carry at the start of the mini-batch.
        like: a floating value of that graph with the dimension ``t``: how many tokens there are.
    """

    def __init__(
        self,
        system: System,
        builder: Builder,
        batched: Callable[[Any], Any],
        start: dict[fx.Node, fx.Node],
        like: Callable[[], fx.Node],
    ) -> None:
        self.system = system
        self.builder = builder
        self.batched = batched
        self.start = start
        self.like = like
        self.memo: dict[Any, Any] = {}

    # -- the state ---------------------------------------------------------------------------------------

    def after(self, leaf: fx.Node) -> Any:
        """The leaf as each token leaves it."""
        update = self.system.update(leaf)
        if update.own == 0:
            parts = [self._times(c, self.batched(x)) for x, c in update.coupled.items()]
            return self._sum([*parts, self.added(leaf)], (TOKEN, *dims_of(leaf)))
        return self._value(leaf, strict=False)

    def before(self, leaf: fx.Node) -> Any:
        """The leaf as each token finds it."""
        return self._value(leaf, strict=True)

    def _value(self, leaf: fx.Node, strict: bool) -> Any:
        dims = (TOKEN, *dims_of(leaf))
        parts = []
        for source in self.system.carries:
            factor = self.of_start(leaf, source, strict)
            if not _is_zero(factor):
                start = self.start[source]
                parts.append(start if _is_number(factor) else self._product(factor, start))
            response = self.response(leaf, source, strict)
            added = self.added(source) if response is not None else 0
            if response is not None and not _is_zero(added):
                parts.append(self._spread(response, added, dims))
        return self._sum(parts, dims)

    def _spread(self, response: Response, added: Any, dims: Dims) -> Any:
        """What tokens so far have added, as each token has it."""
        relation = _relation(EARLIER, TOKEN, response.strict)
        if TOKEN in dims_of(added):
            earlier = self.builder.rename(added, {TOKEN: EARLIER})
            operands = [earlier] if response.pairs is None else [response.pairs, earlier]
            have = {d for x in operands for d in dims_of(x)}
            result = tuple(d for d in dims if d == TOKEN or d in have)
            return self.builder.masked_contraction(relation, operands, result)
        # Every token adds the same.
        pairs = self._pairs(response)
        result = tuple(d for d in dims_of(pairs) if d != EARLIER)
        return self._product(self.builder.masked_contraction(relation, [pairs], result), added)

    def added(self, leaf: fx.Node) -> Any:
        """What each token adds to a leaf, other leaves aside; 0 where nothing."""
        return self._once(("added", leaf), lambda: self._added(leaf))

    def _added(self, leaf: fx.Node) -> Any:
        parts = [self._times(c, self.batched(x)) for x, c in self.system.update(leaf).added.items()]
        have = {d for x in parts for d in dims_of(x)}
        return self._sum(parts, tuple(d for d in (TOKEN, *dims_of(leaf)) if d in have))

    # -- coefficients ------------------------------------------------------------------------------------

    def response(self, leaf: fx.Node, source: fx.Node, strict: bool) -> Response | None:
        """How what is added to ``source`` reaches ``leaf``; ``strict``: as a token finds it, not as it leaves it."""
        key = ("response", leaf, source, strict)
        return self._once(key, lambda: self._response(leaf, source, strict))

    def _response(self, leaf: fx.Node, source: fx.Node, strict: bool) -> Response | None:
        update = self.system.update(leaf)
        if leaf is source:
            return Response(self.run(leaf, strict), strict)
        total: Any = None
        for x, coefficient in update.coupled.items():
            other, becomes = self.system.leaf_of(x)
            inner = self.response(other, source, not becomes)
            if inner is not None:
                part = self._composed(leaf, strict, coefficient, inner)
                total = part if total is None else self.builder.elementwise("add", total, part)
        return None if total is None else Response(total, strict)

    def _composed(
        self, leaf: fx.Node, strict: bool, coefficient: sympy.Expr, inner: Response
    ) -> fx.Node:
        """Another leaf's response, handed on: ``sum_r F_tr a_r inner_rs``."""
        if self._made_anew(leaf, strict):
            return self._weighted(coefficient, TOKEN, self._pairs(inner))
        outer = self.run(leaf, strict)
        if outer is not None and inner.pairs is None:
            # inner_rs is one where s reaches r.
            weighted = self._weighted(coefficient, EARLIER, outer)
            operand = self.builder.rename(weighted, {EARLIER: BETWEEN})
            relation = _relation(EARLIER, BETWEEN, inner.strict)
            return self.builder.masked_contraction(relation, [operand], self._pair_dims(operand))
        rows = self._weighted(coefficient, TOKEN, self._pairs(inner))
        rows = self.builder.rename(rows, {TOKEN: BETWEEN})
        relation = _relation(BETWEEN, TOKEN, strict)
        operands = [rows]
        if outer is not None:
            operands.insert(0, self.builder.rename(outer, {EARLIER: BETWEEN}))
        return self.builder.masked_contraction(relation, operands, self._pair_dims(*operands))

    def _made_anew(self, leaf: fx.Node, strict: bool) -> bool:
        """Whether nothing of what the leaf was is left."""
        return not strict and self.system.update(leaf).own == 0

    @staticmethod
    def _pair_dims(*operands: fx.Node) -> Dims:
        features = [d for x in operands for d in dims_of(x) if d not in (TOKEN, EARLIER, BETWEEN)]
        return (TOKEN, EARLIER, *dict.fromkeys(features))

    def run(self, leaf: fx.Node, strict: bool) -> fx.Node | None:
        """The products of a leaf's own coefficient between tokens ``[t, s, ...]``; None where all are one."""
        own = self.system.update(leaf).own
        return None if own == 1 else self._running(own, strict, pairs=True)

    def _running(self, own: sympy.Expr, strict: bool, pairs: bool) -> fx.Node:
        def write() -> fx.Node:
            x = self._at(own, TOKEN)
            features = tuple(d for d in dims_of(x) if d != TOKEN)
            result = (TOKEN, EARLIER, *features) if pairs else (TOKEN, *features)
            return self.builder.running_product(_relation(EARLIER, TOKEN, strict), x, result)

        return self._once(("running", own, strict, pairs), write)

    def of_start(self, leaf: fx.Node, source: fx.Node, strict: bool) -> Any:
        """How much ``leaf`` has at each token of what ``source`` was at the start: a number or a value ``[t, ...]``."""
        key = ("start", leaf, source, strict)
        return self._once(key, lambda: self._of_start(leaf, source, strict))

    def _of_start(self, leaf: fx.Node, source: fx.Node, strict: bool) -> Any:
        update = self.system.update(leaf)
        if leaf is source:
            return 1 if update.own == 1 else self._running(update.own, strict, pairs=False)
        total: Any = 0
        for x, coefficient in update.coupled.items():
            other, becomes = self.system.leaf_of(x)
            inner = self.of_start(other, source, not becomes)
            if _is_zero(inner):
                continue
            if _is_number(inner):
                given = self._at(coefficient, TOKEN)
            else:
                given = self._weighted(coefficient, TOKEN, inner)
            part = given
            if not self._made_anew(leaf, strict):
                response = Response(self.run(leaf, strict), strict)
                operands = [x for x in (response.pairs, given) if x is not None]
                features = [d for x in operands for d in dims_of(x) if d not in (TOKEN, EARLIER)]
                part = self._spread(response, given, (TOKEN, *dict.fromkeys(features)))
            total = part if _is_zero(total) else self.builder.elementwise("add", total, part)
        return total

    # -- writing -----------------------------------------------------------------------------------------

    def _once(self, key: Any, write: Callable[[], Any]) -> Any:
        if key not in self.memo:
            self.memo[key] = write()
        return self.memo[key]

    def _at(self, coefficient: sympy.Expr, token: str) -> fx.Node:
        """A coefficient at every token, its token dimension called ``token``."""

        def write() -> fx.Node:
            x = self.system.coefficients.write(coefficient, self.builder, self.batched)
            if TOKEN in dims_of(x):
                features = tuple(d for d in dims_of(x) if d != TOKEN)
                return self.builder.contraction([x], (TOKEN, *features))
            return self.builder.call(ops.broadcast, (), (x, self.like()), (TOKEN, *dims_of(x)))

        node = self._once(("coefficient", coefficient), write)
        return self.builder.rename(node, {TOKEN: token})

    def _weighted(self, coefficient: sympy.Expr, token: str, x: fx.Node) -> fx.Node:
        """A value times a coefficient at each of its tokens ``token``."""
        return x if coefficient == 1 else self._product(self._at(coefficient, token), x)

    def _pairs(self, response: Response) -> fx.Node:
        """A response as a value for every pair of tokens."""
        if response.pairs is not None:
            return response.pairs
        return self._running(sympy.Integer(1), response.strict, pairs=True)

    def _times(self, coefficient: sympy.Expr, x: Any) -> Any:
        """A coefficient times a batched value."""
        factor = self.system.coefficients.write(coefficient, self.builder, self.batched)
        if _is_number(factor) and _is_number(x):
            return factor * x
        if _is_number(x) and x == 1:
            return factor
        if _is_number(factor) and factor == 1:
            return x
        if _is_number(factor) and factor == -1:
            return self.builder.elementwise("neg", x)
        return self._product(x, factor)

    def _product(self, x: Any, y: Any) -> Any:
        have = dict.fromkeys((*dims_of(x), *dims_of(y)))
        tokens = [d for d in (TOKEN, BETWEEN, EARLIER) if d in have]
        features = [d for d in have if d not in tokens]
        return self.builder.elementwise("mul", x, y, result=(*tokens, *features))

    def _sum(self, parts: list[Any], dims: Dims) -> Any:
        total: Any = 0
        for x in parts:
            if _is_zero(total) or (_is_number(total) and _is_number(x)):
                total = x + total if _is_number(x) else x
            elif not _is_zero(x):
                have = {*dims_of(total), *dims_of(x)}
                result = tuple(d for d in dims if d in have)
                total = self.builder.elementwise("add", total, x, result=result)
        return total


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float))


def _is_zero(x: Any) -> bool:
    return _is_number(x) and x == 0
