"""The roofs of a device, and where a scan lies under them.

Source: Williams, Waterman, Patterson: Roofline, an insightful visual performance model (CACM 52, 2009).
"""

from __future__ import annotations

import torch

from tttc.codegen.devices import BY_TARGET, named
from tttc.report.records import Roofline, ScanReport
from tttc.report.scans import Call


def roofline_of(scan: ScanReport, target: str) -> Roofline | None:
    """The roofline of a scan on the device it was timed on, else the device of ``target``; None for others."""
    compared = scan.compared
    timed = named(scan.timed_on or "")
    device = timed or BY_TARGET.get(target)
    if compared is None or device is None or not scan.tokens or min(compared.bytes) <= 0:
        return None
    half = scan.element_size <= 2
    measured = None
    if timed and scan.seconds and scan.after is not None:
        measured = scan.total(scan.after, "flops") / scan.seconds
    before, after = compared.intensity
    return Roofline(
        device.name,
        device.half if half else device.single,
        "bf16" if half else "tf32",
        device.bandwidth,
        before,
        after,
        measured,
    )


def time_call(call: Call) -> float:
    """Seconds that a scan takes: the median of repeated runs, by PyTorch's own timer."""
    from torch.utils.benchmark import Timer

    with torch.no_grad():
        timer = Timer(
            "run(**arguments)", globals={"run": call.operator, "arguments": call.arguments}
        )
        return timer.blocked_autorange(min_run_time=0.2).median


def device_name(device: torch.device) -> str:
    """What a device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
