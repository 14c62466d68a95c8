"""Which expressions make a tensor from numbers alone, a causal mask say: its values are known wherever it is made."""

from __future__ import annotations

import ast

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


def is_from_nothing(node: ast.AST, defined: dict[str, ast.stmt]) -> bool:
    """Whether an expression makes a tensor from numbers alone: a factory, and what changes its values."""
    if isinstance(node, ast.Name):
        return node.id in defined
    if isinstance(node, ast.UnaryOp):
        return is_from_nothing(node.operand, defined)
    if isinstance(node, ast.Compare):
        return all(
            isinstance(x, ast.Constant) or is_from_nothing(x, defined)
            for x in (node.left, *node.comparators)
        ) and not isinstance(node.left, ast.Constant)
    if isinstance(node, ast.Subscript):
        return is_from_nothing(node.value, defined)
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
    if node.func.attr in _FACTORIES:
        return of_torch or node.func.attr.startswith("new_")
    if node.func.attr in _CHANGES:
        return is_from_nothing(node.args[0] if of_torch and node.args else node.func.value, defined)
    return False


def binds_from_nothing(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and not isinstance(statement.value, ast.Lambda)
