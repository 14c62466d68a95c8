"""The backward of a scan in a report: the graphs it is derived through, its recurrence, its errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tttc._scan_op import interned
from tttc.codegen.torch_scan_backward import derive, live_cotangents
from tttc.ir.body import Body
from tttc.ir.errors import NotLowerable
from tttc.ir.program import Program
from tttc.passes.backward import backward
from tttc.report.changes import compare
from tttc.report.costs import stage_cost
from tttc.report.gradients import backward_error, backward_inputs, naive_gradients
from tttc.report.graphs import stage_graph
from tttc.report.leaves import leaf_names
from tttc.report.records import BackwardReport, GraphReport, StageReport
from tttc.report.recurrence import backward_recurrence
from tttc.report.scans import Call, one_head
from tttc.report.stages import about
from tttc.runtime.fused_scan import floating_leaves

Stages = dict[str, tuple[Body, tuple[Any, ...]]]  # each with arguments


def backward_of(
    program: Program, call: Call, graphs: Mapping[str, GraphReport]
) -> tuple[BackwardReport, Stages]:
    """The backward of the body that runs, where outputs have cotangents and tokens, parameters and state want them.

    ``graphs``: those of the stages of the forward. Kernels are filled in by whoever compiles them.
    """
    part = "token" if program.sequential else "full"
    forward: Body = getattr(program, part)
    of = next(n for n in reversed(program.stages) if program.stages[n] is forward)
    leaves = floating_leaves(call.tokens, call.shared)
    try:
        live = live_cotangents(program, leaves, ())
        made = derive(program, part, leaves, live)
        derived = backward(forward, made.wanted, live).body
    except NotLowerable as error:
        return BackwardReport(of, [], [], reason=error.reason), {}
    names = leaf_names(interned(call.key))
    wanted = [names.get(name, name) for name in made.wanted]
    report = BackwardReport(of, wanted, [], backward_recurrence(program, made, names))
    groups = one_head(call, 1 if program.sequential else program.unit)
    expected = naive_gradients(groups, call.key, program.mini_batch_size)
    before, before_name, stages = graphs[of], of, Stages()
    for name, body in (("backward", derived), ("simplify_backward", made.body)):
        title, text, _ = about(name, [before_name])
        graph = compare(before, stage_graph(body, names, made.wanted), before_name)
        inputs = backward_inputs(body, forward, groups)
        report.stages.append(
            StageReport(
                name,
                len(body.nodes),
                stage_cost(body, program.unit),
                backward_error(body, made.wanted, inputs, expected),
                graph,
                title,
                text,
            )
        )
        stages[name] = (body, inputs)
        before, before_name = graph, name
    return report, stages
