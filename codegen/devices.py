"""Figures of devices: what bounds a kernel, from vendors' data sheets and from the driver.

Sources: NVIDIA A100, H100, H200 and B200 data sheets and the architecture white papers of the first two (dense
products; multiprocessors, registers and shared memory of each; boost clocks), AMD Instinct MI300X data sheet and CDNA 3
white paper.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Device:
    """What a device does at most.

    Attributes:
        half, single: dense matrix products in bf16 and in tf32, FLOP/s.
        vector: float32 operations outside matrix units, FLOP/s (a multiply-add counts twice).
        bandwidth: device memory, bytes/s.
        processors: multiprocessors (compute units).
        registers: 32-bit registers of a multiprocessor.
        shared: bytes of shared memory of a multiprocessor.
        clock: cycles a second.
        threads: that a multiprocessor holds at a time.
        thread_registers: that one thread may take.
        warp: threads of a warp.
    """

    name: str
    half: float
    single: float
    vector: float
    bandwidth: float
    processors: int
    registers: int = 65536
    shared: int = 228 * 1024
    clock: float = 1.83e9
    threads: int = 2048
    thread_registers: int = 255
    warp: int = 32


A100 = Device("A100 80 GB SXM", 312e12, 156e12, 19.5e12, 2.039e12, 108, shared=164 * 1024, clock=1.41e9)  # fmt: skip
H100 = Device("H100 SXM", 989.4e12, 494.7e12, 66.9e12, 3.35e12, 132)
H200 = Device("H200 SXM", 989.4e12, 494.7e12, 66.9e12, 4.8e12, 132)
B200 = Device("B200", 2.25e15, 1.125e15, 75e12, 8e12, 148, clock=1.85e9)
MI300X = Device(
    "MI300X", 1307.4e12, 653.7e12, 163.4e12, 5.3e12, 304,
    registers=131072, shared=64 * 1024, clock=2.1e9, thread_registers=512, warp=64,
)  # fmt: skip
BY_TARGET = {"sm_80": A100, "sm_90": H100, "sm_100": B200, "gfx942": MI300X}
BY_NAME = {"A100": A100, "H100": H100, "H200": H200, "B200": B200, "MI300X": MI300X}
ABSENT = H200  # what kernels are only looked at for


def named(name: str) -> Device | None:
    """The device of the table whose name is in ``name``, as a driver gives it."""
    return next((d for key, d in BY_NAME.items() if key in name), None)


def device_of(device: torch.device) -> Device:
    """The figures of a device: of the table, of its driver where that says them; an H200's where it is no GPU.

    A GPU that is not in the table has the figures of the nearest one by architecture, in proportion to its
    multiprocessors and its clock.
    """
    if device.type != "cuda":
        return ABSENT
    return _of_index(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _of_index(index: int) -> Device:
    return from_properties(torch.cuda.get_device_properties(index))


def from_properties(found: Any) -> Device:
    """The figures of a device with these properties (``torch.cuda.get_device_properties``)."""
    amd = bool(getattr(torch.version, "hip", None))
    by_age = (
        MI300X if amd else A100 if found.major <= 8 else H100 if found.major == 9 else B200
    )  # fmt: skip
    known = named(found.name)
    base = known or by_age
    clock = 1e3 * getattr(found, "clock_rate", 0) or base.clock
    bus, memory = getattr(found, "memory_bus_width", 0), getattr(found, "memory_clock_rate", 0)
    share = 1.0 if known else found.multi_processor_count * clock / (base.processors * base.clock)
    # Data is transferred at both edges of the memory's clock.
    bandwidth = base.bandwidth if known or not bus * memory else 2e3 * memory * bus / 8
    return replace(
        base,
        name=found.name,
        half=base.half * share,
        single=base.single * share,
        vector=base.vector * share,
        bandwidth=bandwidth,
        processors=found.multi_processor_count,
        registers=getattr(found, "regs_per_multiprocessor", base.registers),
        shared=getattr(found, "shared_memory_per_multiprocessor", base.shared),
        clock=clock,
        warp=getattr(found, "warp_size", base.warp),
    )
