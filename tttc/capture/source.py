"""Loops over tokens in the source of a function, and the function with something else in their place.

Before::

    for t in range(T):
        W = W - grad(W, k[:, t])
        outs.append(q[:, t] @ W)
    return torch.stack(outs, 1)

After (``site`` is what became of the loop)::

    choice = site.choose((0, T, 1), (W, k, q, outs))
    if choice >= 0:
        W, outs = site.plans[choice].run((0, T, 1), W, k, q, outs)
    elif choice == EAGER:
        W, outs = site.eagerly((0, T, 1), W, k, q, outs)
    else:
        for t in range(T): ...  # as it was
    return site.joined(torch.stack, outs, 1)
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterable, Sequence
from typing import Any

from tttc.capture import layout
from tttc.capture.candidates import SEQUENCES, candidates, items_of, sizes_in, within_enumerate
from tttc.capture.from_nothing import binds_from_nothing, is_from_nothing
from tttc.capture.loop_source import LoopSource
from tttc.capture.names import calls, is_call_of, is_method, names_of, own_names, sequence
from tttc.capture.nested import flatten_nests
from tttc.capture.replace import Replace, copied
from tttc.capture.statements import (
    count_stores,
    free_names,
    is_repeated,
    joined_names,
    read_first,
    refusal,
    takes_several,
)


class Rewritten:
    """A function whose loops over tokens were found.

    Attributes:
        loops: what was found, outermost loops only.
    """

    def __init__(self, function: types.FunctionType) -> None:
        self.function = function
        self.loops: list[LoopSource] = []
        self.file = function.__code__.co_filename
        tree = _parse(function)
        if tree is None:
            return
        self.tree = tree
        known = sizes_in(tree)
        if flatten_nests(tree, candidates(tree.body, known)):
            known = sizes_in(tree)
        for i, statement in enumerate(candidates(tree.body, known)):
            loop = LoopSource(
                statement, f"{self.file}:{statement.lineno}", function.__qualname__, i
            )
            self._describe(loop, known)
            self.loops.append(loop)

    # -- analysis -----------------------------------------------------------------------------------

    def _describe(self, loop: LoopSource, known: set[str]) -> None:
        node, code = loop.statement, self.function.__code__
        local = {*code.co_varnames, *code.co_cellvars}
        local |= {n for n in names_of([self.tree], ast.Store) if n.startswith("__tttc_")}
        loop.refusal = refusal(node)
        if self.tree.decorator_list and loop.refusal is None:
            loop.refusal = f"{self.function.__qualname__} is decorated"
        arguments = self.tree.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        before = {a.arg for a in every} | {
            a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None
        }
        loop.made = names_of([self.tree], ast.Store)
        defined: dict[str, ast.stmt] = {}
        after: set[str] = set()
        uses: dict[str, list[ast.AST]] = {}
        inside = {id(n) for n in ast.walk(node)}
        around = is_repeated(self.tree, node)
        own = {id(n) for n in own_names(self.tree)}
        for n in ast.walk(self.tree):
            if id(n) in inside or not hasattr(n, "lineno"):
                continue
            early = n.lineno < node.lineno
            if isinstance(n, ast.FunctionDef) and n is not self.tree and early:
                defined[n.name] = n
            elif isinstance(n, ast.Assign) and isinstance(n.value, ast.Lambda) and early:
                defined |= {x.id: n for x in n.targets if isinstance(x, ast.Name)}
            if isinstance(n, ast.Name) and id(n) in own:
                if isinstance(n.ctx, ast.Store) and early:
                    before.add(n.id)
                elif isinstance(n.ctx, ast.Load) and (not early or around):
                    after.add(n.id)
                    uses.setdefault(n.id, []).append(n)
        # What is made from numbers alone, a mask say, is made again inside: its values are known there.
        for n in self.tree.body:
            if n.lineno < node.lineno and isinstance(n, ast.Assign) and len(n.targets) == 1:
                target: Any = n.targets[0]
                made = isinstance(target, ast.Name) and is_from_nothing(n.value, defined)
                if made and count_stores(self.tree, target.id) == 1:
                    defined[target.id] = n
        # Functions defined on the way see the loop's variables: the iteration defines them again.
        helpers: list[ast.stmt] = []
        names = names_of([node.target, *node.body], ast.Load, ast.Store, ast.Del)
        todo = [x for x in names if x in defined]
        while todo:
            statement = defined[todo.pop()]
            if statement not in helpers:
                helpers.append(statement)
                more = free_names(statement) - names
                names |= more
                todo += [x for x in more if x in defined]
        helpers.sort(key=lambda s: s.lineno)
        names |= {name for name, s in defined.items() if s in helpers}
        for s in defined.values():
            after |= free_names(s)
        stored = names_of([node.target, *node.body], ast.Store) & local
        appended = {
            n.func.value.id
            for n in ast.walk(node)
            if isinstance(n, ast.Call)
            and isinstance(n.func, ast.Attribute)
            and n.func.attr == "append"
            and isinstance(n.func.value, ast.Name)
        } & local
        self._iterate(loop, known)
        sources = [name for name, _, _ in loop.sources]
        again = {x for x, s in defined.items() if s in helpers and binds_from_nothing(s)}
        loop.inputs = sorted(names & local & before - set(sources) - again) + sources
        loop.beside = sorted((names | names_of([node.iter], ast.Load)) & local & before)
        # A last iteration that takes fewer tokens goes on from what the others leave.
        left = read_first(node) & stored & before if takes_several(node) else set()
        loop.results = sorted((stored | appended) & (after | left))
        joins = joined_names(self.tree)
        for name in appended:
            if uses.get(name) and all(id(u) in joins for u in uses[name]):
                loop.joined.add(name)
        self._outline(loop, helpers, sorted((names & local) - set(sources)))

    def _iterate(self, loop: LoopSource, known: set[str]) -> None:
        """The loop as one over ``range(start, stop, step)``; sequences of tensors are indexed by it."""
        iterator: Any = loop.statement.iter
        if is_call_of(iterator, "range"):
            a = iterator.args
            zero, one = ast.Constant(0), ast.Constant(1)
            full = [zero, a[0], one] if len(a) == 1 else [a[0], a[1], a[2] if len(a) > 2 else one]
            loop.bounds = ast.Tuple(full, ast.Load())
            return
        if is_call_of(iterator, "enumerate"):
            iterator = iterator.args[0]
        for i, item in enumerate(items_of(iterator, known) or []):
            name = f"__tttc_source_{loop.index}_{i}"
            if is_method(item, SEQUENCES):
                loop.sources.append((name, sequence(item), None))
            else:
                loop.sources.append((name, item, None))

    # -- one iteration, and the whole loop, as functions --------------------------------------------

    def _outline(self, loop: LoopSource, helpers: list[ast.stmt], names: list[str]) -> None:
        node = loop.statement
        sources = [name for name, _, _ in loop.sources]
        variable = "__tttc_n" if sources else "__tttc_value"
        target: ast.expr = ast.Name(variable, ast.Load())
        if sources:
            items: list[ast.expr] = [
                calls("__tttc_item", ast.Name(s, ast.Load()), ast.Name(variable, ast.Load()))
                for s in sources
            ]
            target = items[0]
            if is_call_of(within_enumerate(node.iter), "zip"):
                target = ast.Tuple(items, ast.Load())
            if is_call_of(node.iter, "enumerate"):
                target = ast.Tuple([ast.Name(variable, ast.Load()), target], ast.Load())
        once = ast.For(node.target, ast.Tuple([target], ast.Load()), node.body, [])
        ast.copy_location(once, node)
        loop.once, loop.variable = once, variable
        unbound = [_if_unbound(name) for name in names if name not in loop.inputs]
        body = [*unbound, *helpers, once, ast.Return(calls("locals"))]
        arguments = [variable, *names, *sources]
        loop.body = self._function("__tttc_body", arguments, body, {})
        whole = [
            *helpers,
            node,
            ast.Return(ast.Tuple([ast.Name(x, ast.Load()) for x in loop.results], ast.Load())),
        ]
        loop.eager = self._function("__tttc_eager", loop.beside, whole, {})

    def _function(
        self,
        name: str,
        arguments: list[str],
        body: Sequence[ast.stmt],
        injected: dict[str, Any],
    ) -> types.FunctionType:
        made = _definition(name, arguments, body)
        return self._compiled(ast.copy_location(made, self.tree), name, injected)

    def _compiled(
        self, tree: ast.FunctionDef, name: str, injected: dict[str, Any]
    ) -> types.FunctionType:
        """A function in the place of the original: its globals, its closure, its file and lines."""
        free = list(self.function.__code__.co_freevars)
        body = [tree, ast.Return(ast.Name(tree.name, ast.Load()))]
        injected = {**injected, **_HELPERS}
        factory = _definition("__tttc_factory", [*injected, *free], body)
        ast.copy_location(factory, self.tree)
        module = ast.fix_missing_locations(ast.Module([factory], []))
        outer = next(
            c for c in compile(module, self.file, "exec").co_consts if isinstance(c, types.CodeType)
        )
        code = next(
            c for c in outer.co_consts if isinstance(c, types.CodeType) and c.co_name == tree.name
        )
        cells = dict(zip(free, self.function.__closure__ or (), strict=True))
        cells |= {k: types.CellType(v) for k, v in injected.items()}
        closure = tuple(cells[x] for x in code.co_freevars)
        made = types.FunctionType(
            code, self.function.__globals__, name, self.function.__defaults__, closure
        )
        if tree.name == self.tree.name:
            made.__kwdefaults__ = self.function.__kwdefaults__
            made.__dict__.update(self.function.__dict__)
            made.__qualname__ = self.function.__qualname__
            made.__module__ = self.function.__module__
            made.__doc__ = self.function.__doc__
        else:
            made.__defaults__ = None
        return made

    def with_sites(self, sites: Sequence[Any]) -> types.FunctionType:
        """The function with its loops replaced by what became of them."""
        injected = {
            f"__tttc_site_{loop.index}": s for loop, s in zip(self.loops, sites, strict=True)
        }
        lists = {name for loop in self.loops for name in loop.joined}
        replaced = {id(loop.statement): loop for loop in self.loops}
        tree = Replace(replaced, lists).visit(copied(self.tree, replaced))
        tree.decorator_list = []
        return self._compiled(tree, self.function.__name__, injected)


def item(source: Any, n: int) -> Any:
    """The n-th of a sequence of tensors, or of a tensor along its first dimension."""
    return source[n]


_HELPERS: dict[str, Any] = {
    "__tttc_joined": layout.joined,
    "__tttc_item": item,
    "__tttc_unbind": layout.unbound,
    "__tttc_split": layout.pieces_of,
    "__tttc_chunk": layout.chunks_of,
}


def _definition(name: str, arguments: list[str], body: Sequence[ast.stmt]) -> ast.FunctionDef:
    made = ast.FunctionDef(name, _arguments(arguments), list(body), [])
    made.type_params = []  # type: ignore[attr-defined]  # asked for by Python 3.12
    return made


def _if_unbound(name: str) -> ast.stmt:
    """Unbound variables come as ``...``, and are unbound again."""
    return ast.If(
        ast.Compare(ast.Name(name, ast.Load()), [ast.Is()], [ast.Constant(...)]),
        [ast.Delete([ast.Name(name, ast.Del())])],
        [],
    )


def _arguments(names: Iterable[str]) -> ast.arguments:
    return ast.arguments(
        posonlyargs=[], args=[ast.arg(n) for n in names], kwonlyargs=[], kw_defaults=[], defaults=[]
    )


def _parse(function: types.FunctionType) -> ast.FunctionDef | None:
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return None
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        return None
    ast.increment_lineno(tree, first - 1)
    return tree.body[0]
