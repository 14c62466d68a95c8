"""What a report holds: plain records, of which text, JSON and HTML are three renderings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tttc.report.costs import StageCost

if TYPE_CHECKING:
    from tttc.codegen.kernel import Kernel


@dataclass
class NodeReport:
    """One node of a graph.

    ``kind``: "contraction", "elementwise", "reduction", "view", "other", or what an argument is: "state",
    "token", "parameter", "constant"; "result" for what the graph returns. ``operation`` names what it does
    ("sum over i", "sub", "token.k"), ``detail`` how ("t i, i j → t j"). ``dims`` are its named dimensions, in
    a graph without those its sizes. ``change`` against the stage before: "" (kept), "new", or "changed" (the
    same operator on other dimensions).
    """

    name: str
    kind: str
    operation: str
    detail: str
    dims: tuple[str, ...]
    inputs: tuple[str, ...]
    change: str = ""
    line: str | None = None  # file and line of the step, where known


@dataclass
class GraphReport:
    """A graph as it is drawn, and what the pass took away from the graph before it."""

    nodes: list[NodeReport]
    removed: list[str] = field(default_factory=list)
    compared: str | None = None  # the stage before, where the two speak the same language

    def count(self, change: str) -> int:
        """How many operators are "new", "changed" or "" (kept)."""
        return sum(n.change == change for n in self.operators)

    @property
    def operators(self) -> list[NodeReport]:
        """The nodes that compute."""
        return [n for n in self.nodes if n.kind in OPERATOR_KINDS]


OPERATOR_KINDS = ("contraction", "elementwise", "reduction", "view", "other")
ARGUMENT_KINDS = ("state", "token", "parameter", "constant")


@dataclass
class StageReport:
    """One stage of a scan: its cost per mini-batch and head, its error there against the naive loop."""

    name: str
    nodes: int
    cost: StageCost | None  # None for the captured step, which is no graph of the IR
    error: float | None
    graph: GraphReport = field(default_factory=lambda: GraphReport([]))
    title: str = ""  # what the stage is, in a few words
    about: str = ""  # the documentation of the pass that made it


@dataclass
class SourceReport:
    """A function of the user's: its text, the file it is in, and the line it starts at."""

    function: str
    file: str
    line: int
    text: str


@dataclass
class OrderChoice:
    """One order of evaluating a product: with parentheses, operations, its largest product in elements and labels."""

    written: str
    operations: int
    largest: int
    largest_labels: str


@dataclass
class OrderReport:
    """A product whose order of evaluation was chosen.

    ``operands`` are written with their labels; ``meanings`` say of those computed before, by name, what they are.
    ``rejected`` has the best order for each other first step, cheapest first.
    """

    operands: list[str]
    result: str
    chosen: OrderChoice
    at_once: int
    rejected: list[OrderChoice]
    meanings: dict[str, str] = field(default_factory=dict)


@dataclass
class PartReport:
    """A part of what runs: "invariant", "before", "recurrence" or "outputs", as :mod:`tttc.passes.split` has it.

    ``depth`` and ``products``: operators, and contractions among them, on its longest chain.
    """

    name: str
    nodes: int
    contractions: int
    flops: float  # of a mini-batch and head (of a token, where tokens run one after another)
    depth: int
    products: int
    chain: list[str] = field(default_factory=list)


@dataclass
class RecurrenceReport:
    """The state, the critical path from one state to the next, and what runs beside it."""

    unit: str  # "mini-batch", "chunk" or "token": what runs one after another
    states: list[str]
    parts: list[PartReport]
    reverse: bool = False  # of a backward: cotangents of the states, from the last to the first

    def part(self, name: str) -> PartReport:
        """A part by name."""
        return next(p for p in self.parts if p.name == name)

    @property
    def share(self) -> float:
        """The share of the FLOPs that is on the critical path."""
        total = sum(p.flops for p in self.parts)
        return self.part("recurrence").flops / total if total else 0.0


@dataclass
class Roofline:
    """A device's two roofs, and where the scan lies under them.

    Intensities are FLOPs per byte through device memory. ``measured`` are FLOP/s of the scan as it ran, where it
    was timed on that very device.
    """

    device: str
    peak: float  # FLOP/s of matrix products in the operands' precision
    precision: str
    bandwidth: float  # bytes/s
    before: float
    after: float
    measured: float | None = None

    def attainable(self, intensity: float) -> float:
        """The most FLOP/s that the roofs allow."""
        return min(self.peak, intensity * self.bandwidth)


@dataclass
class BackwardReport:
    """The backward of a scan: the vector-Jacobian product of the body that runs, from the last mini-batch to the first.

    ``of`` is the stage it is derived from, ``wanted`` the arguments whose cotangents it makes. ``reason`` says why it
    runs by torch operations and has no kernels. ``errors`` are those of the gradients of the compiled scan, by argument,
    against autograd through the naive loop in float64, over the first ``checked`` tokens of the first sequence.
    """

    of: str
    wanted: list[str]
    stages: list[StageReport]
    recurrence: RecurrenceReport | None = None
    kernels: list[Kernel] = field(default_factory=list)
    reason: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    checked: int = 0

    @property
    def error(self) -> float | None:
        """The largest error of a gradient."""
        return max(self.errors.values(), default=None)

    @property
    def cost(self) -> StageCost | None:
        """The cost of what runs."""
        return self.stages[-1].cost if self.stages else None


@dataclass
class ScanReport:
    """One distinct scan of a model: a step, feature shapes and a mini-batch size.

    ``form`` is "dual" (a mini-batch at a time), "chunkwise" (online, ``unit`` tokens at a time, exactly),
    "sequential" (token by token, fused) or "eager" (the naive loop), and ``reason`` says why it is neither of
    the first two. ``orders`` are the products whose order of evaluation was
    chosen, with the cost of those rejected. ``errors`` are those of outputs and states of the compiled
    scan against the naive loop in float64 over the first ``checked`` tokens of the input, relative to the
    largest value. Where another mini-batch size was asked for than the one the model ``says``, they are those
    of the approximation, and ``deviation`` is how far it is from the rule of the model. ``seconds``: of the whole scan, where it was timed, on ``timed_on``.
    """

    name: str
    key: str  # that of the step in graphs
    step: str
    where: str | None
    mini_batch_size: int
    layers: list[str]
    sites: list[str]
    form: str
    reason: str | None = None
    unit: int = 1  # tokens handled at a time
    says: int | None = None
    sources: list[SourceReport] = field(default_factory=list)
    stages: list[StageReport] = field(default_factory=list)
    orders: list[OrderReport] = field(default_factory=list)
    recurrence: RecurrenceReport | None = None
    errors: dict[str, float] = field(default_factory=dict)
    deviation: dict[str, float] = field(default_factory=dict)
    checked: int = 0
    batch: int = 0
    heads: int = 0
    tokens: int = 0
    element_size: int = 4  # bytes of an element of a token, and of what the step computes in
    compute_size: int = 4
    kernels: list[Kernel] = field(default_factory=list)
    backward: BackwardReport | None = None
    seconds: float | None = None
    timed_on: str | None = None
    roofline: Roofline | None = None

    @property
    def before(self) -> StageCost | None:
        """The cost of the step as the user wrote it, over a mini-batch."""
        return self._cost("simplify_step", "normalise")

    @property
    def after(self) -> StageCost | None:
        """The cost of what runs in its place."""
        return self._cost("sums", "simplify", "at_carry", "simplify_step", "normalise")

    def _cost(self, *names: str) -> StageCost | None:
        by_name = {s.name: s.cost for s in self.stages}
        return next((by_name[n] for n in names if n in by_name), None)

    def total(self, cost: StageCost, what: str) -> float:
        """A field of a cost over the whole input: all sequences, heads and mini-batches."""
        return self.batch * self.heads * self.tokens / self.unit * cost.number(what)

    @property
    def compared(self) -> Comparison | None:
        """Before against after; None where the step has no form in the IR."""
        before, after = self.before, self.after
        if before is None or after is None:
            return None
        return Comparison(
            (before.number("flops"), after.number("flops")),
            (
                self.compute_size * before.number("op_by_op"),
                self.element_size * after.number("fused"),
            ),
            tuple(self.compute_size * c.number("largest") for c in (self._primal or before, after)),  # type: ignore[arg-type]
        )

    @property
    def _primal(self) -> StageCost | None:
        return self._cost("batch")


@dataclass
class Comparison:
    """Per mini-batch and head: the naive step operator by operator, and what runs in its place in one kernel.

    Bytes of the largest value are those of the primal mini-batch, where there is one, against the form that runs.
    """

    flops: tuple[float, float]
    bytes: tuple[float, float]
    largest: tuple[float, float]

    @property
    def intensity(self) -> tuple[float, float]:
        """FLOPs a byte."""
        before, after = (f / max(b, 1.0) for f, b in zip(self.flops, self.bytes, strict=True))
        return before, after


@dataclass
class RegionReport:
    """Regions of the model that share a kernel: how many, their operators, bytes one moves unfused and fused."""

    count: int
    operators: list[str]
    bytes_before: float
    bytes_after: float


@dataclass
class ModelReport:
    """One captured graph of the model: nodes of each of its stages, bytes its memory-bound operations move."""

    name: str
    nodes: dict[str, int]
    regions: int = 0
    bytes_before: float | None = None
    bytes_after: float | None = None
