"""``tttc cache``: the emitted kernels kept on disk."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tttc.codegen.kernel import KINDS, cache_dir

# What is written there, and nothing else a person may have put beside it.
OURS = re.compile(r".*_[0-9a-f]{16}(\.cpython-\d+)?(\.opt-\d)?\.(pyc?|json)(\.\w+)?|.*\.partial")


@dataclass(frozen=True)
class Entry:
    """One file of the cache."""

    kind: str
    name: str
    size: int
    age_days: float


def files() -> Iterator[tuple[str, Path]]:
    """The files of the cache, with the kind of each."""
    for kind in KINDS:
        folder = cache_dir() / kind
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.is_file() and OURS.fullmatch(path.name):
                yield kind, path


def contents() -> dict[str, Any]:
    """What ``tttc cache`` shows: the folder, its entries, their size in bytes."""
    now, entries, compiled = time.time(), [], 0
    for kind, path in files():
        found = path.stat()
        if "__pycache__" in path.parts:
            compiled += found.st_size
            continue
        entries.append(Entry(kind, path.name, found.st_size, (now - found.st_mtime) / 86400))
    return {
        "folder": str(cache_dir()),
        "bytes": sum(e.size for e in entries) + compiled,
        "entries": [vars(e) for e in entries],
    }


def clear(older_than_days: float = 0.0) -> dict[str, Any]:
    """Delete entries not written to for so many days; how many went, and their bytes.

    What else lies in the folder stays.
    """
    now, count, size = time.time(), 0, 0
    folders = set()
    for _, path in list(files()):
        found = path.stat()
        if now - found.st_mtime < older_than_days * 86400:
            continue
        path.unlink(missing_ok=True)
        folders.add(path.parent)
        count += "__pycache__" not in path.parts
        size += found.st_size
    for folder in sorted(folders, key=lambda f: -len(f.parts)):
        if not any(folder.iterdir()):
            folder.rmdir()
    return {"folder": str(cache_dir()), "deleted": count, "bytes": size}


def shown(found: dict[str, Any], listed: bool) -> Iterator[Any]:
    """The table of ``tttc cache``; ``listed``: every entry."""
    from rich.markup import escape
    from rich.table import Table

    from tttc.report.text import byte_count

    entries = found["entries"]
    yield f"{escape(found['folder'])}: {len(entries)} entries, {byte_count(found['bytes'])}"
    if not listed:
        return
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for i, name in enumerate(("kind", "entry", "size", "age")):
        table.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
    for e in entries:
        table.add_row(e["kind"], escape(e["name"]), byte_count(e["size"]), _age(e["age_days"]))
    yield table


def _age(days: float) -> str:
    if days >= 1:
        return f"{days:.0f} d"
    return f"{days * 24:.0f} h" if days * 24 >= 1 else f"{max(days, 0) * 1440:.0f} min"
