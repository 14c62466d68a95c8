"""What statements read, bind and leave."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from tttc.capture.candidates import within_enumerate
from tttc.capture.names import is_call_of, is_method, names_of

JOINS = ("stack", "cat", "concat", "concatenate", "hstack", "vstack")


def free_names(statement: ast.stmt) -> set[str]:
    """What a function defined on the way reads of the function around it."""
    own = names_of([statement], ast.Store) if isinstance(statement, ast.FunctionDef) else set()
    own |= {a.arg for a in ast.walk(statement) if isinstance(a, ast.arg)}
    return names_of([statement], ast.Load) - own


def refusal(node: ast.For) -> str | None:
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


def is_repeated(tree: ast.AST, node: ast.For) -> bool:
    """Whether the loop is itself inside another."""
    return any(
        isinstance(n, (ast.For, ast.While))
        and n is not node
        and any(m is node for m in ast.walk(n))
        for n in ast.walk(tree)
    )


def count_stores(tree: ast.AST, name: str) -> int:
    return sum(
        isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store)
        for n in ast.walk(tree)
    )


def takes_several(node: ast.For) -> bool:
    """Whether an iteration may take several tokens: the last one then takes what is left."""
    iterator = within_enumerate(node.iter)
    if is_call_of(iterator, "range"):
        return len(iterator.args) > 2  # type: ignore[attr-defined]
    every = iterator.args if is_call_of(iterator, "zip") else [iterator]  # type: ignore[attr-defined]
    return any(is_method(x, ("split", "chunk")) for x in every)


def read_first(node: ast.For) -> set[str]:
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


def joined_names(tree: ast.AST) -> set[int]:
    """Names that are the first argument of ``torch.stack`` and the like."""
    return {
        id(n.args[0])
        for n in ast.walk(tree)
        if isinstance(n, ast.Call)
        and is_method(n, JOINS)
        and n.args
        and isinstance(n.args[0], ast.Name)
    }
