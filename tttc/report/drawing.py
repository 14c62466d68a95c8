"""Graphs as SVG: nodes coloured by kind, with their named dimensions, what a pass changed marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import networkx as nx
from markupsafe import Markup, escape

from tttc.report.layout import layered, layers
from tttc.report.records import ARGUMENT_KINDS, GraphReport, NodeReport
from tttc.report.svg import MARGIN, figure, path_data

CHARACTER, LINE, PAD = 6.3, 15.0, 7.0  # of text, in pixels
MOST_LINES = 8  # of a box that stands for a chain
LONGEST = 34  # characters of a line
NEAR = 2  # layers between an argument and the reader it stands above
CHANGES = {"new": "+", "changed": "~"}
SCALAR = "scalar"
TAKES = (
    "last token",
    "at last token",
    "broadcast",
    "select",
    "slice",
    "index",
)  # views that are drawn


@dataclass
class _Box:
    """What is drawn as one rectangle: a node, or a chain of elementwise ones that only the next reads."""

    members: list[NodeReport]
    inputs: list[str] = field(default_factory=list)

    @property
    def last(self) -> NodeReport:
        return self.members[-1]

    @property
    def lines(self) -> list[str]:
        node = self.last
        if node.kind in (*ARGUMENT_KINDS, "result"):
            return [
                clipped(
                    f"{node.operation} [{' '.join(node.dims)}]" if node.dims else node.operation
                )
            ]
        said = [m.operation for m in self.members]
        if len(said) > MOST_LINES:
            said = [*said[: MOST_LINES - 2], f"… {len(said) - MOST_LINES + 1} more", said[-1]]
        own = node.detail if node.kind in ("contraction", "reduction") else ""
        own = own or f"[{' '.join(node.dims)}]"
        return [clipped(x) for x in (*said, own if own != "[]" else SCALAR)]

    @property
    def size(self) -> tuple[float, float]:
        longest = max(len(x) for x in self.lines)
        return max(longest * CHARACTER, 24) + 2 * PAD, LINE * len(self.lines) + PAD


def clipped(text: str) -> str:
    """A text that is not too long to be drawn."""
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def draw(graph: GraphReport, title: str, described: str, *, alone: bool = False) -> Markup:
    """A graph as an SVG element; ``alone``: with the colours it needs outside a report.

    Views of whole values are left out (they do nothing), and arguments stand above each of their readers.
    """
    boxes = _boxes(graph.nodes)
    boxes, edges = _with_copies(boxes)
    placed = layered(dict((k, b.size) for k, b in boxes.items()), edges)
    parts: list[str] = []
    for (_, b), points in placed.edges.items():
        new = " new" if boxes[str(b)].last.change == "new" else ""
        parts.append(f'<path class="e{new}" d="{path_data(points)}"/>')
    for key, box in boxes.items():
        parts.append(_box(box, placed.centre[key]))
    drawing = figure("".join(parts), placed.width, placed.height, title, described, alone=alone)
    if alone or not placed.centre:
        return drawing
    # Where a narrow screen starts to look: the middle of the first row.
    first = min(y for _, y in placed.centre.values())
    row = [x for x, y in placed.centre.values() if y == first]
    start = MARGIN + sum(row) / len(row)
    return Markup(f'<div class="start" style="left:{start:.0f}px"></div>') + drawing


def _box(box: _Box, centre: tuple[float, float]) -> str:
    (x, y), (w, h) = centre, box.size
    node, lines = box.last, box.lines
    change = node.change
    said = f"{node.name}: {'; '.join(f'{m.operation} {m.detail}'.strip() for m in box.members)}"
    if change:
        said += f" ({change})"
    classes = " ".join(filter(None, ("n", f"k-{node.kind}", change)))
    round_ = h / 2 if node.kind in (*ARGUMENT_KINDS, "result") else 4
    text = ""
    for i, line in enumerate(lines):
        down = f'dy="{LINE:.0f}"' if i else f'y="{y - h / 2 + LINE:.0f}"'
        kind = ' class="d"' if i and i == len(lines) - 1 else ""
        text += f'<tspan x="{x:.0f}" {down}{kind}>{escape(line)}</tspan>'
    mark = ""
    if change:
        right, top = x + w / 2 - 2, y - h / 2 + 2
        mark = f'<circle class="m" cx="{right:.0f}" cy="{top:.0f}" r="6.5"/>'
        mark += f'<text class="m" x="{right:.0f}" y="{top + 4:.0f}">{CHANGES[change]}</text>'
    return (
        f'<g class="{classes}"><title>{escape(said)}</title><rect x="{x - w / 2:.0f}" y="{y - h / 2:.0f}" '
        f'width="{w:.0f}" height="{h:.0f}" rx="{round_:.0f}"/><text>{text}</text>{mark}</g>'
    )


def _boxes(nodes: Sequence[NodeReport]) -> dict[str, _Box]:
    """The boxes of a graph by the names of their last nodes; their inputs are such names."""
    by_name = {n.name: n for n in nodes}
    through: dict[str, str] = {}  # what a view shows

    def origin(name: str) -> str:
        while name in through:
            name = through[name]
        return name

    for node in nodes:
        if node.kind == "view" and len(node.inputs) == 1 and node.operation not in TAKES:
            through[node.name] = node.inputs[0]
    shown = [n for n in nodes if n.name not in through]
    reads = {
        n.name: [o for o in dict.fromkeys(map(origin, n.inputs)) if o in by_name] for n in shown
    }
    users: dict[str, list[str]] = {}
    for name, inputs in reads.items():
        for x in inputs:
            users.setdefault(x, []).append(name)
    # A chain: elementwise, each read by the next alone.
    into: dict[str, str] = {}
    taken: set[str] = set()
    for node in shown:
        following = users.get(node.name, [])
        if node.kind != "elementwise" or len(following) != 1:
            continue
        after = by_name[following[0]]
        same = after.kind == "elementwise" and after.change == node.change
        if same and after.dims == node.dims and after.name not in taken:
            into[node.name] = after.name
            taken.add(after.name)

    def end(name: str) -> str:
        while name in into:
            name = into[name]
        return name

    boxes: dict[str, _Box] = {}
    members: dict[str, list[NodeReport]] = {}
    for node in shown:
        members.setdefault(end(node.name), []).append(node)
    for node in shown:
        if node.name in members:
            inside = {m.name for m in members[node.name]}
            inputs = [end(x) for m in members[node.name] for x in reads[m.name] if x not in inside]
            boxes[node.name] = _Box(members[node.name], list(dict.fromkeys(inputs)))
    return boxes


def _with_copies(boxes: dict[str, _Box]) -> tuple[dict[str, _Box], list[tuple[str, str]]]:
    """Arguments repeated for readers that are far from each other, so that no long lines cross the drawing."""
    graph = nx.DiGraph([(x, name) for name, box in boxes.items() for x in box.inputs])
    depth = layers(graph)
    made: dict[str, _Box] = {}
    edges: list[tuple[str, str]] = []
    groups: dict[tuple[str, int], str] = {}
    for name, box in boxes.items():
        if box.last.kind in ARGUMENT_KINDS:
            continue
        made[name] = box
        for x in box.inputs:
            if boxes[x].last.kind in ARGUMENT_KINDS:
                place = (x, depth[name] // NEAR)
                if place not in groups:
                    groups[place] = f"{x}@{place[1]}"
                    made[groups[place]] = boxes[x]
                x = groups[place]
            edges.append((x, name))
    return made, edges
