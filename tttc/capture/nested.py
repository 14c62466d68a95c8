"""Loops over tokens inside loops over mini-batches, as one loop over tokens.

Before::

    for i in range(0, T, b):
        anchor = W
        for t in range(i, min(i + b, T)):
            W = W - grad(anchor, k[:, t])
            outs.append(q[:, t] @ W)

After (``m`` is the mini-batch, ``j`` the place in it; what the outer loop reads of values that change inside is kept in
``at_W`` as it was at the start of the mini-batch)::

    i = 0; at_W = W; anchor = at_W
    size = len(range(i, min(i + b, T)))
    for n in range(total):
        m, j = n // size, n % size
        i = 0 + m * b
        if j == 0 and m > 0:
            at_W = W
        anchor = at_W
        t = range(i, min(i + b, T))[j]
        W = W - grad(anchor, k[:, t])
        outs.append(q[:, t] @ W)

What the outer loop does after the inner one happens where the next mini-batch starts, and once more at the end.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tttc.capture.names import calls, is_call_of, is_method, names_of, sequence


@dataclass
class _Nest:
    """A loop with one loop over tokens inside it."""

    outer: ast.For
    before: list[ast.stmt]
    inner: ast.For
    after: list[ast.stmt]


def flatten_nests(tree: ast.FunctionDef, candidates: Sequence[ast.For]) -> bool:
    """Make one loop of each loop among ``candidates`` that has a loop over its tokens inside; in place."""
    found = False
    for number, outer in enumerate(candidates):
        nest = _nest(outer)
        if nest is None:
            continue
        _replace(tree, outer, _Flat(tree, nest, number).statements())
        found = True
    return found


def _nest(outer: ast.For) -> _Nest | None:
    loops: list[Any] = [s for s in outer.body if isinstance(s, (ast.For, ast.While))]
    if outer.orelse or len(loops) != 1 or not isinstance(loops[0], ast.For):
        return None
    (inner,) = loops
    at = outer.body.index(inner)
    before = [x for s in outer.body[:at] for x in _apart(s)]
    nest = _Nest(outer, before, inner, outer.body[at + 1 :])
    leaves = (ast.Break, ast.Continue, ast.Return, ast.Yield, ast.YieldFrom, ast.Await)
    around = [n for s in (*nest.before, *nest.after) for n in ast.walk(s)]
    if inner.orelse or any(isinstance(n, leaves) for n in around):
        return None
    if any(isinstance(n, (ast.Break, ast.Return)) for n in ast.walk(inner)):
        return None
    simple = is_call_of(inner.iter, "range") or _sequences(inner.iter) is not None
    if not simple or not (is_call_of(outer.iter, "range") or _sequences(outer.iter) is not None):
        return None
    return nest if _over_its_tokens(nest) else None


def _apart(statement: ast.stmt) -> list[ast.stmt]:
    """``a, b = x, y`` as two statements, where it says the same."""
    if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1):
        return [statement]
    target, value = statement.targets[0], statement.value
    if not (isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)):
        return [statement]
    if len(target.elts) != len(value.elts) or (
        names_of([target], ast.Store) & names_of([value], ast.Load)
    ):
        return [statement]
    return [
        ast.copy_location(ast.Assign([a], b), statement)
        for a, b in zip(target.elts, value.elts, strict=True)
    ]


def _over_its_tokens(nest: _Nest) -> bool:
    """Whether what the inner loop reads moves with the outer one: a loop over heads or steps does not."""
    moved = names_of([nest.outer.target], ast.Store)
    for statement in nest.before:
        if names_of([statement], ast.Load) & moved:
            moved |= names_of([statement], ast.Store)
    if names_of([nest.inner.iter], ast.Load) & moved:
        return True
    own = names_of([nest.inner.target], ast.Store)
    for n in (n for s in nest.inner.body for n in ast.walk(s)):
        if not isinstance(n, ast.Subscript) or not names_of([n.slice], ast.Load) & own:
            continue
        if names_of([n.value], ast.Load) & moved:
            return True
        sums = (x for x in ast.walk(n.slice) if isinstance(x, ast.BinOp))
        if any(names_of([x], ast.Load) & own and names_of([x], ast.Load) & moved for x in sums):
            return True
    return False


def _sequences(iterator: Any) -> list[ast.expr] | None:
    """What a loop runs over that is no range: tensors and their pieces, one or several."""
    if is_call_of(iterator, "zip"):
        return list(iterator.args) if iterator.args else None
    if is_method(iterator, ("unbind", "split", "chunk")) or isinstance(iterator, ast.Name):
        return [iterator]
    return None


class _Flat:
    """One nest, as the statements that stand in its place."""

    def __init__(self, tree: ast.FunctionDef, nest: _Nest, number: int) -> None:
        self.tree, self.nest, self.number = tree, nest, number
        self.changed = names_of([nest.inner.target, *nest.inner.body, *nest.after], ast.Store)
        self.lists = self._lists()
        gone = {id(s) for pair in self.lists for s in pair}
        self.before = [s for s in nest.before if id(s) not in gone]
        self.after = [s for s in nest.after if id(s) not in gone]
        self.kept = sorted(
            names_of([s for s in self.before if not self.at_start(s)], ast.Load)
            & (self.changed | names_of([s for s in self.before if self.at_start(s)], ast.Store))
        )
        self.sources: dict[str, ast.expr] = {}

    def name(self, what: str) -> str:
        return f"__tttc_{what}_{self.number}"

    def load(self, what: str) -> ast.expr:
        return ast.Name(self.name(what), ast.Load())

    def at_start(self, statement: ast.stmt) -> bool:
        """Whether a statement before the inner loop sets what that changes: it is for the first token alone."""
        return bool(names_of([statement], ast.Store) & self.changed)

    def statements(self) -> list[ast.stmt]:
        """The statements, at the lines of the outer loop, the inner one, and after it."""
        nest = self.nest
        outer_at, outer_count, outer_setup = self.sequence(nest.outer, "outer", first=True)
        inner_at, inner_count, inner_setup = self.sequence(nest.inner, "inner", first=False)
        keep = [_assign(self.name(f"at_{v}"), ast.Name(v, ast.Load())) for v in self.kept]
        lists = [start for start, _ in self.lists]
        opening: list[ast.stmt] = [
            *lists,
            *outer_setup,
            _assign(self.name("batches"), outer_count),
            _assign(self.name("batch"), ast.Constant(0)),
            ast.Assign([nest.outer.target], outer_at),
            *keep,
            *self.before,
            *inner_setup,
            _assign(self.name("size"), inner_count),
        ]
        # How long the last mini-batch is.
        counting = [
            _assign(self.name("batch"), _binary(self.load("batches"), ast.Sub(), 1)),
            ast.Assign([nest.outer.target], outer_at),
            *(self.always(s) for s in self.before if not self.at_start(s) and self.matters(s)),
            *inner_setup,
            _assign(
                self.name("total"),
                ast.BinOp(
                    ast.BinOp(self.load("batch"), ast.Mult(), self.load("size")),
                    ast.Add(),
                    inner_count,
                ),
            ),
        ]
        again = [
            _assign(self.name("batch"), ast.Constant(0)),
            ast.Assign([nest.outer.target], outer_at),
            *(self.always(s) for s in self.before if not self.at_start(s) and self.matters(s)),
        ]
        number = self.load("number")
        renewal: list[ast.stmt] = [*self.after, *keep]
        body: list[ast.stmt] = [
            _assign(self.name("batch"), ast.BinOp(number, ast.FloorDiv(), self.load("size"))),
            _assign(self.name("place"), ast.BinOp(number, ast.Mod(), self.load("size"))),
            ast.Assign([nest.outer.target], outer_at),
        ]
        starting = ast.BoolOp(
            ast.And(),
            [
                ast.Compare(self.load("place"), [ast.Eq()], [ast.Constant(0)]),
                ast.Compare(self.load("batch"), [ast.Gt()], [ast.Constant(0)]),
            ],
        )
        # Statements after the inner loop belong to the mini-batch before.
        if renewal:
            if self.after:
                previous = ast.Assign([nest.outer.target], outer_at)
                renewal = [
                    _assign(self.name("batch"), _binary(self.load("batch"), ast.Sub(), 1)),
                    previous,
                    *self.after,
                    _assign(self.name("batch"), _binary(self.load("batch"), ast.Add(), 1)),
                    ast.Assign([nest.outer.target], outer_at),
                    *keep,
                ]
            body.append(ast.If(starting, renewal, []))
        for s in self.before:
            body.append(ast.If(starting, [s], []) if self.at_start(s) else self.always(s))
        body += inner_setup
        body.append(ast.Assign([nest.inner.target], inner_at))
        flat = ast.For(
            ast.Name(self.name("number"), ast.Store()),
            calls("range", ast.Constant(0), self.load("total")),
            [*body, *nest.inner.body],
            [],
        )
        ending = [*self.after, *(end for _, end in self.lists)]
        return [
            *_at(nest.outer, [*opening, *counting, *again]),
            *_at(nest.inner, [flat]),
            *_after(nest.inner, ending),
        ]

    def matters(self, statement: ast.stmt) -> bool:
        """Whether how many tokens a mini-batch has may depend on a statement."""
        wanted = names_of([self.nest.inner.iter], ast.Load)
        for s in reversed(self.before):
            if names_of([s], ast.Store) & wanted:
                wanted |= names_of([s], ast.Load)
        return bool(names_of([statement], ast.Store) & wanted)

    def always(self, statement: ast.stmt) -> ast.stmt:
        """A statement as every token runs it: on what changes inside, as it was at the start."""
        kept = {v: self.name(f"at_{v}") for v in self.kept}
        return _Renamed(kept).visit(copy.deepcopy(statement))

    def sequence(
        self, loop: ast.For, which: str, first: bool
    ) -> tuple[ast.expr, ast.expr, list[ast.stmt]]:
        """The value of a loop's variable in the iteration at hand, how many there are, and what must be set up."""
        at = self.load("batch" if first else "place")
        iterator: Any = loop.iter
        if is_call_of(iterator, "range"):
            a = iterator.args
            start = a[0] if len(a) > 1 else ast.Constant(0)
            value: ast.expr = at
            if len(a) > 2:
                value = ast.BinOp(at, ast.Mult(), a[2])
            if len(a) > 1:
                value = ast.BinOp(start, ast.Add(), value)
            return value, calls("len", iterator), []
        given = _sequences(iterator) or []
        setup: list[ast.stmt] = []
        items: list[ast.expr] = []
        for i, x in enumerate(given):
            name = self.name(f"{which}_{i}")
            setup.append(_assign(name, sequence(x) if isinstance(x, ast.Call) else x))
            items.append(calls("__tttc_item", ast.Name(name, ast.Load()), at))
        item: ast.expr = ast.Tuple(items, ast.Load()) if is_call_of(iterator, "zip") else items[0]
        counts = [
            calls("len", ast.Name(self.name(f"{which}_{i}"), ast.Load())) for i in range(len(given))
        ]
        return item, counts[0] if len(counts) == 1 else calls("min", *counts), setup

    def _lists(self) -> list[tuple[ast.stmt, ast.stmt]]:
        """Lists of one mini-batch, started before the inner loop and stacked after it onto another that is only
        concatenated along the same dimension: as good as one list for all tokens.
        """
        found: list[tuple[ast.stmt, ast.stmt]] = []
        for start in self.nest.before:
            if not (
                isinstance(start, ast.Assign)
                and isinstance(start.value, ast.List)
                and not start.value.elts
                and isinstance(start.targets[0], ast.Name)
            ):
                continue
            name = start.targets[0].id
            for end in self.nest.after:
                call = end.value if isinstance(end, ast.Expr) else None
                if not (isinstance(call, ast.Call) and is_method(call, ("append",)) and call.args):
                    continue
                stack, onto = call.args[0], call.func.value  # type: ignore[attr-defined]
                if not (is_method(stack, ("stack",)) and isinstance(onto, ast.Name)):
                    continue
                stacked: Any = stack.args[0]  # type: ignore[attr-defined]
                own = isinstance(stacked, ast.Name) and stacked.id == name
                if own and self._concatenated(onto.id, _dim(stack)):
                    found.append((start, end))
        return found

    def _concatenated(self, name: str, dim: Any) -> bool:
        """Whether a list is only ever concatenated along a dimension, appended to in this nest apart."""
        inside = {id(n) for n in ast.walk(self.nest.outer)}
        nodes: list[Any] = list(ast.walk(self.tree))
        joins = {
            id(n.args[0])
            for n in nodes
            if is_method(n, ("cat", "concat")) and n.args and _dim(n) == dim
        }
        uses = [
            n for n in nodes
            if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) and id(n) not in inside
        ]  # fmt: skip
        return bool(uses) and all(id(n) in joins for n in uses)


def _dim(call: Any) -> Any:
    """The dimension that a call of ``torch.stack`` or ``torch.cat`` names, as source."""
    given = call.args[1] if len(call.args) > 1 else None
    for k in call.keywords:
        if k.arg in ("dim", "axis"):
            given = k.value
    return "0" if given is None else ast.dump(given).replace("Constant(value=0)", "0")


class _Renamed(ast.NodeTransformer):
    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        if isinstance(node.ctx, ast.Load) and node.id in self.names:
            return ast.copy_location(ast.Name(self.names[node.id], node.ctx), node)
        return node


def _assign(name: str, value: ast.expr) -> ast.stmt:
    return ast.Assign([ast.Name(name, ast.Store())], value)


def _binary(x: ast.expr, op: ast.operator, y: int) -> ast.expr:
    return ast.BinOp(x, op, ast.Constant(y))


def _at(node: ast.stmt, statements: Iterable[ast.stmt]) -> list[ast.stmt]:
    """The statements at a line of the source; each a copy of its own."""
    out = []
    for s in statements:
        s = copy.deepcopy(s)
        for n in ast.walk(s):
            if isinstance(n, (ast.expr, ast.stmt)) and not hasattr(n, "lineno"):
                ast.copy_location(n, node)
        out.append(s)
    if out and not isinstance(out[0], ast.For):
        for s in out:
            s.lineno = node.lineno
            for n in ast.walk(s):
                if isinstance(n, (ast.expr, ast.stmt)):
                    n.lineno = n.end_lineno = node.lineno
    return out


def _after(node: ast.stmt, statements: Iterable[ast.stmt]) -> list[ast.stmt]:
    return [copy.deepcopy(s) for s in statements]


def _replace(tree: ast.AST, old: ast.stmt, new: list[ast.stmt]) -> None:
    for n in ast.walk(tree):
        for _, value in ast.iter_fields(n):
            if isinstance(value, list) and any(x is old for x in value):
                at = next(i for i, x in enumerate(value) if x is old)
                value[at : at + 1] = new
                return
