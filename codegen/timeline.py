"""One turn of a kernel's loop as a multiprocessor issues it: how long it takes, and what it keeps in registers.

A warp issues in order and waits where an operand is not there yet, so the order of a schedule, where it loads and how
many warps share the work all show in it. Figures are cycles of a Hopper multiprocessor, from microbenchmarks (Luo et al.:
Dissecting the NVIDIA Hopper Architecture through Microbenchmarking, arXiv 2501.12084); they rank schedules and promise
no times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx
from tttc.codegen.devices import Device
from tttc.codegen.loop import Loop, used
from tttc.codegen.ordering import least_live, products_first
from tttc.codegen.schedule import Schedule
from tttc.codegen.triton_tiles import padded
from tttc.codegen.work import VIEWS, instructions, is_product, narrow, through_memory

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, is_token, spec_of
from tttc.ir.build import dims_of
from tttc.ir.spec import Dims, parse

SCHEDULERS = 4  # of a multiprocessor: each issues one instruction a cycle
MEMORY_LATENCY = 650
COPY_LATENCY = 30  # from shared memory
ARITHMETIC_LATENCY = 6
STEP_LATENCY = 16  # of a matrix unit, for 16 more of the inner dimension
SPILLED_COST = 30  # instructions for each number that is stored and loaded again in every turn
SLACK = 1.2  # the assembler computes a few values again rather than keep them
OVERHEAD_REGISTERS = 44  # addresses, masks, counters


@dataclass(frozen=True)
class Figures:
    """What differs between renderers; all but plain Triton's from benchmarks/results/2026-11-28-h200-picked.json.

    Attributes:
        product: cycles from operands to the first result of a product.
        operand: instructions for each number of an operand: rounded, stored, loaded as the unit takes it.
        sum: cycles of a sum along rows, within a warp.
        barrier: cycles that warps wait for each other.
        registers: of a number that lives in a thread, with what the assembler keeps longer than the graph says.
        in_shared: whether what is loaded stays in shared memory.
        shared_pairs: whether warps share products of pairs of tokens; else each makes all of them.
    """

    product: float = 110
    operand: float = 2.5
    sum: float = 120
    barrier: float = 40
    registers: float = 1.25
    in_shared: bool = False
    shared_pairs: bool = True


FIGURES = {
    "triton": Figures(),
    "features": Figures(60, 0.65, 26, 105, 0.62, True, False),
    "warps": Figures(60, 0.65, 26, 105, 0.62, True),
    "gluon": Figures(60, 0.65, 120, 40, 0.25, True),
}


@dataclass(frozen=True)
class Turn:
    """One turn of the loop of one program.

    Attributes:
        latency: cycles from turn to turn, by itself on a multiprocessor.
        issue: cycles in which all four schedulers issue for it.
        registers: of a thread, before the compiler spills any.
        shared: bytes of shared memory.
    """

    latency: float
    issue: float
    registers: int
    shared: int


class Timeline:
    """What the turns of one loop have in common."""

    def __init__(self, loop: Loop, device: Device, element_size: int) -> None:
        self.loop, self.device, self.element_size = loop, device, element_size
        self.used = used(loop)
        self._elements: dict[Dims, int] = {}
        self.fetched, self.kept = through_memory(loop)
        self.nodes = self._varying()
        self.dotted = {d for n in self.used if n.op == "call_function" and self.on_unit(n)
                       for d in parse(spec_of(n)).labels}  # fmt: skip
        self._orders: dict[str, list[fx.Node]] = {}
        self._spec_of = {n: parse(spec_of(n)) for n in self.nodes}
        # Places of values: of a state there is one, whichever node reads it.
        places: dict[object, int] = {}
        self._slots: dict[fx.Node, int] = {}
        for node in loop.graph.nodes:
            source = loop.sources.get(node)
            name: object = source.name if source is not None and source.kind == "state" else node
            self._slots[node] = places.setdefault(name, len(places))
        self._kept = [self._slots[n] for n in self.kept]
        self._stored = [2.0 * self.elements(dims_of(n)) for n in self.kept]
        new = {s.name: self._slots[n] for n, s in loop.sinks if s.kind == "state"}
        self._renewed = [(places[name], slot) for name, slot in new.items() if name in places]
        self._steps: dict[str, list[tuple[fx.Node, int, tuple[int, ...]]]] = {}
        # What only some fields of a schedule change is worked out once.
        self._costs: dict[object, dict[fx.Node, tuple[float, float]]] = {}
        self._registers: dict[object, int] = {}
        self._loaded: dict[bool, list[float]] = {}
        operands = [sum(self.elements(dims_of(x)) for x in n.all_input_nodes)
                    for n in self.nodes if self.on_unit(n)]  # fmt: skip
        self._operands = max(operands, default=0) * element_size
        self._ahead = sum(self.elements(dims_of(n)) for n in self.fetched) * element_size

    def _varying(self) -> list[fx.Node]:
        varying = {n for n, s in self.loop.sources.items() if s.kind not in ("shared", "constant")}
        found = []
        for node in self.loop.graph.nodes:
            operator = node.op == "call_function" and node in self.used
            if operator and any(x in varying for x in node.all_input_nodes):
                varying.add(node)
                found.append(node)
        return found

    def on_unit(self, node: fx.Node) -> bool:
        """Whether a matrix unit makes a node."""
        least = 2 if self.loop.tokens else 8
        sizes = [self.size(d) for d in parse(spec_of(node)).labels]
        return node.target is ops.triangular_solve or (is_product(node) and min(sizes) >= least)

    def size(self, dim: str) -> int:
        """The size of a dimension."""
        return self.loop.mini_batch_size if is_token(dim) else self.loop.sizes[dim]

    def elements(self, dims: Dims) -> int:
        """The numbers of a tile, padded."""
        found = self._elements.get(dims)
        if found is None:
            sides = (padded(self.size(d), 16 if d in self.dotted else 1) for d in dims)
            found = self._elements[dims] = math.prod(sides)
        return found

    def order(self, name: str) -> list[fx.Node]:
        """The operators of a turn as a schedule orders them."""
        if name not in self._orders:
            if name == "products_first":
                made = products_first(self.nodes)
            elif name == "least_live":
                held = {n for n, _ in self.loop.sinks}
                size = {
                    n: 0 if n.target in VIEWS else self.elements(dims_of(n)) for n in self.nodes
                }
                made = least_live(
                    self.nodes, lambda n: size.get(n, self.elements(dims_of(n))), held, {}
                )
            else:
                made = self.nodes
            self._orders[name] = made
        return self._orders[name]

    def turn(self, schedule: Schedule) -> Turn:
        """The turn under a schedule."""
        warps = schedule.num_warps
        registers, costs = self.registers(schedule), self.costs(schedule)
        limit = self.device.registers // (self.device.warp * warps)
        limit = schedule.maxnreg or min(self.device.thread_registers, limit)
        spilled = max(registers - SLACK * limit, 0)
        width, all_ = min(warps, SCHEDULERS) * self.device.warp, SCHEDULERS * self.device.warp
        wide = self.loaded(schedule)
        hidden = schedule.num_stages > 1 and not schedule.prefetch
        arrives = COPY_LATENCY if hidden else MEMORY_LATENCY
        fetched = [(self._slots[n], count) for n, count in zip(self.fetched, wide, strict=True)]
        fetching = dict(fetched)
        steps = (
            self._steps[schedule.order] if schedule.order in self._steps else self._made(schedule)
        )
        outside = sum(wide) + sum(self._stored) + SPILLED_COST * spilled * warps * self.device.warp
        issue = (sum(c for c, _ in costs.values()) + outside) / all_
        ready = [0.0] * len(self._slots)
        now, ends = 0.0, []
        for _ in range(2):  # the second finds the state as the first left it
            late = fetching if schedule.late_loads else {}
            arrived = dict.fromkeys(late, False)
            ahead: dict[int, float] = {}
            if schedule.prefetch:
                ahead = {slot: ready[slot] for slot in fetching}
            if not late:
                for slot, count in fetched:
                    now += count / width
                    ready[slot] = now + arrives
            for node, slot, inputs in steps:
                for x in inputs:
                    if x in arrived and not arrived[x]:
                        arrived[x] = True
                        now += late[x] / width
                        ready[x] = now + arrives
                for x in inputs:
                    there = ahead.get(x, ready[x]) if ahead else ready[x]
                    now = max(now, there)
                cost, latency = costs[node]
                now += cost / width
                ready[slot] = now + latency
            for slot, count in zip(self._kept, self._stored, strict=True):
                now = max(now, ready[slot]) + count / width
            now += SPILLED_COST * spilled * warps * self.device.warp / width
            for old, new in self._renewed:
                ready[old] = ready[new]
            ends.append(now)
        return Turn(ends[-1] - ends[-2], issue, registers, self.shared(schedule))

    def loaded(self, schedule: Schedule) -> list[float]:
        """Instructions of all threads for each load: a vector of 16 bytes each, and its conversion."""
        if schedule.narrow not in self._loaded:
            sizes = [
                self.element_size if narrow(self.loop, n, schedule) else 4 for n in self.fetched
            ]
            self._loaded[schedule.narrow] = [
                self.elements(dims_of(n)) * (1 + size / 4)
                for n, size in zip(self.fetched, sizes, strict=True)
            ]
        return self._loaded[schedule.narrow]

    def _made(self, schedule: Schedule) -> list[tuple[fx.Node, int, tuple[int, ...]]]:
        """The operators of an order with the places of their values."""
        made = [
            (n, self._slots[n], tuple(self._slots[x] for x in n.all_input_nodes))
            for n in self.order(schedule.order)
        ]
        self._steps[schedule.order] = made
        return made

    def costs(self, schedule: Schedule) -> dict[fx.Node, tuple[float, float]]:
        """Of every operator: see :meth:`_cost`."""
        key = (schedule.num_warps, schedule.nan, schedule.feature_major, schedule.renderer)
        if key not in self._costs:
            self._costs[key] = {n: self._cost(n, schedule) for n in self.nodes}
        return self._costs[key]

    def _cost(self, node: fx.Node, schedule: Schedule) -> tuple[float, float]:
        """Instructions of all threads for a node, and cycles after the last of them until it is there."""
        if node.target in VIEWS:
            return 0.0, 0.0
        labels = self._spec_of[node].labels
        figures = FIGURES[schedule.renderer]
        several = figures.barrier * (schedule.num_warps.bit_length() - 1) / 2
        pair = all(map(is_token, dims_of(node))) and len(dims_of(node)) == 2
        every = 1 if figures.shared_pairs or not pair else schedule.num_warps
        if self.on_unit(node):
            times, depth = 1, 1.0
            if node.target is ops.triangular_solve:
                labels = (TOKEN, EARLIER, *labels[-1:])
                times = depth = 2 * self.loop.mini_batch_size.bit_length()
            elif node.target is ops.masked_contraction and schedule.nan == "product":
                times, depth = 2, 1.3  # one beside the other
            volume = self.elements(labels)
            rate = self.device.half if self.element_size <= 2 else self.device.single
            each = rate / 2 / self.device.processors / self.device.clock  # products a cycle
            units = min(schedule.num_warps, SCHEDULERS) / SCHEDULERS
            busy = (
                volume / each * self.device.warp * SCHEDULERS * units * self.copies(node, schedule)
            )
            operands = sum(self.elements(dims_of(x)) for x in node.all_input_nodes)
            inner = self.elements(self._spec_of[node].summed[:1] or (TOKEN,))
            latency = figures.product + several + STEP_LATENCY * max(inner // 16, 1)
            checked = 0
            if node.target is ops.masked_contraction and schedule.nan == "branch":
                checked = min(self.elements(dims_of(x)) for x in node.all_input_nodes)
                latency += 0.3 * figures.sum + 3 * several
            return every * times * (figures.operand * operands + busy) + checked, depth * latency
        count = every * self.elements(labels) * instructions(node)
        if len(labels) > len(dims_of(node)) or node.target in (ops.reduction, ops.running_product):
            return count, figures.sum + several
        return count, ARITHMETIC_LATENCY

    def copies(self, node: fx.Node, schedule: Schedule) -> int:
        """How often warps make the rows of a product: four of them share 64 rows at a time (wgmma)."""
        rows = self.rows(dims_of(node), schedule)
        return max(1, 16 * schedule.num_warps // rows) if rows >= 64 else 1

    def rows(self, dims: Dims, schedule: Schedule) -> int:
        """The first side of a tile."""
        if len(dims) < 2:
            return 1
        features = [self.elements((d,)) for d in dims if not is_token(d)]
        tokens = [self.elements((d,)) for d in dims if is_token(d)]
        if schedule.feature_major:
            return max(features) if features else tokens[0]
        return tokens[0] if tokens else features[0]

    def registers(self, schedule: Schedule) -> int:
        """Registers of a thread: the most that lives at a time, by the order of the operators."""
        fields = (
            "num_warps",
            "order",
            "feature_major",
            "late_loads",
            "prefetch",
            "repeat_vectors",
            "renderer",
        )
        key = tuple(getattr(schedule, name) for name in fields)
        if key not in self._registers:
            self._registers[key] = self._live(schedule, self.order(schedule.order))
        return self._registers[key]

    @staticmethod
    def _root(node: fx.Node) -> fx.Node:
        """What a renamed value is."""
        while node.target is ops.rename:
            (node,) = node.all_input_nodes
        return node

    def _live(self, schedule: Schedule, order: Sequence[fx.Node]) -> int:
        last = {self._root(x): i for i, n in enumerate(order) for x in n.all_input_nodes}
        states = {n for n, s in self.loop.sources.items() if s.kind == "state" and n in self.used}
        figures = FIGURES[schedule.renderer]
        loaded = set() if figures.in_shared else set(self.fetched)
        renewed = {n for n, s in self.loop.sinks if s.kind in ("state", "sum")}

        def taken(node: fx.Node) -> float:
            count = self.elements(dims_of(node))
            if (
                len(dims_of(node)) == 1
                and schedule.repeat_vectors
                and node in states
                and self.loop.tokens
            ):
                count *= self.elements((TOKEN,)) if TOKEN in self.dotted else 1
            return count * (self.copies(node, schedule) if len(dims_of(node)) == 2 else 1)

        held = sum(taken(n) for n in states)
        held += sum(taken(n) for n, s in self.loop.sinks if s.kind == "sum")
        if schedule.prefetch and loaded:
            held += sum(self.elements(dims_of(n)) for n in self.fetched) * self.element_size / 4
        live: dict[fx.Node, float] = {}
        if not schedule.late_loads:
            live = {n: taken(n) for n in loaded}
        most = held + sum(live.values())
        for i, node in enumerate(order):
            if schedule.late_loads:
                live |= {x: taken(x) for x in node.all_input_nodes if x in loaded}
            if node.target is not ops.rename and node not in renewed:
                live[node] = taken(node)
            most = max(most, held + sum(live.values()))
            for x in [x for x in live if last.get(x, i) <= i and x is not node]:
                del live[x]
        threads = self.device.warp * schedule.num_warps
        return OVERHEAD_REGISTERS + math.ceil(figures.registers * most / threads)

    def shared(self, schedule: Schedule) -> int:
        """Bytes of shared memory: the operands of the largest product, and what is loaded ahead."""
        ahead = 0 if schedule.prefetch else self._ahead
        return self._operands + max(schedule.num_stages - 1, 0) * ahead
