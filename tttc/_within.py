"""A context variable that has a value for as long as a block of code runs."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def within(variable: contextvars.ContextVar[T], value: T) -> Iterator[None]:
    """Within, ``variable`` has this value; then the one it had before, whatever was raised."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
