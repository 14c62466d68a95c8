"""Reports as rich tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tttc.report.costs import expression
from tttc.report.text import NARROW, byte_count, count, error, seconds, several

if TYPE_CHECKING:
    from tttc.codegen.kernel import Kernel
    from tttc.report.explanation import Explanation
    from tttc.report.records import (
        BackwardReport,
        ModelReport,
        RecurrenceReport,
        ScanReport,
        StageReport,
    )
    from tttc.report.results import BenchmarkResult

FORMS = {
    "dual": "dual form: a mini-batch at a time",
    "chunkwise": "chunkwise: a chunk of tokens at a time, exactly",
    "sequential": "sequential: token by token, fused",
    "eager": "eager: the naive loop",
}
ORDERS_SHOWN = 6


def explanation(ex: Explanation) -> Iterator[Any]:
    """What ``print`` shows of an explanation."""
    if ex.models:
        yield Text("The model", style="bold")
        yield _models(ex.models)
    for scan in ex.scans:
        yield from _scan(ex, scan)
    if ex.kernels:
        targets = {
            k.resources["target"] for k in ex.kernels if k.resources and "target" in k.resources
        }
        yield Text(
            "\nKernels" + f" (figures for {', '.join(sorted(targets))})" * bool(targets),
            style="bold",
        )
        yield kernels(ex.kernels)
    if not ex.scans:
        yield Text("No tttc.scan was met: the model ran as it is.")


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right", overflow="fold")
    return table


def _facts() -> Table:
    table = _table("", "", left=2)
    table.show_header = False
    return table


def _models(models: list[ModelReport]) -> Padding:
    table = _table(
        "graph", "operators captured", "ATen", "fused", "regions", "bytes, memory-bound ops"
    )
    for m in models:
        moved = ""
        if m.bytes_before is not None and m.bytes_after is not None:
            moved = f"{byte_count(m.bytes_before)} → {byte_count(m.bytes_after)}"
        cells = [str(m.nodes.get(x, "")) for x in ("captured", "aten", "fused")]
        table.add_row(m.name, *cells, str(m.regions or ""), moved)
    return Padding(table, (0, 0, 0, 2))


def _scan(ex: Explanation, scan: ScanReport) -> Iterator[Any]:
    yield Text(f"\n{scan.name}: {scan.step}", style="bold")
    facts = _facts()
    if scan.where:
        facts.add_row("step", escape(scan.where))
    if any(scan.layers):
        facts.add_row("layers", f"{len(scan.layers)}: {escape(shortened(scan.layers))}")
    facts.add_row("form", FORMS[scan.form] + (f"; {escape(scan.reason)}" if scan.reason else ""))
    if scan.tokens:
        facts.add_row(
            "input",
            f"batch {scan.batch}, heads {scan.heads}, tokens {scan.tokens}, "
            f"mini-batches of {scan.mini_batch_size}"
            + (f", in chunks of {scan.unit}" if scan.unit != scan.mini_batch_size else ""),
        )
    if scan.deviation:
        shown = ", ".join(f"{k} {error(v)}" for k, v in scan.deviation.items())
        facts.add_row(
            "approximates",
            f"a rule with mini-batches of {scan.says}; deviation from it: {shown} (first {scan.checked} tokens)",
        )
    if scan.errors:
        shown = ", ".join(f"{k} {error(v)}" for k, v in scan.errors.items())
        facts.add_row(
            "error",
            f"{shown} relative to the naive loop{' of the approximation' if scan.deviation else ''} "
            f"in float64 (first {scan.checked} tokens)",
        )
    yield Padding(facts, (0, 0, 0, 2))
    if scan.stages:
        yield Text("  Each stage, for one mini-batch and head:", style="dim")
        yield _stages(ex, scan, scan.stages)
        yield from _costs(scan)
    if scan.orders:
        yield Text("  Products whose order of evaluation was chosen, in operations:", style="dim")
        yield _orders(scan)
    if scan.backward is not None:
        yield from _backward(ex, scan, scan.backward)


def recurrence_words(found: RecurrenceReport) -> str:
    """What goes from one mini-batch to the next, and how much waits for it."""
    critical = found.part("recurrence")
    beside = sum(p.nodes for p in found.parts) - critical.nodes
    carried = f"{'cotangents of ' if found.reverse else ''}{', '.join(found.states) or 'no states'}"
    start, one = ("From the last", "cotangent") if found.reverse else ("From one", "state")
    return (
        f"{start} {found.unit} to the {'first' if found.reverse else 'next'}: {carried}. On the way from one {one} to the "
        f"next lie {several(critical.nodes, 'operator')}, {100 * found.share:.0f} % of the FLOPs; the longest chain has "
        f"{critical.depth}, with {several(critical.products, 'contraction')}. Beside it: {several(beside, 'operator')}."
    )


def _orders(scan: ScanReport) -> Padding:
    table = _table("product", "result", "chosen", "next best", "at once", left=2)
    for order in scan.orders[:ORDERS_SHOWN]:
        following = count(order.rejected[0].operations) if order.rejected else ""
        cells = count(order.chosen.operations), following, count(order.at_once)
        table.add_row(escape(order.chosen.written), escape(order.result), *cells)
    if len(scan.orders) > ORDERS_SHOWN:
        table.add_row(
            f"and {len(scan.orders) - ORDERS_SHOWN} more in .scans[{scan.name[4:]}].orders"
        )
    return Padding(table, (0, 0, 0, 4))


class Fitted:
    """What is made for the width there is."""

    def __init__(self, made: Callable[[bool], Any]) -> None:
        self.made = made

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        yield self.made(options.max_width >= NARROW)


def _stages(ex: Explanation, scan: ScanReport, stages: Sequence[StageReport]) -> Fitted:
    def made(wide: bool) -> Padding:
        says = ("",) if wide else ()
        numbers = ("nodes", "products", "FLOPs", "bytes op by op", "largest value", "error")
        if not wide:
            numbers = ("nodes", "products", "FLOPs", "bytes", "largest", "error")
        table = _table("stage", *says, *numbers, left=1 + len(says))
        for s in stages:
            name = s.name if s.name in ex.stages else f"{scan.name}.{s.name}"
            products = sum(n.kind == "contraction" for n in s.graph.nodes)
            costs = ("", "", "")
            if s.cost is not None:
                costs = (
                    count(s.cost.number("flops")),
                    byte_count(scan.compute_size * s.cost.number("op_by_op")),
                    byte_count(scan.compute_size * s.cost.number("largest")),
                )
            title = (s.title,) if wide else ()
            table.add_row(name, *title, str(s.nodes), str(products), *costs, error(s.error))
        return Padding(table, (0, 0, 0, 4 if wide else 2))

    return Fitted(made)


def _backward(ex: Explanation, scan: ScanReport, back: BackwardReport) -> Iterator[Any]:
    if not back.stages:
        yield Text(f"  Backward: none was derived: {back.reason}", style="dim")
        return
    yield Text(f"  Backward, the vector-Jacobian product of {back.of}:", style="dim")
    yield _stages(ex, scan, back.stages)
    facts = _facts()
    if back.recurrence is not None:
        facts.add_row("recurrence", recurrence_words(back.recurrence))
    if back.reason:
        facts.add_row("kernels", f"none: {escape(back.reason)}")
    if back.errors:
        worst = max(back.errors, key=lambda n: back.errors[n])
        facts.add_row(
            "gradients",
            f"largest error {error(back.error)}, of {escape(worst)}, against the naive loop in float64 "
            f"(first {back.checked} tokens)",
        )
    yield Padding(facts, (0, 0, 0, 4))


def _costs(scan: ScanReport) -> Iterator[Any]:
    before, after, compared = scan.before, scan.after, scan.compared
    if before is None or after is None or compared is None:
        return
    yield Text("  Before (the naive step, op by op) and after (in one kernel):", style="dim")
    table = _table("", "", "a mini-batch and head", "the whole input", left=2)
    whole = scan.batch * scan.heads * scan.tokens / scan.unit
    for label, formula, number, show in (
        ("FLOPs before", before.flops, compared.flops[0], count),
        ("FLOPs after", after.flops, compared.flops[1], count),
        ("bytes before", before.op_by_op, compared.bytes[0], byte_count),
        ("bytes after", after.fused, compared.bytes[1], byte_count),
    ):
        table.add_row(
            label, expression(formula), show(number), show(whole * number) if whole else ""
        )
    intensity = " → ".join(f"{x:.3g}" for x in compared.intensity)
    table.add_row("FLOPs a byte", "", intensity, "")
    names = ", ".join(f"{k} = {v}" for k, v in sorted(after.sizes.items(), key=str))
    table.add_row("", f"where {names}", "", "")
    yield Padding(table, (0, 0, 0, 4))


def kernels(items: list[Kernel]) -> Padding:
    """What each kernel takes, what was chosen for it, and the file it is in."""

    def made(wide: bool) -> Table:
        says = ("chosen",) if wide else ()
        table = _table("kernel", *says, "registers", "spilled", "shared", left=1 + len(says))
        for k in items:
            resources = k.resources or {}
            chosen = (escape(_chosen(k)),) if wide else ()
            table.add_row(
                escape(k.name),
                *chosen,
                str(resources.get("registers", "error" if "error" in resources else "")),
                _bytes(resources.get("spill_bytes")),
                _bytes(resources.get("shared_bytes")),
            )
        return table

    wrong = [
        Text(f"{k.name}: {k.resources['error']}") for k in items if "error" in (k.resources or {})
    ]
    origins = dict.fromkeys(f"schedule by {x}" for k in items if (x := origin_of(k)))
    files = "\n".join(f"  {k.path.name}" for k in items)
    text = "\n".join([f"sources, in that order, in {items[0].path.parent}:\n{files}", *origins])
    return Padding(
        Group(Fitted(made), *wrong, Text(text, style="dim", overflow="fold")), (0, 0, 0, 2)
    )


def _chosen(kernel: Kernel) -> str:
    """The choices of a kernel that are not those of every kernel."""
    schedule = kernel.config.get("schedule")
    usual = type(schedule)().choices() if schedule is not None else {}
    always = ("num_warps", "num_stages")
    options = options_of(kernel).items()
    return " ".join(f"{n}={v}" for n, v in options if n in always or usual.get(n) != v)


def options_of(kernel: Kernel) -> dict[str, Any]:
    """The choices of a kernel's schedule, or its launch options."""
    schedule = kernel.config.get("schedule")
    if schedule is not None:
        return schedule.choices()
    return {n: v for n, v in kernel.config.items() if isinstance(v, (bool, int, str))}


def origin_of(kernel: Kernel) -> str:
    """Where the schedule of a kernel comes from, in words; "" where it has none."""
    schedule = kernel.config.get("schedule")
    return "" if schedule is None else schedule.origin


def _bytes(x: float | None) -> str:
    return "" if x is None else byte_count(x)


def shortened(names: list[str], shown: int = 4) -> str:
    """A list of names, its middle left out where it is long."""
    if len(names) <= shown:
        return ", ".join(names)
    return f"{', '.join(names[: shown - 1])}, ..., {names[-1]}"


def benchmark(result: BenchmarkResult) -> Iterator[Any]:
    """What ``print`` shows of a benchmark."""
    what = "forward and backward" if result.backward else "forward"
    yield Text(f"{what}, {', '.join(result.inputs)}, {result.device}, {result.threads} threads")
    table = _table("", "median", "fastest to slowest", "times eager", "first call", "error")
    gradients = any(r.gradient_error is not None for r in result.rows)
    memory = any(r.peak_memory is not None for r in result.rows)
    if gradients:
        table.add_column("gradient error", justify="right")
    if memory:
        table.add_column("peak memory", justify="right")
    for row in result.rows:
        median = f"> {seconds(row.at_least)}" if row.at_least is not None else ""
        spread = ""
        if row.median is not None and row.spread is not None:
            median = seconds(row.median)
            spread = f"{seconds(row.spread[0])} to {seconds(row.spread[1])}"
        speed = result.speed_up(row.name)
        shown = "" if speed is None else f"{'> ' * speed[1]}{speed[0]:.3g}"
        first = "" if row.first_call is None else seconds(row.first_call)
        cells = [row.name, median, spread, shown, first, error(row.error)]
        cells += [error(row.gradient_error)] * gradients
        cells += [_bytes(row.peak_memory)] * memory
        table.add_row(*cells)
    yield Padding(table, (0, 0, 0, 2))
    for row in result.rows:
        if row.note:
            yield Text(f"  {row.name}: {row.note}")
    yield Text(f"  errors relative to the largest value of {result.reference}", style="dim")
