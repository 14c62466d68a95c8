"""``tttc.explain``: what the compiler did to a model, every stage of it runnable."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from tttc import _recorder
from tttc._scan_op import interned, scan_info
from tttc.compiler import CompiledModule, compile
from tttc.ir.body import Body
from tttc.report import scans as running
from tttc.report.changes import compare
from tttc.report.costs import stage_cost
from tttc.report.graphs import stage_graph
from tttc.report.kernels import default_target, kernels_of, save, scan_launches
from tttc.report.leaves import leaf_names
from tttc.report.model import sizes_of
from tttc.report.orders import orders_of
from tttc.report.records import GraphReport, ModelReport, ScanReport, StageReport
from tttc.report.recurrence import recurrence_of
from tttc.report.roofline import device_name, roofline_of, time_call
from tttc.report.source import sources_of
from tttc.report.stages import about

if TYPE_CHECKING:
    from tttc.codegen.kernel import Kernel


class Explanation:
    """What :func:`explain` found.

    Attributes:
        stages: ordered ``{name: torch.fx.GraphModule}``, each of which runs: ``ex.stages[n](*ex.example_inputs(n))``.
            ``model.captured`` is the graph TorchDynamo captured, its scans the naive loop; ``model.aten`` the
            same in ATen operators, its scans compiled; ``model.fused`` after fusion. Then come the stages of each
            distinct scan: ``dualise``, or ``scan1.dualise`` where there are several.
        scans: one :class:`ScanReport` for each distinct scan.
        models: one :class:`ModelReport` for each captured graph.
        layers: ``{name of a layer: name of its scan}``; equal layers share one. The model itself is ``""``.
        name: what the model is called: its class, or the function's name.
        versions: of tttc, torch, triton and Python.
        kernels: the emitted kernels, each with ``name``, ``source``, ``path``, ``config``, ``resources``, ``cost``.
    """

    def __init__(self) -> None:
        self.stages: dict[str, fx.GraphModule] = {}
        self.scans: list[ScanReport] = []
        self.models: list[ModelReport] = []
        self.layers: dict[str, str] = {}
        self.kernels: list[Kernel] = []
        self.name = ""
        self.versions = versions()
        self._parameters: dict[int, str] = {}  # names by data pointer
        self._inputs: dict[str, tuple[Any, ...]] = {}

    def example_inputs(self, stage: str) -> tuple[Any, ...]:
        """Arguments for a stage, taken from the model's own input.

        A stage of the model gets what it was called with; a stage of a scan one mini-batch of the first head of
        the first sequence, or one token of it.

        Raises:
            KeyError: there is no such stage.
            ValueError: the stage was never called.
        """
        if stage not in self.stages:
            raise KeyError(f"stage: expected one of {', '.join(self.stages)}, got {stage!r}")
        if stage not in self._inputs:
            raise ValueError(f"stage: {stage} was never called with the input given")
        return self._inputs[stage]

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as one HTML file that loads nothing and runs nothing, also written to ``path`` if given.

        For each distinct scan: the step as written, each stage drawn, what its pass changed, contraction orders,
        the recurrence, kernels and why they are scheduled so, errors, a roofline. Equal layers are shown once.
        """
        from tttc.report.html import page

        return _written(page(self), path)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """All of the report as JSON, also written to ``path`` if given.

        Its schema is ``tttc/report/schema.json`` (JSON Schema 2020-12), which says what each field means.
        """
        return _written(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", path)

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`to_json` writes: dictionaries, lists, strings, numbers and None."""
        from tttc.report.document import document

        return document(self)

    def to_svg(self, what: str, path: str | os.PathLike[str] | None = None) -> str:
        """A picture for a paper as SVG with its own (light) colours, also written to ``path`` if given.

        Args:
            what: a stage, by its name in :attr:`stages`; or ``"recurrence"``, ``"errors"``, ``"roofline"``, after
                the scan's name where there are several (``"scan1.recurrence"``).
            path: where to write it.

        Raises:
            KeyError: there is no such picture.

        Example:
            >>> import torch, tttc
            >>> layer = tttc.nn.TTTLinear(16, num_heads=2, mini_batch_size=4)
            >>> ex = tttc.explain(layer, torch.randn(1, 8, 16), backend="torch", target="")
            >>> ex.to_svg("dualise")[:4]
            '<svg'
        """
        from tttc.report.pictures import picture

        return _written(picture(self, what), path)

    def _repr_html_(self) -> str:
        from tttc.report.html import frame

        return frame(self)

    def __str__(self) -> str:
        from tttc.report.render import explanation
        from tttc.report.text import plain

        return plain(*explanation(self))

    def __rich__(self) -> Any:
        from rich.console import Group

        from tttc.report.render import explanation

        return Group(*explanation(self))

    def __repr__(self) -> str:
        return (
            f"<Explanation: {len(self.stages)} stages, {len(self.scans)} distinct scans in "
            f"{len(self.layers)} layers, {len(self.kernels)} kernels>"
        )


def _written(text: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def versions() -> dict[str, str]:
    """Of what a report depends on."""
    import triton

    return {
        "tttc": importlib.metadata.version("tttc"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def explain(
    model: Callable[..., Any],
    *args: Any,
    backend: str | None = None,
    mini_batch_size: int | None = None,
    check_tokens: int | None = 256,
    target: str | None = None,
    timed: bool | None = None,
    **kwargs: Any,
) -> Explanation:
    """Compile a model for an input, run it once, and say what the compiler did.

    Args:
        model: an ``nn.Module`` or function as :func:`tttc.compile` takes it, or what that returned for a module.
        args, kwargs: what the model is called with.
        backend: as for :func:`tttc.compile`; "auto" where nothing else is said.
        mini_batch_size: as for :func:`tttc.compile`.
        check_tokens: how many tokens of each distinct scan are compared with the naive loop in float64, which
            takes milliseconds a token; None for all, 0 for none.
        target: the GPU for which the kernels' registers, spills and shared memory are given, ``"sm_90"`` or
            ``"gfx942"``, say; it need not be there. None for the GPU at hand, else sm_90; "" for no figures.
        timed: whether each distinct scan is timed on the model's input; None: where that is on a GPU.

    Returns:
        An :class:`Explanation`; ``print`` it.

    Raises:
        TypeError, ValueError: as :func:`tttc.compile`, or whatever the model raises.

    Example:
        >>> import torch, tttc
        >>> layer = tttc.nn.TTTLinear(64, num_heads=4, mini_batch_size=8)
        >>> ex = tttc.explain(layer, torch.randn(1, 16, 64), backend="torch")
        >>> ex.scans[0].form, ex.scans[0].errors["outputs"] < 1e-5
        ('dual', True)
        >>> carry_and_outputs = ex.stages["dualise"](*ex.example_inputs("dualise"))
    """
    if isinstance(model, CompiledModule):
        options = model._tttc_options
        model, backend = model._tttc_module, backend or options.backend
        mini_batch_size = mini_batch_size or options.mini_batch_size
    with _recorder.record() as recording, torch.no_grad():
        compiled = compile(model, backend=backend or "auto", mini_batch_size=mini_batch_size)
        compiled(*args, **kwargs)
    explanation = Explanation()
    explanation.name = _name_of(model)
    if isinstance(model, torch.nn.Module):
        held = [*model.named_parameters(), *model.named_buffers()]
        explanation._parameters = {x.data_ptr(): name for name, x in held if x.numel()}
    calls: dict[tuple[str, int], running.Call] = {}
    _add_models(explanation, recording, calls)
    target = default_target() if target is None else target
    _add_scans(explanation, recording, calls, check_tokens)
    _add_kernels(explanation, recording, calls, target)
    _add_times(explanation, calls, target, timed)
    explanation.kernels += {k.path: k for k in recording.kernels}.values()
    save(explanation.kernels)
    return explanation


def _name_of(model: Any) -> str:
    if isinstance(model, torch.nn.Module):
        return type(model).__name__
    return getattr(model, "__qualname__", type(model).__name__)


# -- graphs of the model ----------------------------------------------------------------------------------


def _add_models(
    explanation: Explanation,
    recording: _recorder.Recording,
    calls: dict[tuple[str, int], running.Call],
) -> None:
    several = sum(s.name == "captured" for s in recording.stages) > 1
    for stage in recording.stages:
        if stage.name == "captured":
            prefix = f"model{len(explanation.models)}" if several else "model"
            explanation.models.append(ModelReport(prefix, {}))
        report = explanation.models[-1]
        name = f"{report.name}.{stage.name}"
        explanation.stages[name] = stage.module
        report.nodes[stage.name] = sum(n.op.startswith("call_") for n in stage.module.graph.nodes)
        if stage.inputs is not None:
            explanation._inputs[name] = stage.inputs
        fusion = stage.module.meta.get("fusion")
        if fusion is not None and stage.inputs is not None:
            sizes = sizes_of(stage.module, stage.inputs)
            report.regions = fusion.regions
            report.bytes_before = float(fusion.bytes_before.subs(sizes))
            report.bytes_after = float(fusion.bytes_after.subs(sizes))
        if stage.name == "aten" and stage.inputs is not None:
            calls.update(running.collect_calls(stage.module, stage.inputs))


# -- scans ----------------------------------------------------------------------------------------------


def _add_scans(
    explanation: Explanation,
    recording: _recorder.Recording,
    calls: Mapping[tuple[str, int], running.Call],
    check_tokens: int | None,
) -> None:
    distinct: dict[tuple[str, int], list[_recorder.Site]] = {}
    for site in recording.sites:
        distinct.setdefault((site.key, site.mini_batch_size), []).append(site)
    for i, (key, sites) in enumerate(distinct.items()):
        call = calls.get(key)
        report = _scan_report(f"scan{i}", sites, call)
        explanation.scans.append(report)
        for layer in report.layers:
            explanation.layers[layer] = report.name
        prefix = f"{report.name}." if len(distinct) > 1 else ""
        _add_stages(explanation, report, sites[0], call, prefix)
        if call is not None and call.lowered and not call.empty and check_tokens != 0:
            _check(report, call, check_tokens)


def _scan_report(name: str, sites: list[_recorder.Site], call: running.Call | None) -> ScanReport:
    first = sites[0]
    program = first.program
    captured = first.where is not None or program is not None
    form = "eager"
    if program is not None:
        lowered = "chunkwise" if program.chunk_size is not None else "dual"
        form = "sequential" if program.sequential else lowered
    report = ScanReport(
        name,
        key=first.key,
        step=first.key.rpartition("#")[0] or first.key,
        where=running.source_of_step(first.key) if captured else None,
        mini_batch_size=first.mini_batch_size,
        layers=list(dict.fromkeys(s.layer for s in sites)),
        sites=list(dict.fromkeys(s.where for s in sites if s.where)),
        form=form,
        reason=first.reason if program is None else program.reason,
        unit=first.mini_batch_size if program is None else program.unit,
        says=first.said if first.said != first.mini_batch_size else None,
    )
    if call is not None:
        report.batch, report.heads, report.tokens = call.tokens[0].shape[:3]
        report.element_size = call.tokens[0].element_size()
        report.compute_size = scan_info(call.anchor, call.tokens, call.shared).compute.itemsize
    if captured:
        entry = interned(first.key)
        step = program.stages.get("capture") if program is not None else None
        report.sources = sources_of(entry.step, step if isinstance(step, fx.GraphModule) else None)
    if program is not None:
        names = leaf_names(interned(first.key))
        report.recurrence = recurrence_of(program, names)
        if program.full is not None:
            report.orders = orders_of(program.full.orders, names)
    return report


def _add_stages(
    explanation: Explanation,
    report: ScanReport,
    site: _recorder.Site,
    call: running.Call | None,
    prefix: str,
) -> None:
    if site.program is None:
        return
    names = leaf_names(interned(report.key))
    graphs: dict[str, GraphReport] = {}
    groups = running.one_head(call, report.unit) if call is not None and not call.empty else None
    expected: list[torch.Tensor] = []
    rule = "update_at_anchor" in site.program.stages
    size = site.said if rule and site.said is not None else report.mini_batch_size
    if groups is not None and call is not None:
        key = interned(report.key).of if rule else report.key
        expected = running.naive_mini_batch(groups, key or report.key, size)
    for name, stage in site.program.stages.items():
        title, text, before = about(name, list(graphs))
        graphs[name] = stage_graph(stage, names)
        if before is not None and isinstance(site.program.stages[before], Body):
            graphs[name] = compare(graphs[before], graphs[name], before)
        is_body = isinstance(stage, Body)
        gm = stage.gm if isinstance(stage, Body) else stage
        explanation.stages[prefix + name] = gm
        error = None
        if groups is not None and call is not None:
            if rule and name == "update_at_anchor":  # from here on it is another rule
                rule, size = False, report.mini_batch_size
                expected = running.naive_mini_batch(groups, report.key, size)
            explanation._inputs[prefix + name] = running.stage_inputs(stage, groups)
            error = running.stage_error(stage, groups, expected, size)
        report.stages.append(
            StageReport(
                name,
                sum(n.op.startswith("call_") for n in gm.graph.nodes),
                stage_cost(stage, report.unit) if is_body else None,  # type: ignore[arg-type]
                error,
                graphs[name],
                title,
                text,
            )
        )


def _add_kernels(
    explanation: Explanation,
    recording: _recorder.Recording,
    calls: Mapping[tuple[str, int], running.Call],
    target: str,
) -> None:
    programs = {(s.key, s.mini_batch_size): s.program for s in recording.sites if s.program}
    reports = {(r.key, r.mini_batch_size): r for r in explanation.scans}
    for key, program in programs.items():
        call = calls.get(key)
        if call is None or call.empty:
            continue
        made = kernels_of(scan_launches(program, call), target)
        reports[key].kernels = made
        explanation.kernels += made


def _add_times(
    explanation: Explanation,
    calls: Mapping[tuple[str, int], running.Call],
    target: str,
    timed: bool | None,
) -> None:
    for report in explanation.scans:
        call = calls.get((report.key, report.mini_batch_size))
        if call is not None and call.lowered and not call.empty:
            device = call.tokens[0].device
            if device.type == "cuda" if timed is None else timed:
                report.seconds, report.timed_on = time_call(call), device_name(device)
        report.roofline = roofline_of(report, target)


def _check(report: ScanReport, call: running.Call, tokens: int | None) -> None:
    report.checked = call.length if tokens is None else min(tokens, call.length)
    got, expected = call.run(report.checked), call.naive(report.checked)
    leaves = len(call.anchor)
    report.errors = _errors(got, expected, leaves)
    if report.says is not None:
        # Anchors are those of other mini-batches: the carries are compared.
        rule = call.naive_rule(report.checked, report.says)
        report.deviation = _errors(got[leaves:], rule[leaves:], leaves, kinds=1)


def _errors(
    got: list[torch.Tensor], expected: list[torch.Tensor], leaves: int, kinds: int = 2
) -> dict[str, float]:
    """The largest errors: of outputs, and of what comes before them, ``kinds`` times ``leaves`` of the state."""
    pairs = [running.relative_error(x, y) for x, y in zip(got, expected, strict=True)]
    outputs = max(pairs[kinds * leaves :], default=0.0)
    return {"outputs": outputs, "states": max(pairs[: kinds * leaves])}
