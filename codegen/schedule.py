"""A schedule: how a loop is rendered, as data."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """Choices of one kernel.

    Attributes:
        feature_major: axes of tiles are features first, tokens last (else tokens first).
        num_warps: warps a program.
        num_stages: depth of the software pipeline over mini-batches, 1 for none.
        accumulate: products are added into their sum inside the matrix unit.
        order: in which values are computed: as in the "graph", "products_first" (of tokens and state, before
            anything waits for a sum), "least_live" (what keeps least on chip), or "on_demand" (each right before
            it is read).
        late_loads: tokens are loaded where they are first needed (else all at the start of a mini-batch).
        prefetch: what a mini-batch reads is loaded a turn before, into registers.
        stages: kernels a loop is made of: 1; 2 (the states mini-batch after mini-batch, then the rest in parallel
            from saved states); or 3 (what does not wait for the states before that, in parallel too).
        narrow: what passes between kernels is stored in the dtype of the tokens, not only where matrix products
            alone read it.
        repeat_vectors: vector states are kept as a row for every token, renewed by a product.
        nan: how what is not finite is kept from tokens that do not see it: by a small "product" beside each
            causal one, by a "branch" taken where there is such a value, "again" (all is computed once more, with
            products beside causal ones, where the state at the end is not finite), or not at all ("ignored": for
            measuring what exactness costs).
        group: mini-batches a program of a parallel kernel handles.
        renderer: "triton"; "gluon": state in the accumulators of warpgroups, operands in shared memory (sm_90);
            "warps": each warp has a piece of the widest dimension, of the state too, in its accumulators; or
            "features": each warp has some features of every value, rows of tiles whose columns are tokens.
        segments: where programs are few, another kernel makes the states of every so many mini-batches first, and this
            one then handles segments of a sequence beside each other.
        few_shuffles: lanes that add up rows pass on half of their numbers at each step, instead of all.
        reload: large arguments are loaded again where they are read again, not kept in shared memory.
        early: matrices are on their way into shared memory from a product before they are read.
        widest: feature dimensions wider than this are divided into pieces, None for no such limit.
        maxnreg: registers a thread may take, None for the compiler's choice.
        instead: what runs where a kernel under this schedule does not fit the device; no part of what is equal to what.
        reasons: pairs of a choice and why it was made, in words; no part of what is equal to what.
        origin: where the schedule comes from, in words, as "rules" or "measured: ..."; likewise.
    """

    feature_major: bool = False
    num_warps: int = 4
    num_stages: int = 3
    accumulate: bool = True
    order: str = "graph"
    late_loads: bool = False
    prefetch: bool = False
    stages: int = 1
    narrow: bool = False
    repeat_vectors: bool = True
    nan: str = "product"
    group: int = 1
    renderer: str = "triton"
    segments: bool = False
    few_shuffles: bool = False
    reload: bool = False
    early: bool = False
    widest: int | None = None
    maxnreg: int | None = None
    instead: Schedule | None = field(default=None, compare=False, repr=False)
    reasons: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)
    origin: str = field(default="given", compare=False, repr=False)

    def choices(self) -> dict[str, Any]:
        """The choices by name, without the reasons for them."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
