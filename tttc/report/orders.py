"""The products of a scan whose order of evaluation was chosen, beside the orders that were not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from tttc.ir.body import Body
from tttc.ir.build import ancestors, dims_of
from tttc.ir.order import Order, Path
from tttc.report.graphs import operation_of
from tttc.report.records import OrderChoice, OrderReport

REJECTED = 12  # orders kept of those rejected: the cheapest


def orders_of(body: Body, names: Mapping[str, str]) -> list[OrderReport]:
    """Each distinct product of a body, dearest at once first; ``names`` are the user's for arguments."""
    distinct = dict.fromkeys(_said(order, names) for order in body.orders)
    nodes = {n.name: n for n in body.nodes}
    reports = [_report(order, nodes, names) for order in distinct]
    return sorted(reports, key=lambda r: -r.at_once)


def _said(order: Order, names: Mapping[str, str]) -> Order:
    """The order in the user's names, its labels in letters: t, s, ... for what is summed inside."""
    letter = _letters(order)
    return replace(
        order,
        operands=tuple(
            (names.get(name, name), tuple(letter[x] for x in labels))
            for name, labels in order.operands
        ),
        result=tuple(letter[x] for x in order.result),
        sizes=tuple((letter[x], n) for x, n in order.sizes),
    )


def _letters(order: Order) -> dict[str, str]:
    """Labels as they are shown: those made up while terms were expanded (z0, z1, ...) get free letters."""
    labels = [x for x, _ in order.sizes] + [x for x in order.result]
    used = {x for x in labels if not x.startswith("z")}
    free = (c for c in "sumnpqrvwxy" if c not in used)
    table: dict[str, str] = {}
    for x in labels:
        if x not in table:
            table[x] = next(free, x) if x.startswith("z") else x
    return table


def _meaning(node: fx.Node, names: Mapping[str, str]) -> str:
    """What a value is: the operator that makes it, its dimensions, and the arguments it is made of."""
    _, operation, _ = operation_of(node)
    arguments = [n for n in ancestors([node]) if n.op == "placeholder"]
    made_of = sorted(names.get(str(n.target), str(n.target)) for n in arguments)
    return f"{operation} [{' '.join(dims_of(node))}], made of {', '.join(made_of) or 'numbers'}"


def _report(order: Order, nodes: Mapping[str, fx.Node], names: Mapping[str, str]) -> OrderReport:
    operands = [f"{name or 'mask'}[{' '.join(labels)}]" for name, labels in order.operands]
    return OrderReport(
        operands,
        f"[{' '.join(order.result)}]",
        _choice(order, order.path, order.operations),
        order.at_once,
        [_choice(order, path, n) for path, n in order.alternatives()[:REJECTED]],
        {name: _meaning(nodes[name], names) for name, _ in order.operands if name in nodes},
    )


def _choice(order: Order, path: Path, operations: int) -> OrderChoice:
    elements, labels = order.largest(path)
    return OrderChoice(order.written(path), operations, elements, f"[{' '.join(labels)}]")
