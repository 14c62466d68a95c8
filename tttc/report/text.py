"""Numbers and tables as text."""

from __future__ import annotations

import io
import shutil
import sys
from typing import Any

from rich.console import Console

WIDTH = 110  # columns of a report where no terminal says otherwise
LEAST, NARROW, WIDE = 80, 100, 160  # columns; under NARROW tables say less


def count(x: float) -> str:
    """A number with a decimal prefix: ``1.23 M``."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(x) < 1000 or prefix == "P":
            return (
                f"{x:.0f}"
                if not prefix
                else f"{x:.3g} {prefix}"
                if x < 999.5
                else f"{x:.0f} {prefix}"
            )
        x /= 1000
    raise AssertionError


def several(n: int, what: str) -> str:
    """A number of things: ``several(1, "operator")`` is ``1 operator``; of two and more there are ``operators``."""
    return f"{n} {what}{'' if n == 1 else 'es' if what.endswith(('ch', 's')) else 's'}"


def byte_count(x: float) -> str:
    """A number of bytes with a binary prefix: ``96.0 KiB``."""
    for prefix in ("B", "KiB", "MiB", "GiB"):
        if abs(x) < 1024:
            return f"{x:.0f} B" if prefix == "B" else f"{x:.1f} {prefix}"
        x /= 1024
    return f"{x:.1f} TiB"


def seconds(x: float) -> str:
    """A time: ``12.3 ms``."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if x * scale >= 1 or unit == "µs":
            return f"{x * scale:.3g} {unit}" if x * scale < 1000 else f"{x * scale:.0f} {unit}"
    raise AssertionError


def error(x: float | None) -> str:
    """An error: ``1.2e-07``."""
    return "" if x is None else f"{x:.1e}"


def plain(*renderables: Any, width: int | None = None) -> str:
    """What rich would print, without colours; as wide as the terminal within reason."""
    if width is None:
        width = min(max(shutil.get_terminal_size((WIDTH, 24)).columns, LEAST), WIDE)
    out = io.StringIO()
    console = Console(
        file=out, width=width, color_system=None, force_terminal=False, highlight=False
    )
    for item in renderables:
        console.print(item)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def console(stderr: bool = False) -> Console:
    """Where commands print: as wide as the terminal, or as a report needs where there is none."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else WIDTH, highlight=False)
