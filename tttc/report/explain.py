"""``tttc.explain``: what the compiler did to a model, every stage of it runnable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from tttc import _recorder
from tttc._scan_op import interned, scan_info
from tttc.codegen.kernel import Kernel
from tttc.codegen.resources import Request
from tttc.compiler import CompiledModule, compile
from tttc.ir.body import Body
from tttc.report import scans as running
from tttc.report.backward import backward_of
from tttc.report.changes import compare
from tttc.report.costs import stage_cost
from tttc.report.explanation import Explanation
from tttc.report.gradients import gradient_errors
from tttc.report.graphs import stage_graph
from tttc.report.kernels import (
    backward_launches,
    default_target,
    launch_bytes,
    save,
    scan_launches,
    with_resources,
)
from tttc.report.leaves import leaf_names
from tttc.report.model import sizes_of
from tttc.report.orders import orders_of
from tttc.report.records import (
    GraphReport,
    ModelReport,
    RegionReport,
    ScanReport,
    StageReport,
)
from tttc.report.recurrence import recurrence_of
from tttc.report.regions import region_report, region_request, regions_of
from tttc.report.roofline import device_name, roofline_of, time_call
from tttc.report.source import sources_of
from tttc.report.stages import about
from tttc.runtime.launch import Launch

Calls = dict[tuple[str, int], running.Call]


def explain(
    model: Callable[..., Any],
    *args: Any,
    backend: str | None = None,
    mini_batch_size: int | None = None,
    backward: bool | None = None,
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
        backward: whether the backward of each distinct scan is explained too; None: where a parameter or an input
            requires a gradient.
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
    calls: Calls = {}
    _add_models(explanation, recording, calls)
    target = default_target() if target is None else target
    _add_scans(explanation, recording, calls, check_tokens)
    if _wants_gradients(model, args, kwargs) if backward is None else backward:
        _add_backwards(explanation, recording, calls, check_tokens)
    _add_kernels(explanation, recording, calls, target)
    _add_times(explanation, calls, target, timed)
    save(explanation.kernels)
    return explanation


def _wants_gradients(model: Any, args: Any, kwargs: Any) -> bool:
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    tensors += model.parameters() if isinstance(model, torch.nn.Module) else []
    return any(x.requires_grad for x in tensors)


def _name_of(model: Any) -> str:
    if isinstance(model, torch.nn.Module):
        return type(model).__name__
    return getattr(model, "__qualname__", type(model).__name__)


# -- graphs of the model ----------------------------------------------------------------------------------


def _add_models(
    explanation: Explanation,
    recording: _recorder.Recording,
    calls: Calls,
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
            report.orders = orders_of(program.full, names)
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


def _add_backwards(
    explanation: Explanation,
    recording: _recorder.Recording,
    calls: Calls,
    check_tokens: int | None,
) -> None:
    programs = {(s.key, s.mini_batch_size): s.program for s in recording.sites if s.program}
    for report in explanation.scans:
        key = (report.key, report.mini_batch_size)
        program, call = programs.get(key), calls.get(key)
        if program is None or call is None or call.empty or not call.lowered:
            continue
        graphs = {s.name: s.graph for s in report.stages}
        report.backward, stages = backward_of(program, call, graphs)
        prefix = f"{report.name}." if len(explanation.scans) > 1 else ""
        for name, (body, inputs) in stages.items():
            explanation.stages[prefix + name] = body.gm
            explanation._inputs[prefix + name] = inputs
        if stages and check_tokens != 0:
            # Two mini-batches and a token of a third: autograd through the naive loop is slow.
            most = min(2 * report.unit + 1, call.length)
            checked = most if check_tokens is None else min(most, check_tokens)
            report.backward.errors = gradient_errors(call, checked)
            report.backward.checked = checked


def _add_kernels(
    explanation: Explanation,
    recording: _recorder.Recording,
    calls: Calls,
    target: str,
) -> None:
    """The kernels of scans, of their backwards and of regions, compiled together for their figures."""
    programs = {(s.key, s.mini_batch_size): s.program for s in recording.sites if s.program}
    wanted: list[tuple[Kernel, Request | None]] = []
    owners: list[list[Kernel]] = []

    def want(launches: list[Launch], owner: list[Kernel]) -> None:
        for x in launches:
            wanted.append((replace(x.kernel, cost={"bytes": launch_bytes(x)}), x.request()))
            owners.append(owner)

    for report in explanation.scans:
        key = (report.key, report.mini_batch_size)
        program, call = programs.get(key), calls.get(key)
        if program is None or call is None or call.empty:
            continue
        want(scan_launches(program, call), report.kernels)
        if report.backward is not None and report.backward.stages:
            launches, report.backward.reason = backward_launches(program, call)
            want(launches, report.backward.kernels)
    around = {str(k.path): k for k in recording.kernels}
    found = _region_requests(explanation, recording)
    for path, kernel in around.items():
        region, request = found.get(path, (None, None))
        cost = {"bytes": region.bytes_after} if region is not None else None
        wanted.append((replace(kernel, cost=cost), request))
        owners.append([])
    for kernel, owner in zip(with_resources(wanted, target), owners, strict=True):
        owner.append(kernel)
        explanation.kernels.append(kernel)


def _region_requests(
    explanation: Explanation, recording: _recorder.Recording
) -> dict[str, tuple[RegionReport, Request | None]]:
    """What compiles the kernels of fused regions, by file; explanations get what shares each."""
    made: dict[str, tuple[RegionReport, Request | None]] = {}
    for stage in recording.stages:
        if stage.name != "fused" or stage.inputs is None:
            continue
        sizes = sizes_of(stage.module, stage.inputs)
        for path, regions in regions_of(stage.module).items():
            report = region_report(regions, sizes)
            if path in made:
                made[path][0].count += report.count
            else:
                made[path] = (report, region_request(regions[0], sizes))
    explanation.regions = {path: report for path, (report, _) in made.items()}
    return made


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
