"""The figures of a scan beside its graphs: the recurrence, the roofline, errors by stage."""

from __future__ import annotations

import itertools
import math

from markupsafe import Markup

from tttc.report.records import RecurrenceReport, Roofline, ScanReport
from tttc.report.svg import figure, text
from tttc.report.text import count, several
from tttc.report.text import error as shown_error

PARTS = {
    "invariant": ("of parameters alone", "once"),
    "before": ("of tokens alone", "all {units} at once"),
    "recurrence": ("critical path", "one {unit} after another"),
    "outputs": ("outputs", "all {units} at once"),
}

BACKWARD_PARTS = {
    **PARTS,
    "before": ("of tokens and saved states", "all {units} at once"),
    "outputs": ("cotangents of tokens", "all {units} at once"),
}


def part_words(found: RecurrenceReport, name: str) -> tuple[str, str]:
    """What a part is, and when it runs."""
    what, when = (BACKWARD_PARTS if found.reverse else PARTS)[name]
    return what, when.format(unit=found.unit, units=several(2, found.unit)[2:])


def recurrence(found: RecurrenceReport, name: str, *, alone: bool = False) -> Markup:
    """Three mini-batches (or tokens): the states between them, what each waits for, and what runs beside it.

    Of a backward they run from the last to the first, and what passes between them are cotangents.
    """
    unit = found.unit
    shown = [p for p in found.parts if p.nodes and p.name != "invariant"]
    names = [p.name for p in shown]
    left, column, gap, high, row = 178.0, 190.0, 54.0, 46.0, 84.0
    y = {name: i * row + 26.0 for i, name in enumerate(names)}
    parts = ['<g class="fig">']
    for p in shown:
        what, when = part_words(found, p.name)
        parts.append(text(0, y[p.name] + 14, what, "b"))
        parts.append(text(0, y[p.name] + 29, when, "s"))
        parts.append(text(0, y[p.name] + 43, f"{count(p.flops)} FLOPs", "s"))
    for n in range(3):
        x = left + n * (column + gap) + gap
        which = ("n + 1", "n", "n − 1")[n] if found.reverse else ("n − 1", "n", "n + 1")[n]
        parts.append(text(x + column / 2, 12, f"{unit} {which}", "s c"))
        for p in shown:
            parts.append(
                f'<rect class="box {p.name}" x="{x:.0f}" y="{y[p.name]:.0f}" width="{column:.0f}" '
                f'height="{high:.0f}" rx="4"/>'
            )
            others = p.nodes - p.contractions
            line = f"{several(p.contractions, 'contraction')}, {several(others, 'other')}"
            chain = f"longest chain: {several(p.depth, 'operator')}"
            parts.append(text(x + column / 2, y[p.name] + 20, line, "c"))
            parts.append(text(x + column / 2, y[p.name] + 35, chain, "s c"))
        middle = y["recurrence"] + high / 2
        parts.append(_arrow(x - gap + 2, middle, x - 2, middle, "critical"))
        if n == 2:
            end = x + column
            parts.append(_arrow(end + 2, middle, end + gap - 2, middle, "critical"))
        for above, below in itertools.pairwise(names):
            parts.append(
                _arrow(x + column / 2, y[above] + high + 1, x + column / 2, y[below] - 1, "")
            )
        parts.append(text(x - gap / 2, middle - 8, "∂ state" if found.reverse else "state", "s c"))
    parts.append("</g>")
    width = left + 3 * (column + gap) + gap
    described = (
        f"{found.part('recurrence').nodes} operators are on the critical path from {'the cotangent of ' if found.reverse else 'the state '}"
        f"{', '.join(found.states)} of one {unit} to that of the next, {100 * found.share:.0f} % of the FLOPs. The others run beside it."
    )
    return figure(
        "".join(parts),
        width,
        len(shown) * row,
        f"The recurrence of {name}: state, critical path, and what runs beside it",
        described,
        alone=alone,
    )


def _arrow(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    along = math.hypot(x2 - x1, y2 - y1) or 1.0
    dx, dy = (x2 - x1) / along, (y2 - y1) / along
    bx, by = x2 - 7 * dx, y2 - 7 * dy
    points = (
        f"{x2:.1f},{y2:.1f} {bx - 4 * dy:.1f},{by + 4 * dx:.1f} {bx + 4 * dy:.1f},{by - 4 * dx:.1f}"
    )
    return (
        f'<path class="{f"flow {kind}".strip()}" d="M{x1:.1f} {y1:.1f}L{bx:.1f} {by:.1f}"/>'
        f'<polygon class="{f"head {kind}".strip()}" points="{points}"/>'
    )


def roofline(roof: Roofline, name: str, *, alone: bool = False) -> Markup:
    """The roofs of a device on logarithmic axes; the naive step, the compiled scan, and what was measured."""
    left, top, width, height = 64.0, 20.0, 520.0, 270.0
    ridge = roof.peak / roof.bandwidth
    low = math.floor(math.log10(min(roof.before, roof.after, ridge) / 2))
    high = math.ceil(math.log10(max(roof.before, roof.after, ridge) * 2))
    rates = [roof.attainable(roof.before), roof.peak, roof.measured or roof.peak]
    floor, ceiling = math.floor(math.log10(min(rates) / 2)), math.ceil(math.log10(roof.peak * 1.2))

    def px(x: float) -> float:
        return left + (math.log10(x) - low) / (high - low) * width

    def py(y: float) -> float:
        return top + (ceiling - math.log10(y)) / (ceiling - floor) * height

    parts = ['<g class="fig">']
    for e in range(low, high + 1):
        parts.append(f'<path class="grid" d="M{px(10.0**e):.1f} {top}v{height}"/>')
        parts.append(text(px(10.0**e), top + height + 15, f"{10.0**e:g}", "s c"))
    for e in range(floor, ceiling + 1):
        parts.append(f'<path class="grid" d="M{left} {py(10.0**e):.1f}h{width}"/>')
        parts.append(text(left - 6, py(10.0**e) + 4, f"{count(10.0**e)}", "s r"))
    parts.append(f'<path class="axis" d="M{left} {top}v{height}h{width}"/>')
    start = max(10.0**low, 10.0**floor / roof.bandwidth)
    corners = [(start, start * roof.bandwidth), (ridge, roof.peak), (10.0**high, roof.peak)]
    line = "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in corners)
    parts.append(f'<path class="roof" d="M{line}"/>')
    peak = f"{count(roof.peak)}FLOP/s, {roof.precision} products"
    parts.append(text(left + width - 4, py(roof.peak) - 6, peak, "s r"))
    parts.append(text(left + 8, top + 14, f"memory: {count(roof.bandwidth)}B/s", "s"))
    points = [
        ("before", "naive step, op by op: at most", roof.before, roof.attainable(roof.before)),
        ("after", "compiled: at most", roof.after, roof.attainable(roof.after)),
    ]
    if roof.measured:
        points.append(("measured", "compiled, measured:", roof.after, roof.measured))
    labels: list[str] = []
    taken = [(left + width - 4 - SMALL * len(peak), left + width, py(roof.peak) - 6)]
    for kind, said, x, y in points:
        parts.append(f'<path class="drop" d="M{px(x):.1f} {py(y):.1f}V{top + height}"/>')
        shape = (
            f'<circle class="p-{kind}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="5.5"/>'
            if kind == "after"
            else f'<rect class="p-{kind}" x="{px(x) - 5:.1f}" y="{py(y) - 5:.1f}" width="10" height="10"/>'
            if kind == "before"
            else f'<path class="p-{kind}" d="M{px(x):.1f} {py(y) - 7:.1f}l7 7-7 7-7-7z"/>'
        )
        parts.append(shape)
        labels.append(_label(px(x), py(y), f"{said} {count(y)}FLOP/s", left + width, taken))
    parts += labels
    parts.append(text(left + width / 2, top + height + 32, "FLOPs a byte of device memory", "c"))
    parts.append(text(0, 10, "FLOP/s", "s"))
    parts.append("</g>")
    described = (
        f"On {roof.device} the naive step, operator by operator, has {roof.before:.3g} FLOPs a byte and can reach "
        f"{count(roof.attainable(roof.before))}FLOP/s; the compiled scan has {roof.after:.3g} and can reach "
        f"{count(roof.attainable(roof.after))}FLOP/s."
    )
    if roof.measured:
        described += f" Measured: {count(roof.measured)}FLOP/s."
    title = f"Roofline of {name} on {roof.device}"
    return figure(
        "".join(parts), left + width + 10, top + height + 36, title, described, alone=alone
    )


SMALL = 5.6  # pixels of a character of small text, at most


def _label(
    x: float, y: float, words: str, right: float, taken: list[tuple[float, float, float]]
) -> str:
    """Text beside a point where no other text is; ``taken``: the ends and the baseline of each other text."""
    wide = SMALL * len(words)
    at_left = x + 10 + wide > right
    for down in (-8, 18, 34, -24, 50) if at_left else (18, -8, 34, -24, 50):
        start = x - 10 - wide if at_left else x + 10
        free = all(
            start > end or start + wide < begin or abs(y + down - line) >= 14
            for begin, end, line in taken
        )
        if free:
            break
    taken.append((start, start + wide, y + down))
    return text(x - 10 if at_left else x + 10, y + down, words, f"s {'r ' * at_left}halo")


def errors(scan: ScanReport, *, alone: bool = False) -> Markup:
    """Errors of the stages against the naive loop in float64, as bars on a logarithmic axis."""
    stages = [(s.name, s.error) for s in scan.stages if s.error is not None]
    finite = [e for _, e in stages if math.isfinite(e)]
    left, width, row = 150.0, 360.0, 22.0
    low, high = -17, max(-1, *(math.ceil(math.log10(max(e, 1e-17))) for e in (*finite, 1e-17)))
    parts = ['<g class="fig">']
    for e in range(low, high + 1, 4):
        x = left + (e - low) / (high - low) * width
        parts.append(f'<path class="grid" d="M{x:.1f} 0V{row * len(stages):.0f}"/>')
        parts.append(text(x, row * len(stages) + 14, f"1e{e}", "s c"))
    for i, (name, found) in enumerate(stages):
        value = max(found, 10.0**low) if math.isfinite(found) else 10.0**high
        length = (math.log10(value) - low) / (high - low) * width
        parts.append(text(left - 8, i * row + 15, name, "r"))
        parts.append(
            f'<rect class="bar" x="{left}" y="{i * row + 4:.0f}" width="{length:.1f}" height="14"/>'
        )
        parts.append(text(left + length + 6, i * row + 15, shown_error(found), "s"))
    parts.append("</g>")
    described = "; ".join(f"{name} {shown_error(found)}" for name, found in stages)
    return figure(
        "".join(parts),
        left + width + 60,
        row * len(stages) + 20,
        f"Error of each stage of {scan.name} against the naive loop in float64",
        described,
        alone=alone,
    )
