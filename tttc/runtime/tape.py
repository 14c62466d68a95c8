"""What a call did, to be done again: allocations, launches on addresses, operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tttc.codegen.executable import Executable, Grid
from tttc.runtime.beside import Aside

Tensor = torch.Tensor


@dataclass(frozen=True)
class View:
    """A tensor by the one that owns its memory: ``slot``, and elements from where that one starts."""

    slot: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    whole: bool  # laid out as the owner is

    def of(self, tensors: Sequence[Any]) -> Tensor:
        x = tensors[self.slot]
        if self.whole:
            return x
        return torch.as_strided(x, self.shape, self.stride, x.storage_offset() + self.offset)


@dataclass(frozen=True)
class Launched:
    """A launch: addresses are put in the places of tensors."""

    kernel: Executable
    grid: Grid
    arguments: list[int]
    addresses: list[tuple[int, int, int]]  # place, slot, bytes from its start

    @property
    def slots(self) -> list[int]:
        """The tensors it reads or writes."""
        return [slot for _, slot, _ in self.addresses]

    def __call__(self, tensors: list[Any], pointers: list[int]) -> None:
        arguments = self.arguments.copy()
        for place, slot, offset in self.addresses:
            arguments[place] = pointers[slot] + offset
        self.kernel.start(self.grid, arguments)


@dataclass(frozen=True)
class Beside:
    """A launch that runs beside the next steps; ``aside``: the slot of what tells that it is done."""

    launched: Launched
    device: torch.device
    aside: int

    @property
    def slots(self) -> list[int]:
        """The tensors it reads or writes."""
        return self.launched.slots

    def __call__(self, tensors: list[Any], pointers: list[int]) -> None:
        tensors[self.aside] = Aside(self.device)
        tensors[self.aside].start(partial(self.launched, tensors, pointers))


@dataclass(frozen=True)
class Joined:
    """The next steps wait for a launch."""

    beside: Beside

    @property
    def slots(self) -> list[int]:
        """The tensors that are read or written until here."""
        return self.beside.slots

    def __call__(self, tensors: list[Any], pointers: list[int]) -> None:
        tensors[self.beside.aside].join()


@dataclass(frozen=True)
class Computed:
    """An operator on tensors."""

    operator: Any
    arguments: list[Any]
    spec: Any
    made: tuple[int, ...]  # slots of its results that are new

    @property
    def slots(self) -> list[int]:
        """The tensors it reads or writes."""
        return [*(x.slot for x in self.arguments if isinstance(x, View)), *self.made]

    def __call__(self, tensors: list[Any], pointers: list[int]) -> None:
        given = [x.of(tensors) if isinstance(x, View) else x for x in self.arguments]
        args, kwargs = pytree.tree_unflatten(given, self.spec)
        out = self.operator(*args, **kwargs)
        if self.made:
            for slot, x in zip(self.made, pytree.tree_leaves(out), strict=True):
                tensors[slot] = x
                pointers[slot] = x.data_ptr()


@dataclass(frozen=True)
class Allocated:
    """A tensor that operators read or write, or a result."""

    slot: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __call__(self, tensors: list[Any], pointers: list[int]) -> None:
        x = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        tensors[self.slot] = x
        pointers[self.slot] = x.data_ptr()


Step = Launched | Beside | Joined | Computed | Allocated


@dataclass(frozen=True)
class Tape:
    """What a call did."""

    slots: int  # tensors, and what tells that a launch is done
    device: torch.device
    constants: list[tuple[int, Tensor]]
    workspace: int  # bytes of what kernels pass on to each other
    placed: list[tuple[int, int]]  # slot, bytes from where the workspace starts
    steps: list[tuple[Step, tuple[int, ...]]]  # and the slots that nobody reads after it
    results: list[View]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results, for inputs laid out as those it was recorded with."""
        tensors: list[Any] = [*inputs, *[None] * (self.slots - len(inputs))]
        for slot, x in self.constants:
            tensors[slot] = x
        pointers = [0 if x is None else x.data_ptr() for x in tensors]
        if self.workspace:
            space = torch.empty(self.workspace, dtype=torch.uint8, device=self.device)
            start = space.data_ptr()
            for slot, offset in self.placed:
                pointers[slot] = start + offset
        for step, done in self.steps:
            step(tensors, pointers)
            for slot in done:
                tensors[slot] = None
        return [x.of(tensors) for x in self.results]
