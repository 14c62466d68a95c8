"""Pieces of SVG that all figures are made of."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from markupsafe import Markup, escape

MARGIN = 12.0
_ids = itertools.count()

# Outside a report a figure brings its own colours; in one they are those of the page, light or dark.
COLOURS = """
.n rect{stroke:#5b6472;stroke-width:1;fill:#fff}.n text,.t{font:11px system-ui,-apple-system,"Segoe UI",sans-serif;fill:#14181f;text-anchor:middle}
.n .d{fill:#4a5361;font-family:ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:10px}
.e{fill:none;stroke:#8b95a3;stroke-width:1.1}.e.new{stroke:#c2410c}
.k-contraction rect{fill:#cfe1ff}.k-elementwise rect{fill:#e9edf2}.k-reduction rect{fill:#ffe3b8}.k-view rect{fill:#fff;stroke-dasharray:3 2}
.k-other rect{fill:#fff}.k-state rect{fill:#e5d4fb}.k-token rect{fill:#cdeee0}.k-parameter rect,.k-constant rect{fill:#f4efc4}.k-result rect{fill:#e5d4fb;stroke-width:2}
.n.new rect,.n.changed rect{stroke:#c2410c;stroke-width:2.4}.n.changed rect{stroke-dasharray:5 2}circle.m{fill:#c2410c}.n text.m{font-weight:700;fill:#fff;font-size:12px}
.t{text-anchor:start}.t.c{text-anchor:middle}.t.r{text-anchor:end}.t.s{font-size:10px;fill:#4a5361}.t.b{font-weight:700}.t.halo{paint-order:stroke;stroke:#fff;stroke-width:4px;stroke-linejoin:round}
.axis{stroke:#5b6472;fill:none}.grid{stroke:#dfe4ea;fill:none}.roof{stroke:#1d4ed8;stroke-width:2;fill:none}
.p-before{fill:#b45309}.p-after{fill:#1d4ed8}.p-measured{fill:#047857}.drop{stroke-dasharray:4 3;fill:none;stroke:#8b95a3}
.box{stroke:#5b6472}.box.before,.box.outputs{fill:#cdeee0}.box.recurrence{fill:#cfe1ff;stroke-width:2}.box.state{fill:#e5d4fb}.box.invariant{fill:#f4efc4}
.flow{fill:none;stroke:#5b6472;stroke-width:1.4}.flow.critical{stroke:#1d4ed8;stroke-width:3}.head{fill:#5b6472}.head.critical{fill:#1d4ed8}
.bar{fill:#1d4ed8}
"""


def figure(
    content: str, width: float, height: float, title: str, described: str, *, alone: bool = False
) -> Markup:
    """An SVG element with a title and a description that screen readers read."""
    n = next(_ids)
    w, h = width + 2 * MARGIN, height + 2 * MARGIN
    namespace = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
    style = f'<style>{COLOURS}</style><rect x="-9999" y="-9999" width="99999" height="99999" fill="#fff"/>'
    return Markup(
        f'<svg{namespace} viewBox="{-MARGIN:.0f} {-MARGIN:.0f} {w:.0f} {h:.0f}" width="{w:.0f}" height="{h:.0f}" '
        f'role="img" aria-labelledby="st{n} sd{n}"><title id="st{n}">{escape(title)}</title>'
        f'<desc id="sd{n}">{escape(described)}</desc>{style if alone else ""}{content}</svg>'
    )


def path_data(points: Sequence[tuple[float, float]]) -> str:
    """A line through points from top to bottom, its ends and turns upright."""
    x, y = points[0]
    data = [f"M{x:.0f} {y:.0f}"]
    for a, b in points[1:]:
        if abs(a - x) < 0.5:
            data.append(f"V{b:.0f}")
        else:
            middle = (y + b) / 2
            data.append(f"C{x:.0f} {middle:.0f} {a:.0f} {middle:.0f} {a:.0f} {b:.0f}")
        x, y = a, b
    return "".join(data)


def text(x: float, y: float, words: str, classes: str = "") -> str:
    """A line of text; ``classes``: c (centred), r (ends at x), s (small), b (bold), halo (on the ground's
    colour, where lines cross it)."""
    return f'<text class="{f"t {classes}".strip()}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'
