"""Names and calls in pieces of source."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from typing import Any


def names_of(nodes: Iterable[ast.AST], *contexts: type) -> set[str]:
    """The names in these contexts, those of comprehensions aside."""
    return {n.id for root in nodes for n in own_names(root) if isinstance(n.ctx, contexts)}


_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def own_names(root: ast.AST) -> list[ast.Name]:
    """The names in a piece of source that are not those of a comprehension inside it."""
    inner: set[int] = set()
    for n in ast.walk(root):
        if isinstance(n, _COMPREHENSIONS):
            bound = {
                x.id for g in n.generators for x in ast.walk(g.target) if isinstance(x, ast.Name)
            }
            # What the first sequence is made of belongs to the function around it.
            first = {id(x) for x in ast.walk(n.generators[0].iter)}
            inner |= {
                id(x)
                for x in ast.walk(n)
                if isinstance(x, ast.Name) and x.id in bound and id(x) not in first
            }
    return [n for n in ast.walk(root) if isinstance(n, ast.Name) and id(n) not in inner]


def is_method(node: ast.AST, names: Sequence[str]) -> bool:
    """Whether a node calls a function or method of one of these names."""
    return isinstance(node, ast.Call) and (
        (isinstance(node.func, ast.Attribute) and node.func.attr in names)
        or (isinstance(node.func, ast.Name) and node.func.id in names)
    )


def is_call_of(node: ast.AST, *names: str) -> bool:
    """Whether a node calls a plain name."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def calls(name: str, *arguments: ast.expr) -> ast.Call:
    """A call of a plain name."""
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])


def sequence(node: Any) -> ast.expr:
    """``x.unbind(1)`` as ``__tttc_unbind(x, 1)``: a tensor whose first dimension is run over."""
    if isinstance(node.func, ast.Attribute) and not (
        isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
    ):
        name, arguments = node.func.attr, [node.func.value, *node.args]
    else:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        arguments = list(node.args)
    return ast.Call(ast.Name(f"__tttc_{name}", ast.Load()), arguments, node.keywords)
