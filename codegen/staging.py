"""How many kernels the loop of a forward is made of, and how much each program of a parallel one handles.

Two kernels take what the state does not wait for out of the chain of mini-batches, and pass every state through memory.
Which is faster follows from the sizes of a call: while programs are few, one that does less goes round sooner, and the
second kernel has the whole device; where programs fill the device nothing is idle that the second kernel would use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tttc.codegen.devices import Device
from tttc.codegen.loop import Loop, only_products_read, used
from tttc.codegen.sizes import (
    MOST_WARPS,
    fits,
    product_flops,
    products,
    state_elements,
    tile_elements,
    tile_rows,
    value_elements,
    wide_tile,
)
from tttc.codegen.solves import has_solves
from tttc.codegen.stages import stages
from tttc.codegen.work import WIDE

# From an H200 (benchmarks/results/2026-11-28-h200-picked.json), rates as shares of what the device does at most.
ALONE = 0.11  # of the matrix products of a multiprocessor, by one program on it
LARGE = 28800  # numbers of a state that takes so many registers that products are half as fast: operands come and go
TOGETHER = 0.09  # by the programs of a parallel kernel
BANDWIDTH = 0.47  # by which values pass between kernels
PRODUCT = 5.8e-8  # seconds that a product takes from the chain of a turn, however small
STORED = 19  # bytes that a program stores a cycle
SECOND = 2.5e-6  # seconds of a second kernel: its launch, its first loads and its last programs
HELD = 16384  # numbers of states and tiles that a multiprocessor holds
TILES = 3  # that live at a time, beside the state
MOST_EACH = 128  # mini-batches a multiprocessor: more change nothing
GROUPS = (1, 4, 8, 16)


@dataclass(frozen=True)
class Call:
    """How much there is to do, and for what: sequences times heads, mini-batches, the device, bytes of a number."""

    programs: int
    mini_batches: int
    device: Device
    element_size: int


@dataclass(frozen=True)
class Split:
    """How many kernels a loop is made of, why, and how many mini-batches of all programs a multiprocessor has."""

    stages: int
    why: str
    each: int = MOST_EACH

    def group(self, warps: int, most: int) -> int:
        """Mini-batches a program of a parallel kernel handles, where one takes so many warps; ``most`` of them."""
        share = self.each * warps // 8  # where a multiprocessor holds eight warps
        return next((n for n in GROUPS if n >= share), most) if share < most else most


WHOLE = Split(1, "one kernel passes no states through memory")


@dataclass(frozen=True)
class Passing:
    """What two kernels change for one mini-batch of one program.

    Attributes:
        flops, products: that the recurrence has fewer.
        parallel: FLOPs of the other kernel.
        traffic, stored: bytes that pass through memory, and those of them that the recurrence stores.
        state, held: numbers of states, and with tiles, that one kernel holds.
    """

    flops: int
    products: int
    parallel: int
    traffic: int
    stored: int
    state: int
    held: int

    @classmethod
    def of(cls, loop: Loop, element_size: int) -> Passing | None:
        """What it is for a loop, ``element_size`` bytes to a number of a token; None where it is one kernel anyway."""
        parts = stages(loop, 2)
        if len(parts) == 1:
            return None
        recurrence, outputs = parts
        wanted = used(outputs)
        read = [(n, s) for n, s in outputs.sources.items() if s.kind in ("saved", "value") and n in wanted]  # fmt: skip
        sizes = {n: element_size if only_products_read(outputs, n) else WIDE for n, _ in read}
        loaded = {s.name: value_elements(outputs, n) * sizes[n] for n, s in read}
        stored = sum(x for name, x in loaded.items() if name not in loop.save)
        return cls(
            product_flops(loop) - product_flops(recurrence),
            products(loop) - products(recurrence),
            product_flops(outputs),
            sum(loaded.values()) + stored,
            stored,
            state_elements(loop),
            state_elements(loop) + TILES * max(tile_elements(loop), wide_tile(loop)),
        )

    def seconds(self, call: Call) -> float:
        """Seconds that two kernels save of a call; less than 0 where one is faster."""
        device = call.device
        rate = (device.half if call.element_size <= 2 else device.single) / device.processors
        each = max(call.programs / device.processors, 1.0)
        # Programs that share a multiprocessor hide each other's waiting.
        together = min(each, max(HELD / self.held, 1.0))
        alone = ALONE / (1.0 + self.state / LARGE)
        gain = (self.flops / (alone * rate) + PRODUCT * self.products) * each / together
        memory = call.programs * self.traffic / (BANDWIDTH * device.bandwidth)
        work = call.programs * self.parallel / (TOGETHER * rate * device.processors)
        storing = self.stored * each / (STORED * device.clock)
        return call.mini_batches * (gain - max(memory, work) - storing) - SECOND


def forward_split(loop: Loop, call: Call) -> Split:
    """The kernels of the loop of a forward."""
    total = call.programs * call.mini_batches / call.device.processors
    each = 1 << min(max(round(math.log2(max(total, 1))), 0), MOST_EACH.bit_length() - 1)
    tiles = loop.tokens or tile_rows(loop) > 1
    if loop.once or loop.refresh or loop.interval > 1 or not tiles:
        return Split(1, "one mini-batch, or tokens one after another: nothing runs beside them")
    if has_solves(loop) and fits(loop, MOST_WARPS):
        why = (
            "triangular systems are solved before the state is known, for all mini-batches at once"
        )
        return Split(3, why, each)
    passing = Passing.of(loop, call.element_size)
    if passing is not None and passing.seconds(call) > 0:
        why = "what the state does not wait for takes longer in one kernel than states take through memory"
        return Split(2, why, each)
    return WHOLE
