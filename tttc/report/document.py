"""An explanation as plain data; its schema is schema.json beside this file."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tttc.report.costs import StageCost, expression
from tttc.report.records import BackwardReport, RegionReport, ScanReport, StageReport
from tttc.report.render import options_of, origin_of

if TYPE_CHECKING:
    from tttc.codegen.kernel import Kernel
    from tttc.report.explanation import Explanation

SCHEMA = "tttc-explanation/2"


def document(ex: Explanation) -> dict[str, Any]:
    """Dictionaries, lists, strings, numbers and None."""
    owner: dict[int, tuple[str, str]] = {
        id(k): (scan.name, "forward") for scan in ex.scans for k in scan.kernels
    }
    owner |= {
        id(k): (scan.name, "backward")
        for scan in ex.scans
        if scan.backward is not None
        for k in scan.backward.kernels
    }
    return _finite({
        "schema": SCHEMA,
        "name": ex.name,
        "versions": ex.versions,
        "layers": ex.layers,
        "models": [asdict(m) for m in ex.models],
        "scans": [_scan(s) for s in ex.scans],
        "kernels": [
            _kernel(k, owner.get(id(k)), ex.regions.get(str(k.path))) for k in ex.kernels
        ],
    })  # fmt: skip


def _finite(x: Any) -> Any:
    """``x`` with numbers that JSON has no form for (an error that is not a number) as strings."""
    if isinstance(x, dict):
        return {k: _finite(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_finite(v) for v in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def _scan(scan: ScanReport) -> dict[str, Any]:
    names = ("batch", "heads", "tokens", "element_size", "compute_size")
    compared = scan.compared
    return {
        "name": scan.name,
        "step": scan.step,
        "where": scan.where,
        "layers": scan.layers,
        "sites": scan.sites,
        "mini_batch_size": scan.mini_batch_size,
        "tokens_at_a_time": scan.unit,
        "form": scan.form,
        "reason": scan.reason,
        "input": {n: getattr(scan, n) for n in names},
        "sources": [asdict(s) for s in scan.sources],
        "stages": [_stage(s) for s in scan.stages],
        "before_and_after": None
        if compared is None
        else {**asdict(compared), "intensity": compared.intensity},
        "orders": [asdict(o) for o in scan.orders],
        "recurrence": None if scan.recurrence is None else asdict(scan.recurrence),
        "backward": None if scan.backward is None else _backward(scan.backward),
        "errors": scan.errors,
        "says": scan.says,
        "deviation": scan.deviation,
        "checked_tokens": scan.checked,
        "seconds": scan.seconds,
        "timed_on": scan.timed_on,
        "roofline": None if scan.roofline is None else asdict(scan.roofline),
    }


def _backward(found: BackwardReport) -> dict[str, Any]:
    return {
        "of": found.of,
        "wanted": found.wanted,
        "stages": [_stage(s) for s in found.stages],
        "recurrence": None if found.recurrence is None else asdict(found.recurrence),
        "reason": found.reason,
        "errors": found.errors,
        "checked_tokens": found.checked,
    }


def _stage(stage: StageReport) -> dict[str, Any]:
    graph = stage.graph
    return {
        "name": stage.name,
        "title": stage.title,
        "nodes": stage.nodes,
        "cost": None if stage.cost is None else _cost(stage.cost),
        "error": stage.error,
        "graph": {
            "compared": graph.compared,
            "removed": graph.removed,
            "nodes": [asdict(n) for n in graph.nodes],
        },
    }


def _cost(cost: StageCost) -> dict[str, Any]:
    fields = ("flops", "op_by_op", "fused", "largest")
    found: dict[str, Any] = {
        n: {"expression": expression(getattr(cost, n)), "value": cost.number(n)} for n in fields
    }
    return {**found, "sizes": {str(k): v for k, v in sorted(cost.sizes.items(), key=str)}}


def _kernel(
    kernel: Kernel, owner: tuple[str, str] | None, region: RegionReport | None
) -> dict[str, Any]:
    scan, direction = owner or (None, None)
    schedule = kernel.config.get("schedule")
    return {
        "name": kernel.name,
        "scan": scan,
        "direction": direction,
        "regions": None if region is None else region.count,
        "operators": [] if region is None else region.operators,
        "path": str(kernel.path),
        "source": kernel.source,
        "options": options_of(kernel),
        "reasons": dict(schedule.reasons) if schedule is not None else {},
        "origin": origin_of(kernel),
        "resources": kernel.resources,
        "bytes": (kernel.cost or {}).get("bytes"),
    }
