"""A scan as the compiler sees it: its bodies, and the stages they came through."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from tttc.ir.body import Body


@dataclass
class Program:
    """Everything derived from one step at one mini-batch size.

    ``token`` handles one token; ``continued`` a mini-batch (or part of one) from any carry; ``full`` one that
    starts at its anchor. Where tokens can only run one after another the last two are None and ``reason``
    says why. At mini-batch size 1 ``full`` handles a chunk of ``chunk_size`` tokens from any carry, which it takes
    as the anchor; there is no ``continued`` then, as every token ends a mini-batch.

    ``settled`` has the bodies that kernels are rendered from, where sums are made of what is known earlier. VJPs are
    derived from those before: through what cancels exactly, gradients would be rounded where they are largest.
    """

    name: str
    mini_batch_size: int
    token: Body
    continued: Body | None = None
    full: Body | None = None
    settled: dict[str, Body] = field(default_factory=dict)
    reason: str | None = None
    chunk_size: int | None = None
    stages: dict[str, Body | fx.GraphModule] = field(default_factory=dict)
    verified: bool = False
    splits: dict = field(default_factory=dict)  # the full body split for the torch backend
    schedules: dict = field(default_factory=dict)  # of the parts, where one was chosen
    plans: dict = field(default_factory=dict)  # of loops, where measuring has found one
    rules: dict = field(default_factory=dict)  # plans of loops, where none has been measured
    searched: set = field(default_factory=set)  # what plans were searched for in this process
    kernels: dict = field(default_factory=dict)
    calls: dict = field(default_factory=dict)  # what was done for arguments laid out in one way
    constants: dict = field(default_factory=dict)  # of the bodies, by device
    gradients: dict = field(default_factory=dict)  # what backends derive from the bodies' VJPs
    reversed: bool = False  # whether a backward has run
    save_interval: int | None = None  # mini-batches between saved states; None: chosen by cost
    tall: bool | None = (
        None  # tokens are tiles of more rows than a program holds; None: not asked yet
    )
    no_kernels: str | None = None  # why Triton can not express it
    no_backward_kernels: str | None = None  # likewise, of its backward

    @property
    def unit(self) -> int:
        """The tokens that ``full`` handles at a time."""
        return self.chunk_size or self.mini_batch_size

    @property
    def sequential(self) -> bool:
        """Whether tokens run one after another."""
        return self.full is None
