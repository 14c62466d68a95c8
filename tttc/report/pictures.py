"""The pictures of an explanation, each as an SVG file of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tttc.report import figures
from tttc.report.html import drawing_of
from tttc.report.model import model_graph

if TYPE_CHECKING:
    from tttc.report.explanation import Explanation


def picture(ex: Explanation, what: str) -> str:
    """The picture called ``what``; see :meth:`Explanation.to_svg`."""
    table = _pictures(ex)
    if what not in table:
        raise KeyError(f"what: expected one of {', '.join(table)}, got {what!r}")
    return str(table[what]())


def _pictures(ex: Explanation) -> dict[str, Callable[[], str]]:
    table: dict[str, Callable[[], str]] = {}
    for scan in ex.scans:
        prefix = f"{scan.name}." if len(ex.scans) > 1 else ""
        back = scan.backward
        for stage in [*scan.stages, *(back.stages if back is not None else ())]:
            name = prefix + stage.name
            table[name] = lambda n=name, s=stage: drawing_of(n, s.graph, alone=True)  # type: ignore[misc]
        found = {"recurrence": scan.recurrence, "backward_recurrence": back and back.recurrence}
        for name, one in found.items():
            if one is not None:
                table[prefix + name] = lambda r=one, s=scan: figures.recurrence(
                    r, s.name, alone=True
                )  # type: ignore[misc]
        if any(s.error is not None for s in scan.stages):
            table[f"{prefix}errors"] = lambda s=scan: figures.errors(s, alone=True)  # type: ignore[misc]
        roof = scan.roofline
        if roof is not None:
            table[f"{prefix}roofline"] = lambda r=roof, s=scan: figures.roofline(
                r, s.name, alone=True
            )  # type: ignore[misc]
    for name in ex.stages:
        table.setdefault(name, lambda n=name: drawing_of(n, model_graph(ex, n), alone=True))  # type: ignore[misc]
    return table
