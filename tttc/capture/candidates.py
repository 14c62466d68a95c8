"""Which loops of a function may run over tokens: over ranges made of sizes, and over sequences of tensors."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from tttc.capture.names import is_call_of, is_method, names_of

SEQUENCES = ("unbind", "split", "chunk")
_SHAPES = ("shape", "size")


def sizes_in(tree: ast.FunctionDef) -> set[str]:
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


def items_of(iterator: ast.expr, known: set[str]) -> list[ast.expr] | None:
    """The sequences of tensors that a loop runs over, if it does."""
    if is_call_of(iterator, "zip"):
        parts = [items_of(x, known) for x in iterator.args]  # type: ignore[attr-defined]
        if not parts or any(p is None or len(p) != 1 for p in parts):
            return None
        return [p[0] for p in parts if p is not None]
    if is_method(iterator, SEQUENCES):
        return [iterator]
    if isinstance(iterator, ast.Name) and iterator.id in known:
        return [iterator]
    if is_method(iterator, ("transpose", "permute", "movedim")):
        return [iterator]
    return None


def candidates(statements: Sequence[ast.stmt], known: set[str]) -> list[ast.For]:
    """The outermost loops that may run over tokens."""
    found: list[ast.For] = []
    for node in statements:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if isinstance(node, ast.For) and _may_run_over_tokens(node, known):
            found.append(node)
            continue
        for name in ("body", "orelse", "finalbody"):
            found += candidates(getattr(node, name, []), known)
    return found


def _may_run_over_tokens(node: ast.For, known: set[str]) -> bool:
    iterator = node.iter
    if is_call_of(iterator, "range"):
        return any(_from_sizes(a, known) for a in iterator.args)  # type: ignore[attr-defined]
    if is_call_of(iterator, "enumerate") and iterator.args:  # type: ignore[attr-defined]
        iterator = iterator.args[0]  # type: ignore[attr-defined]
    return items_of(iterator, known) is not None


def within_enumerate(iterator: Any) -> ast.expr:
    return iterator.args[0] if is_call_of(iterator, "enumerate") else iterator
