"""The user's source behind a step: the step itself, then the functions of theirs that it ran through."""

from __future__ import annotations

import ast
import inspect
import linecache
import textwrap
from collections.abc import Callable
from typing import Any

from torch import fx

from tttc.ir.body import source_line
from tttc.report.records import SourceReport

MOST = 8  # functions shown beside the step


def sources_of(step: Callable[..., Any], captured: fx.GraphModule | None) -> list[SourceReport]:
    """The step's source, and that of the functions its operations were written in; what can't be read is left out."""
    found = [_of_function(step)]
    seen = {line for x in found if x is not None for line in _lines(x)}
    for node in captured.graph.nodes if captured is not None else ():
        file, _, line = (source_line(node) or "").rpartition(":")
        if file and (file, int(line)) not in seen:
            report = _around(file, int(line))
            if report is not None:
                found.append(report)
                seen |= _lines(report)
            seen.add((file, int(line)))
    return [x for x in found if x is not None][: MOST + 1]


def _lines(report: SourceReport) -> set[tuple[str, int]]:
    return {(report.file, report.line + i) for i in range(report.text.count("\n") + 1)}


def _of_function(step: Callable[..., Any]) -> SourceReport | None:
    try:
        function = inspect.unwrap(step)
        lines, start = inspect.getsourcelines(function)
        file = inspect.getsourcefile(function) or "?"
    except (OSError, TypeError):
        return None
    name = getattr(step, "__qualname__", type(step).__name__)
    return SourceReport(name, file, start, textwrap.dedent("".join(lines)).rstrip("\n"))


def _around(file: str, line: int) -> SourceReport | None:
    """The outermost function around a line."""
    lines = linecache.getlines(file)
    try:
        tree = ast.parse("".join(lines))
    except (SyntaxError, ValueError):
        return None
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    around = [
        x
        for x in ast.walk(tree)
        if isinstance(x, functions) and x.lineno <= line <= (x.end_lineno or x.lineno)
    ]
    if not around:
        return None
    outer = min(around, key=lambda x: x.lineno)
    start = min([outer.lineno, *(d.lineno for d in outer.decorator_list)])
    text = textwrap.dedent("".join(lines[start - 1 : outer.end_lineno])).rstrip("\n")
    return SourceReport(outer.name, file, start, text)
