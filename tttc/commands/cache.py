"""``tttc cache``: the emitted kernels, the schedules found by measuring and the compiled programs kept on disk."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tttc.codegen.kernel import KINDS, cache_dir

# What is written there, and nothing else a person may have put beside it.
OURS = re.compile(
    r".*_[0-9a-f]{16}(\.cpython-\d+)?(\.opt-\d)?\.(pyc?|json|program|cubin)(\.\w+)?|.*\.partial"
)


@dataclass(frozen=True)
class Entry:
    """One file of the cache."""

    kind: str
    name: str
    size: int
    age_days: float
    about: str = ""  # of a schedule: what was measured, and on what


def files(kind: str | None = None) -> Iterator[tuple[str, Path]]:
    """The files of the cache, or those of one kind, with the kind of each."""
    for which in KINDS if kind is None else (kind,):
        folder = cache_dir() / which
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.is_file() and OURS.fullmatch(path.name):
                yield which, path


def _about(path: Path) -> str:
    """What a remembered schedule says of itself; "" for what is none, or is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        key, us = found["key"], 1e6 * found["seconds"]
        return (
            f"{us:.0f} us on {key['device']['name']}, {key['dtype']}, {len(found['plan'])} kernels"
        )
    except (OSError, ValueError, TypeError, LookupError):
        return ""


def contents(kind: str | None = None) -> dict[str, Any]:
    """What ``tttc cache`` shows: the folder, its entries (of one kind, or all), their size in bytes."""
    now, entries, compiled = time.time(), [], 0
    for which, path in files(kind):
        found = path.stat()
        if "__pycache__" in path.parts:
            compiled += found.st_size
            continue
        about = _about(path) if path.suffix == ".json" else ""
        age = (now - found.st_mtime) / 86400
        entries.append(Entry(which, path.name, found.st_size, age, about))
    return {
        "folder": str(cache_dir()),
        "bytes": sum(e.size for e in entries) + compiled,
        "entries": [vars(e) for e in entries],
    }


def clear(older_than_days: float = 0.0, kind: str | None = None) -> dict[str, Any]:
    """Delete entries (of one kind, or all) not written to for so many days; how many went, and their bytes.

    What else lies in the folder stays.
    """
    now, count, size = time.time(), 0, 0
    folders = set()
    for _, path in list(files(kind)):
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
    for i, name in enumerate(("kind", "entry", "size", "age", "what")):
        table.add_column(name, justify="right" if i in (2, 3) else "left", overflow="fold")
    for e in entries:
        table.add_row(
            e["kind"],
            escape(e["name"]),
            byte_count(e["size"]),
            _age(e["age_days"]),
            escape(e["about"]),
        )
    yield table


def _age(days: float) -> str:
    if days >= 1:
        return f"{days:.0f} d"
    return f"{days * 24:.0f} h" if days * 24 >= 1 else f"{max(days, 0) * 1440:.0f} min"
