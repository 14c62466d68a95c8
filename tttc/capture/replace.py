"""A function with something else in the place of its loops."""

from __future__ import annotations

import ast
from typing import Any

from tttc.capture.loop_source import LoopSource
from tttc.capture.names import is_method
from tttc.capture.statements import JOINS


def copied(tree: ast.FunctionDef, replaced: dict[int, Any]) -> ast.FunctionDef:
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


class Replace(ast.NodeTransformer):
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
