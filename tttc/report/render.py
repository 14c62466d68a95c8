"""Reports as rich tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tttc.report.costs import expression, kinds
from tttc.report.text import byte_count, count, error, seconds

if TYPE_CHECKING:
    from tttc.codegen.kernel import Kernel
    from tttc.report.benchmark import BenchmarkResult
    from tttc.report.explain import Explanation
    from tttc.report.records import ModelReport, ScanReport

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
    facts = _table("", "", left=2)
    facts.show_header = False
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
        yield _stages(ex, scan)
        yield from _costs(scan)
    if scan.orders:
        yield Text("  Products whose order of evaluation was chosen, in operations:", style="dim")
        yield _orders(scan)


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


def _stages(ex: Explanation, scan: ScanReport) -> Padding:
    table = _table(
        "stage",
        "",
        "nodes",
        "contractions",
        "FLOPs",
        "bytes op by op",
        "largest value",
        "error",
        left=2,
    )
    for s in scan.stages:
        name = s.name if s.name in ex.stages else f"{scan.name}.{s.name}"
        products = kinds(ex.stages[name]).get("contraction", 0)
        costs = ("", "", "", "")
        if s.cost is not None:
            costs = (
                str(products),
                count(s.cost.number("flops")),
                byte_count(scan.compute_size * s.cost.number("op_by_op")),
                byte_count(scan.compute_size * s.cost.number("largest")),
            )
        table.add_row(name, s.title, str(s.nodes), *costs, error(s.error))
    return Padding(table, (0, 0, 0, 4))


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
    """Name, launch options, resources and source of kernels."""
    table = _table("kernel", "options", "registers", "spilled", "shared", left=2)
    for k in items:
        resources = k.resources or {}
        options = " ".join(f"{n}={v}" for n, v in options_of(k).items() if v is not None)
        table.add_row(
            escape(k.name),
            escape(options),
            str(resources.get("registers", "")),
            _bytes(resources.get("spill_bytes")),
            _bytes(resources.get("shared_bytes")),
        )
    notes = [f"source: {k.path}" for k in items]
    notes += dict.fromkeys(f"schedule by {x}" for k in items if (x := origin_of(k)))
    return Padding(Group(table, Text("\n".join(notes), style="dim", overflow="fold")), (0, 0, 0, 2))


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
