"""A loop of a function, as its source has it."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


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
