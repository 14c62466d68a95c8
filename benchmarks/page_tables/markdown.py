"""Numbers, tables and lines as the Markdown of pages has them."""

from __future__ import annotations

from collections.abc import Sequence


def number(x: float) -> str:
    """A whole number, its thousands apart: ``22 424``."""
    return f"{x:,.0f}".replace(",", " ") if x >= 10_000 else f"{x:.0f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def wrapped(text: str, width: int = 120) -> str:
    """A sentence in lines as pages have them; tables and lists stay as they are."""
    if text.startswith(("|", "- ", "!")):
        return text
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".lstrip()
    return "\n".join([*lines, line])
