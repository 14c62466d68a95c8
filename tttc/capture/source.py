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
import linecache
import textwrap
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tttc.capture import layout
from tttc.capture.names import calls, is_call_of, is_method, names_of, own_names, sequence
from tttc.capture.nested import flatten_nests

JOINS = ("stack", "cat", "concat", "concatenate", "hstack", "vstack")
_SEQUENCES = ("unbind", "split", "chunk")
_SHAPES = ("shape", "size")


@dataclass
class LoopSource:
    """One loop: its statement, and the variables that go into it and come out of it."""

    statement: ast.For
    where: str  # file:line
    function: str
    index: int
    inputs: list[str] = field(default_factory=list)  # bound before it, used inside
    beside: list[str] = field(default_factory=list)  # what the whole loop needs to run as it is
    made: set[str] = field(default_factory=set)  # bound anew by every call
    results: list[str] = field(default_factory=list)  # bound or appended to inside, used afterwards
    joined: set[str] = field(default_factory=set)  # lists that are only ever stacked afterwards
    sources: list[tuple[str, ast.expr, ast.expr | None]] = field(default_factory=list)
    bounds: ast.expr | None = None  # (start, stop, step)
    body: Callable[..., dict[str, Any]] | None = None  # one iteration: variables in, variables out
    eager: Callable[..., Any] | None = None
    once: ast.For | None = None  # the statement, for one value of the loop variable
    variable: str = ""  # that value, or its number where the loop runs over sequences
    refusal: str | None = None


def _free(statement: ast.stmt) -> set[str]:
    """What a function defined on the way reads of the function around it."""
    own = names_of([statement], ast.Store) if isinstance(statement, ast.FunctionDef) else set()
    own |= {a.arg for a in ast.walk(statement) if isinstance(a, ast.arg)}
    return names_of([statement], ast.Load) - own


def _sizes(tree: ast.FunctionDef) -> set[str]:
    """Names whose values come from sizes of tensors, or from the caller."""
    arguments = tree.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    found = {a.arg for a in every if a.arg != "self"}
    for _ in range(3):
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and _from_sizes(node.value, found):
                found |= names_of(node.targets, ast.Store)
    return found


def _from_sizes(node: ast.AST, known: set[str]) -> bool:
    for n in ast.walk(node):
        if isinstance(n, ast.Attribute) and n.attr in _SHAPES:
            return True
        if isinstance(n, ast.Name) and (n.id in known or n.id == "len"):
            return True
    return False


def _items(iterator: ast.expr, known: set[str]) -> list[ast.expr] | None:
    """The sequences of tensors that a loop runs over, if it does."""
    if is_call_of(iterator, "zip"):
        parts = [_items(x, known) for x in iterator.args]  # type: ignore[attr-defined]
        if not parts or any(p is None or len(p) != 1 for p in parts):
            return None
        return [p[0] for p in parts if p is not None]
    if is_method(iterator, _SEQUENCES):
        return [iterator]
    if isinstance(iterator, ast.Name) and iterator.id in known:
        return [iterator]
    if is_method(iterator, ("transpose", "permute", "movedim")):
        return [iterator]
    return None


def _candidates(statements: Sequence[ast.stmt], known: set[str]) -> list[ast.For]:
    """The outermost loops that may run over tokens."""
    found: list[ast.For] = []
    for node in statements:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if isinstance(node, ast.For) and _may_run_over_tokens(node, known):
            found.append(node)
            continue
        for name in ("body", "orelse", "finalbody"):
            found += _candidates(getattr(node, name, []), known)
    return found


def _may_run_over_tokens(node: ast.For, known: set[str]) -> bool:
    iterator = node.iter
    if is_call_of(iterator, "range"):
        return any(_from_sizes(a, known) for a in iterator.args)  # type: ignore[attr-defined]
    if is_call_of(iterator, "enumerate") and iterator.args:  # type: ignore[attr-defined]
        iterator = iterator.args[0]  # type: ignore[attr-defined]
    return _items(iterator, known) is not None


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
        known = _sizes(tree)
        if flatten_nests(tree, _candidates(tree.body, known)):
            known = _sizes(tree)
        for i, statement in enumerate(_candidates(tree.body, known)):
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
        loop.refusal = _refusal(node)
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
        around = _repeats(self.tree, node)
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
                made = isinstance(target, ast.Name) and _from_nothing(n.value, defined)
                if made and _stores(self.tree, target.id) == 1:
                    defined[target.id] = n
        # Functions defined on the way see the loop's variables: the iteration defines them again.
        helpers: list[ast.stmt] = []
        names = names_of([node.target, *node.body], ast.Load, ast.Store, ast.Del)
        todo = [x for x in names if x in defined]
        while todo:
            statement = defined[todo.pop()]
            if statement not in helpers:
                helpers.append(statement)
                more = _free(statement) - names
                names |= more
                todo += [x for x in more if x in defined]
        helpers.sort(key=lambda s: s.lineno)
        names |= {name for name, s in defined.items() if s in helpers}
        for s in defined.values():
            after |= _free(s)
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
        again = {x for x, s in defined.items() if s in helpers and _from_nothing_at(s)}
        loop.inputs = sorted(names & local & before - set(sources) - again) + sources
        loop.beside = sorted((names | names_of([node.iter], ast.Load)) & local & before)
        # A last iteration that takes fewer tokens goes on from what the others leave.
        left = _read_first(node) & stored & before if _takes_several(node) else set()
        loop.results = sorted((stored | appended) & (after | left))
        joins = _joins(self.tree)
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
        for i, item in enumerate(_items(iterator, known) or []):
            name = f"__tttc_source_{loop.index}_{i}"
            if is_method(item, _SEQUENCES):
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
            if is_call_of(_inner(node.iter), "zip"):
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
        tree = _Replace(replaced, lists).visit(_copied(self.tree, replaced))
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


def _inner(iterator: Any) -> ast.expr:
    return iterator.args[0] if is_call_of(iterator, "enumerate") else iterator


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


def _refusal(node: ast.For) -> str | None:
    """Why a loop can't be taken out of its function, if it can't."""
    if node.orelse:
        return "it has an else"
    if _leaves(node.body):
        return "it may stop early"
    for n in ast.walk(node):
        if isinstance(n, (ast.Yield, ast.YieldFrom, ast.Await)):
            return "it yields"
        if isinstance(n, (ast.Global, ast.Nonlocal)):
            return "it assigns variables of another function"
    return None


def _leaves(statements: Sequence[ast.stmt], nested: bool = False) -> bool:
    for s in statements:
        if isinstance(s, (ast.FunctionDef, ast.ClassDef)):
            continue
        if isinstance(s, ast.Return) or (isinstance(s, ast.Break) and not nested):
            return True
        inner = nested or isinstance(s, (ast.For, ast.While))
        if any(_leaves(getattr(s, x, []), inner) for x in ("body", "orelse", "finalbody")):
            return True
    return False


def _repeats(tree: ast.AST, node: ast.For) -> bool:
    """Whether the loop is itself inside another."""
    return any(
        isinstance(n, (ast.For, ast.While))
        and n is not node
        and any(m is node for m in ast.walk(n))
        for n in ast.walk(tree)
    )


_FACTORIES = (
    "ones",
    "zeros",
    "full",
    "eye",
    "arange",
    "new_ones",
    "new_zeros",
    "new_full",
    "ones_like",
)
_CHANGES = (
    "tril",
    "triu",
    "bool",
    "to",
    "float",
    "double",
    "logical_not",
    "unsqueeze",
    "type_as",
    "t",
)


def _from_nothing(node: ast.AST, defined: dict[str, ast.stmt]) -> bool:
    """Whether an expression makes a tensor from numbers alone: a factory, and what changes its values."""
    if isinstance(node, ast.Name):
        return node.id in defined
    if isinstance(node, ast.UnaryOp):
        return _from_nothing(node.operand, defined)
    if isinstance(node, ast.Compare):
        return all(
            isinstance(x, ast.Constant) or _from_nothing(x, defined)
            for x in (node.left, *node.comparators)
        ) and not isinstance(node.left, ast.Constant)
    if isinstance(node, ast.Subscript):
        return _from_nothing(node.value, defined)
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
    if node.func.attr in _FACTORIES:
        return of_torch or node.func.attr.startswith("new_")
    if node.func.attr in _CHANGES:
        return _from_nothing(node.args[0] if of_torch and node.args else node.func.value, defined)
    return False


def _from_nothing_at(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and not isinstance(statement.value, ast.Lambda)


def _stores(tree: ast.AST, name: str) -> int:
    return sum(
        isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store)
        for n in ast.walk(tree)
    )


def _takes_several(node: ast.For) -> bool:
    """Whether an iteration may take several tokens: the last one then takes what is left."""
    iterator = _inner(node.iter)
    if is_call_of(iterator, "range"):
        return len(iterator.args) > 2  # type: ignore[attr-defined]
    every = iterator.args if is_call_of(iterator, "zip") else [iterator]  # type: ignore[attr-defined]
    return any(is_method(x, ("split", "chunk")) for x in every)


def _read_first(node: ast.For) -> set[str]:
    """The names that an iteration may read before it binds them."""
    bound: set[str] = set()
    read: set[str] = set()

    def visit(n: ast.AST) -> None:
        if isinstance(n, ast.Name):
            if isinstance(n.ctx, ast.Load):
                read.update({n.id} - bound)
            else:
                bound.add(n.id)
        elif isinstance(n, (ast.Assign, ast.AnnAssign)):
            if n.value is not None:
                visit(n.value)
            for target in n.targets if isinstance(n, ast.Assign) else [n.target]:
                visit(target)
        elif isinstance(n, ast.AugAssign):
            read.update(names_of([n.target], ast.Store) - bound)
            visit(n.value)
            visit(n.target)
        elif isinstance(n, (ast.If, ast.For, ast.While, ast.FunctionDef, ast.Lambda)):
            # What happens inside may not happen: it binds nothing for certain.
            before = set(bound)
            for child in ast.iter_child_nodes(n):
                visit(child)
            bound.intersection_update(before)
        else:
            for child in ast.iter_child_nodes(n):
                visit(child)

    visit(node.target)
    for statement in node.body:
        visit(statement)
    return read


def _joins(tree: ast.AST) -> set[int]:
    """Names that are the first argument of ``torch.stack`` and the like."""
    return {
        id(n.args[0])
        for n in ast.walk(tree)
        if isinstance(n, ast.Call)
        and is_method(n, JOINS)
        and n.args
        and isinstance(n.args[0], ast.Name)
    }


def _copied(tree: ast.FunctionDef, replaced: dict[int, Any]) -> ast.FunctionDef:
    """A shallow enough copy: replaced statements keep their identity."""

    def copied(node: Any) -> Any:
        if id(node) in replaced or not isinstance(node, ast.AST):
            return node
        made = type(node)()
        for name, value in ast.iter_fields(node):
            new = [copied(x) for x in value] if isinstance(value, list) else copied(value)
            setattr(made, name, new)
        return ast.copy_location(made, node) if hasattr(node, "lineno") else made

    return copied(tree)


class _Replace(ast.NodeTransformer):
    """Puts the three ways to run a loop in its place, and joins lists by what the loop left."""

    def __init__(self, loops: dict[int, LoopSource], lists: set[str]) -> None:
        self.loops = loops
        self.lists = lists

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        first = node.args[0] if node.args else None
        if is_method(node, JOINS) and isinstance(first, ast.Name) and first.id in self.lists:
            return ast.copy_location(
                ast.Call(
                    ast.Name("__tttc_joined", ast.Load()), [node.func, *node.args], node.keywords
                ),
                node,
            )
        return node

    def visit_For(self, node: ast.For) -> Any:
        loop = self.loops.get(id(node))
        if loop is None:
            return self.generic_visit(node)
        site = f"__tttc_site_{loop.index}"
        given, chosen = f"__tttc_bounds_{loop.index}", f"__tttc_choice_{loop.index}"

        def load(name: str) -> ast.expr:
            return ast.Name(name, ast.Load())

        statements: list[ast.stmt] = [
            ast.Assign([ast.Name(name, ast.Store())], value) for name, value, _ in loop.sources
        ]
        bounds = loop.bounds
        if bounds is None:
            counts = ast.Tuple([load(name) for name, _, _ in loop.sources], ast.Load())
            bounds = ast.Call(ast.Attribute(load(site), "counted", ast.Load()), [counts], [])
        statements.append(ast.Assign([ast.Name(given, ast.Store())], bounds))
        held = f"__tttc_values_{loop.index}"
        values = ast.Tuple([load(x) for x in loop.inputs], ast.Load())
        statements.append(ast.Assign([ast.Name(held, ast.Store())], values))
        beside = ast.Tuple([load(x) for x in loop.beside], ast.Load())

        def method(owner: ast.expr, name: str, arguments: list[ast.expr]) -> ast.stmt:
            call = ast.Call(ast.Attribute(owner, name, ast.Load()), arguments, [])
            if not loop.results:
                return ast.Expr(call)
            return ast.Assign(
                [ast.Tuple([ast.Name(x, ast.Store()) for x in loop.results], ast.Store())], call
            )

        statements.append(
            ast.Assign(
                [ast.Name(chosen, ast.Store())],
                ast.Call(
                    ast.Attribute(load(site), "choose", ast.Load()), [load(given), load(held)], []
                ),
            )
        )
        plan = ast.Subscript(
            ast.Attribute(load(site), "plans", ast.Load()), load(chosen), ast.Load()
        )
        left = ast.Call(ast.Attribute(plan, "rest", ast.Load()), [load(given), load(held)], [])
        rest = ast.For(ast.Name(loop.variable, ast.Store()), left, [loop.once], [])  # type: ignore[list-item]
        eager = ast.If(
            ast.Compare(load(chosen), [ast.Eq()], [ast.UnaryOp(ast.USub(), ast.Constant(1))]),
            [method(load(site), "eagerly", [beside])],
            [node],
        )
        statements.append(
            ast.If(
                ast.Compare(load(chosen), [ast.GtE()], [ast.Constant(0)]),
                [method(plan, "run", [load(given), load(held)]), rest],
                [eager],
            )
        )
        return [ast.copy_location(s, node) for s in statements]


def compiled_source(name: str, text: str, scope: dict[str, Any]) -> Any:
    """The function ``name`` of some generated source, which tracebacks can show."""
    file = f"<tttc {name} {abs(hash(text)):x}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), scope)
    return scope[name]
