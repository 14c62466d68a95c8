"""What the report draws: orders that were rejected, what a pass changed, places of nodes and labels."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tttc.ir.order import Order, best_path
from tttc.report import figures
from tttc.report.changes import compare
from tttc.report.layout import layered
from tttc.report.records import GraphReport, NodeReport, Roofline


def test_rejected_orders_and_what_they_would_make():
    # z_tj = sum_su m_ts q_tu k_su g_sj: the dual order, and the primal one that makes k_su g_sj first.
    operands = (("m", ("t", "s")), ("q", ("t", "u")), ("k", ("s", "u")), ("g", ("s", "j")))
    sizes = {"t": 16, "s": 16, "u": 32, "j": 32}
    labels = [o[1] for o in operands]
    path, info = best_path(labels, ("t", "j"), sizes)
    order = Order(operands, ("t", "j"), tuple(sizes.items()), tuple(path), int(info.opt_cost), 0)
    assert order.written() == "g · (m · (q · k))"
    assert order.operations == 2 * 16 * 16 * 32 + 16 * 16 + 2 * 16 * 16 * 32
    assert order.largest() == (16 * 32, ("j", "t"))
    rejected = {order.written(p): (n, order.largest(p)) for p, n in order.alternatives()}
    assert len(rejected) == 5 and min(n for n, _ in rejected.values()) >= order.operations
    primal = 16 * 32 * 32 + 16 * 16 * 32 + 2 * 16 * 16 * 32 * 32
    assert rejected["(k · g) · (m · q)"] == (primal, (16 * 32 * 32, ("s", "u", "j")))


# -- how graphs are compared and laid out ---------------------------------------------------------------


def nodes(*rows):
    return GraphReport([NodeReport(n, k, o, d, (), tuple(i.split())) for n, k, o, d, i in rows])


def test_what_a_pass_changed():
    x = ("x", "token", "x", "", "")
    before = nodes(
        x, ("a", "elementwise", "exp", "t → t", "x"), ("b", "elementwise", "neg", "t → t", "a")
    )
    after = nodes(
        x,
        ("p", "elementwise", "exp", "t → t", "x"),
        ("q", "contraction", "sum over s", "t s → t", "p"),
        ("r", "elementwise", "neg", "s t → s t", "q"),
    )
    found = compare(before, after, "before")
    assert [n.change for n in found.nodes] == ["", "", "new", "changed"]
    assert compare(after, before, "after").removed == ["sum over s, t s → t"]
    same = compare(after, after, "itself")
    assert not same.removed and {n.change for n in same.nodes} == {""}


def test_layout_keeps_edges_down_and_nodes_apart():
    names = [f"n{i}" for i in range(30)]
    edges = [
        (names[i], names[j])
        for i in range(30)
        for j in range(i + 1, 30)
        if (i * 7 + j * 3) % 11 == 0
    ]
    sizes = {n: (40.0 + 3 * (i % 7), 20.0) for i, n in enumerate(names)}
    made = layered(sizes, edges)
    for a, b in edges:
        assert made.centre[a][1] < made.centre[b][1]
        ys = [y for _, y in made.edges[a, b]]
        assert ys == sorted(ys)
    for a in names:
        for b in names:
            (xa, ya), (xb, yb) = made.centre[a], made.centre[b]
            apart = abs(xa - xb) >= (sizes[a][0] + sizes[b][0]) / 2 - 1e-6
            assert a == b or abs(ya - yb) >= 20 or apart
    assert all(0 <= x <= made.width for x, _ in made.centre.values())


# -- labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measured", [None, 3e13, 3e14])
@pytest.mark.parametrize(
    "before, after", [(0.14, 14), (0.14, 99.3), (0.2, 600), (50, 60), (100, 140)]
)
def test_labels_of_a_roofline_keep_clear_of_each_other(before, after, measured):
    roof = Roofline("H100 SXM", 495e12, "tf32", 3.35e12, before, after, measured)
    drawn = str(figures.roofline(roof, "scan0"))
    found = re.findall(r'<text class="t s( r)?( halo)?" x="([\d.]+)" y="([\d.]+)">([^<]+)', drawn)
    boxes = []
    for at_right, _, x, y, words in found:
        if "FLOP/s" in words and len(words) > 8:
            wide = 5.4 * len(words)
            start = float(x) - wide if at_right else float(x)
            boxes.append((start, start + wide, float(y), words))
    assert len(boxes) == (3 if measured is None else 4)
    for i, (start, end, y, words) in enumerate(boxes):
        for other_start, other_end, other_y, other in boxes[i + 1 :]:
            clear = start > other_end or end < other_start or abs(y - other_y) >= 11
            assert clear, (words, other)


def test_a_roof_allows_less_where_memory_bounds():
    roof = Roofline("H100 SXM", 1e15, "bf16", 4e12, 0.2, 50.0, 3e13)
    assert roof.attainable(0.2) == 0.8e12 and roof.attainable(1000.0) == 1e15
    drawn = str(figures.roofline(roof, "scan0"))
    assert drawn.count("p-measured") == 1 and "measured: 30 TFLOP/s" in drawn
    assert "p-measured" not in str(figures.roofline(replace(roof, measured=None), "scan0"))
