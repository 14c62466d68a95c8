"""Source that was generated, as functions that tracebacks can show."""

from __future__ import annotations

import linecache
from typing import Any


def compiled_source(name: str, text: str, scope: dict[str, Any]) -> Any:
    """The function ``name`` of some generated source, which tracebacks can show."""
    file = f"<tttc {name} {abs(hash(text)):x}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), scope)
    return scope[name]
