"""An explanation as one HTML file: nothing loaded, no script, whatever comes from the user's model escaped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from tttc.report import figures
from tttc.report.costs import StageCost, expression
from tttc.report.drawing import draw
from tttc.report.model import model_graph
from tttc.report.records import GraphReport, ScanReport, SourceReport, StageReport
from tttc.report.render import options_of, origin_of, recurrence_words, shortened
from tttc.report.text import byte_count, count, error, seconds, several

if TYPE_CHECKING:
    from tttc.codegen.kernel import Kernel
    from tttc.report.explanation import Explanation

FORMS = {
    "dual": ("Dual form.", "A mini-batch of tokens at a time; no token’s fast weights are made."),
    "chunkwise": (
        "Chunkwise.",
        "An online rule, a chunk of tokens at a time, exactly: what tokens depend on is solved for.",
    ),
    "sequential": ("Sequential.", "Token after token, fused into one kernel, the state on chip."),
    "eager": ("Eager.", "It runs as the naive loop: the step has no form in the compiler’s IR."),
}
KINDS = ("contraction", "elementwise", "reduction", "view", "state", "token", "parameter")
BRIEF = 60  # lines of source that are shown without asking
OPENED = (
    "dualise",
    "chunkwise",
    "at_carry",
    "simplify_step",
    "normalise",
)  # the first there is stands open


def page(ex: Explanation) -> str:
    """The whole document."""
    environment = _environment()
    in_scans = {id(k) for scan in ex.scans for k in scan.kernels}
    in_scans |= {id(k) for scan in ex.scans if scan.backward for k in scan.backward.kernels}
    return environment.get_template("report.html.j2").render(
        ex=ex,
        excerpts=list(_excerpts(ex)),
        others=[k for k in ex.kernels if id(k) not in in_scans],
        style=_style(),
        forms=FORMS,
        kinds=KINDS,
        figures=figures,
        shortened=shortened,
        python=_python,
        several=several,
        kernel=_kernel,
        drawn=_drawn,
        opened=_opened,
        part=_share,
        times=_times,
        sizes=_sizes,
        costs=_costs,
        contractions=_contractions,
        difference=_difference,
        first_paragraph=_first_paragraph,
        rest=_rest,
        brief=_brief,
        recurrence_words=recurrence_words,
        backward_words=_backward_words,
        options_of=options_of,
        roofline_words=_roofline_words,
    )


def frame(ex: Explanation) -> str:
    """The document in a frame of its own, for notebooks: its style touches nothing else."""
    shown = Markup(
        '<iframe title="What tttc did" sandbox="" style="width:100%;height:80vh;border:1px solid #8886" '
        'srcdoc="{}"></iframe>'
    ).format(page(ex))
    return str(shown)  # what a notebook puts together with it must not be escaped


@cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("tttc.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters |= {
        "count": lambda x: count(x).strip(),
        "bytes": byte_count,
        "error": error,
        "seconds": seconds,
    }
    return made


@cache
def _style() -> Markup:
    from pygments.formatters import HtmlFormatter

    source = _environment().loader.get_source(_environment(), "report.css")[0]  # type: ignore[union-attr]
    light = HtmlFormatter(style="default").get_style_defs(".hl")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".hl")
    plain = ".hl{background:none!important;color:inherit!important}.hl .err{border:0!important}"
    return Markup(f"{source}{light}@media (prefers-color-scheme:dark){{{dark}}}{plain}")


def _python(text: str, first: int = 1) -> Markup:
    """Highlighted Python with line numbers."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    form = HtmlFormatter(cssclass="hl", linenos="inline", linenostart=first)
    return Markup(highlight(text, PythonLexer(), form))


def _kernel(kernel: Kernel, level: int = 4) -> Markup:
    schedule = kernel.config.get("schedule")
    reasons = dict(schedule.reasons) if schedule is not None else {}
    options = options_of(kernel)
    default = type(schedule)().choices() if schedule is not None else options
    chosen = {k: v for k, v in options.items() if k in reasons or v != default[k]}
    return Markup(
        _environment()
        .get_template("kernel.html.j2")
        .render(
            k=kernel,
            level=level,
            r=kernel.resources,
            chosen=chosen,
            usual={k: v for k, v in options.items() if k not in chosen},
            reasons=reasons,
            origin=origin_of(kernel),
            source=_python(kernel.source),
        )
    )


def _excerpts(ex: Explanation) -> Iterator[tuple[str, Markup]]:
    """The fused graph around one scan of each kind."""
    for model in ex.models:
        stage = f"{model.name}.fused"
        for scan in ex.scans if stage in ex.stages else ():
            graph = model_graph(ex, stage, around=scan.key)
            if graph.nodes:
                title = f"{stage}, around {scan.name}"
                yield title, drawing_of(title, graph)


def _drawn(scan: ScanReport, stage: StageReport) -> Markup:
    return drawing_of(f"{scan.name}.{stage.name}", stage.graph)


def drawing_of(name: str, graph: GraphReport, *, alone: bool = False) -> Markup:
    """The graph of a stage with its title and description."""
    kinds: dict[str, int] = {}
    for node in graph.operators:
        kinds[node.kind] = kinds.get(node.kind, 0) + 1
    said = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    described = f"{several(len(graph.operators), 'operator')}: {said}. {_difference(graph)}".strip()
    return draw(graph, f"Graph of {name}", described, alone=alone)


def _difference(graph: GraphReport) -> str:
    """What a pass did to a graph, in words."""
    if graph.compared is None:
        return ""
    counts = [
        (graph.count("new"), "new"),
        (graph.count("changed"), "on other dimensions"),
        (len(graph.removed), "removed"),
    ]
    said = ", ".join(f"{n} {what}" for n, what in counts if n)
    return f"{said}; {graph.count('')} kept." if said else "nothing to change."


def _opened(scan: ScanReport) -> str:
    names = [s.name for s in scan.stages]
    return next((n for n in OPENED if n in names), "")


def _share(stages: Sequence[StageReport], stage: StageReport, what: str) -> str:
    """A stage's share of the largest cost of its kind, in percent."""
    largest = max(s.cost.number(what) for s in stages if s.cost is not None)
    return f"{100 * stage.cost.number(what) / largest:.0f}" if stage.cost and largest else "0"


def _times(pair: tuple[float, float]) -> str:
    before, after = pair
    if not before or not after or f"{before / after:.2g}" == "1":
        return "about the same" if before != after else "the same"
    ratio = max(before, after) / min(before, after)
    shown = f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.3g}"
    return f"{shown} × {'fewer' if before > after else 'more'}"


def _sizes(cost: StageCost) -> str:
    return ", ".join(f"{k} = {v}" for k, v in sorted(cost.sizes.items(), key=str))


def _costs(scan: ScanReport) -> Iterator[tuple[str, str, float, Any]]:
    before, after, compared = scan.before, scan.after, scan.compared
    if before is not None and after is not None and compared is not None:
        yield "FLOPs before", expression(before.flops), compared.flops[0], count
        yield "FLOPs after", expression(after.flops), compared.flops[1], count
        yield (
            "bytes before",
            expression(before.op_by_op, scan.compute_size),
            compared.bytes[0],
            byte_count,
        )
        yield (
            "bytes after",
            expression(after.fused, scan.element_size),
            compared.bytes[1],
            byte_count,
        )


def _contractions(stage: StageReport) -> int:
    return sum(n.kind == "contraction" for n in stage.graph.nodes)


def _brief(sources: Sequence[SourceReport]) -> bool:
    return sum(s.text.count("\n") + 1 for s in sources) <= BRIEF


def _first_paragraph(text: str) -> str:
    return text.partition("\n\n")[0].replace("\n", " ").replace("``", "").replace(":func:", "")


def _rest(text: str) -> str:
    return text.partition("\n\n")[2]


def _backward_words(scan: ScanReport) -> str:
    back = scan.backward
    assert back is not None
    if not back.stages:
        return f"None was derived: {back.reason}."
    after, cost = scan.after, back.cost
    words = (
        f"The vector-Jacobian product of {back.of}, the body that runs, derived operator by operator; no gradient of any "
        f"layer is written by hand. Mini-batches go from the last to the first, the state of each saved by the forward or "
        f"computed again; the cotangents of {shortened(back.wanted, 6)} come out."
    )
    if after is not None and cost is not None:
        ratio = cost.number("flops") / max(after.number("flops"), 1.0)
        words += f" It takes {ratio:.3g} times the FLOPs of the forward."
    if back.reason:
        words += f" It runs by torch operations: {back.reason}."
    return words


def _roofline_words(scan: ScanReport) -> str:
    roof = scan.roofline
    assert roof is not None
    ridge = roof.peak / roof.bandwidth
    bound = "memory" if roof.after < ridge else "arithmetic"
    words = (
        f"On {roof.device} (data sheet: {count(roof.peak)}FLOP/s, {count(roof.bandwidth)}B/s) the naive step, a kernel for "
        f"each operator, has {roof.before:.3g} FLOPs for each byte; compiled it has {roof.after:.3g}, and {bound} bounds it."
    )
    if roof.measured:
        part = 100 * roof.measured / roof.attainable(roof.after)
        words += f" Measured: {count(roof.measured)}FLOP/s, {part:.0f} % of what the roofs allow."
    return words
