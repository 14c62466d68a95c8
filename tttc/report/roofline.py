"""The roofs of a device, and where a scan lies under them.

Source: Williams, Waterman, Patterson: Roofline, an insightful visual performance model (CACM 52, 2009).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tttc.report.records import Roofline, ScanReport
from tttc.report.scans import Call


class Device(NamedTuple):
    """From a vendor's data sheet: dense matrix products in bf16 and in tf32 (FLOP/s), memory (bytes/s)."""

    name: str
    half: float
    single: float
    bandwidth: float


A100 = Device("A100 80 GB SXM", 312e12, 156e12, 2.039e12)
H100 = Device("H100 SXM", 989.4e12, 494.7e12, 3.35e12)
H200 = Device("H200 SXM", 989.4e12, 494.7e12, 4.8e12)
B200 = Device("B200", 2.25e15, 1.125e15, 8e12)
MI300X = Device("MI300X", 1307.4e12, 653.7e12, 5.3e12)
BY_TARGET = {"sm_80": A100, "sm_90": H100, "sm_100": B200, "gfx942": MI300X}
BY_NAME = {"A100": A100, "H100": H100, "H200": H200, "B200": B200, "MI300X": MI300X}


def roofline_of(scan: ScanReport, target: str) -> Roofline | None:
    """The roofline of a scan on the device it was timed on, else the device of ``target``; None for others."""
    compared = scan.compared
    named = [d for key, d in BY_NAME.items() if key in (scan.timed_on or "")]
    device = named[0] if named else BY_TARGET.get(target)
    if compared is None or device is None or not scan.tokens or min(compared.bytes) <= 0:
        return None
    half = scan.element_size <= 2
    measured = None
    if named and scan.seconds and scan.after is not None:
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
