"""How long a kernel takes under a schedule, estimated without running it, and which schedules are worth a measurement.

``seconds = launch + max(traffic / bandwidth, products / matrix rate, waves * turns * turn)``: memory, the matrix units,
or the chain of mini-batches, whichever is slowest. Traffic, products, turns and programs are sympy expressions in the
sizes of the call (:mod:`tttc.codegen.work`); a turn is what a multiprocessor takes for one mini-batch of the programs it
holds at a time (:mod:`tttc.codegen.timeline`), which follows from warps and live registers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sympy
from tttc.codegen.devices import Device
from tttc.codegen.loop import Loop
from tttc.codegen.schedule import Schedule
from tttc.codegen.timeline import Timeline, Turn
from tttc.codegen.work import Work, work

LAUNCH = 4e-6  # seconds of a launch
ATTAINED = 0.8  # of a data sheet's rates, by a kernel that does little else
BLOCKS = 32  # programs that a multiprocessor holds at most


@dataclass(frozen=True)
class Estimate:
    """The estimate of one kernel.

    Attributes:
        seconds: how long it takes.
        work: what all its programs do, in symbols.
        turn: one mini-batch of one program.
        resident: programs that a multiprocessor holds at a time.
        spilled: registers of a thread that there is no room for.
        bound: what is slowest: "memory", "products" or "latency".
    """

    seconds: float
    work: Work
    turn: Turn
    resident: int
    spilled: int
    bound: str


class CostModel:
    """Estimates schedules of one loop at one size, on one device.

    Args:
        loop: of one kernel.
        sizes: B, H and T of the call.
        device: whose figures count.
        element_size: bytes of a number of a token.

    Example:
        >>> import torch
        >>> from torch import fx
        >>> from tttc.codegen.devices import H200
        >>> from tttc.codegen.loop import Loop, Sink, Source
        >>> graph = fx.Graph()
        >>> x = graph.placeholder("token_0")
        >>> x.meta["dims"] = ("t", "i")
        >>> _ = graph.output((x,))
        >>> loop = Loop("copy", graph, {"i": 64}, 16, {x: Source("token", "x")}, [(x, Sink("token", "y"))])
        >>> model = CostModel(loop, (16, 32, 2048), H200, 2)
        >>> model.estimate(Schedule()).work.traffic
        4*B*H*b*i*ceiling(T/b)
    """

    def __init__(
        self, loop: Loop, sizes: tuple[int, int, int], device: Device, element_size: int
    ) -> None:
        self.loop, self.sizes, self.device = loop, sizes, device
        self.element_size = element_size
        self.timeline = Timeline(loop, device, element_size)
        self._numbers = functools.cache(self._evaluate)

    def _evaluate(self, nan: str, narrow: bool, group: int) -> tuple[Work, dict[str, float]]:
        made = work(self.loop, Schedule(nan=nan, narrow=narrow, group=group), self.element_size)
        table = made.table(self.loop, *self.sizes)
        names = ("programs", "turns", "traffic", "products")
        return made, {n: float(sympy.sympify(getattr(made, n)).subs(table)) for n in names}

    def estimate(self, schedule: Schedule) -> Estimate:
        """The estimate of a schedule."""
        device, warps = self.device, schedule.num_warps
        made, numbers = self._numbers(schedule.nan, schedule.narrow, schedule.group)
        turn = self.timeline.turn(schedule)
        threads = device.warp * warps
        limit = min(device.thread_registers, device.registers // threads)
        if schedule.maxnreg is not None:
            limit = min(limit, schedule.maxnreg)
        taken = -(-min(turn.registers, limit) // 8) * 8
        resident = max(
            1,
            min(
                device.registers // (taken * threads),
                device.shared // max(turn.shared, 1),
                device.threads // threads,
                BLOCKS,
            ),
        )
        each = numbers["programs"] / device.processors
        together = min(resident, max(each, 1.0))
        # Programs of a last wave have a multiprocessor more to themselves.
        waves = max(each / resident, 1.0) if self.loop.parallel else max(-(-each // resident), 1.0)
        cycles = max(turn.latency, together * turn.issue)
        rate = device.half if self.element_size <= 2 else device.single
        bounds = {
            "memory": numbers["traffic"] / (ATTAINED * device.bandwidth),
            "products": numbers["products"] / (ATTAINED * rate),
            "latency": waves * numbers["turns"] * cycles / device.clock,
        }
        bound = max(bounds, key=bounds.__getitem__)
        # What is not slowest still takes part of its time beside what is.
        seconds = LAUNCH + bounds[bound] + 0.1 * (sum(bounds.values()) - bounds[bound])
        return Estimate(seconds, made, turn, resident, max(turn.registers - limit, 0), bound)

    def rank(self, schedules: Iterable[Schedule]) -> list[tuple[Schedule, Estimate]]:
        """Schedules from the fastest to the slowest; of equals the first given comes first."""
        found = [(s, self.estimate(s)) for s in schedules]
        return sorted(found, key=lambda pair: pair[1].seconds)


def total(estimates: Sequence[Estimate]) -> float:
    """Seconds of kernels that run one after another."""
    return sum(e.seconds for e in estimates)
