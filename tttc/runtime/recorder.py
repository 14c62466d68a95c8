"""Recording a call, as a tape that does the same again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tttc.runtime.beside import Aside
from tttc.runtime.launch import Launch, launch, prepared
from tttc.runtime.tape import Allocated, Beside, Computed, Joined, Launched, Step, Tape, View

Tensor = torch.Tensor
MOST_STEPS = 128  # of a call: what runs by torch operations is not worth remembering
ALIGNED = 512  # bytes, as the allocator places tensors
_ALLOCATING = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
    torch.ops.aten.empty_like.default,
)


class _Owner:
    """A tensor that owns memory, as it was when it was made; it need not live on."""

    def __init__(self, x: Tensor, made: int) -> None:
        self.shape, self.stride, self.dtype = tuple(x.shape), x.stride(), x.dtype
        self.start = x.data_ptr()
        self.bytes = x.untyped_storage().nbytes()
        self.made = made  # steps before it
        # While this is there no other storage has its address.
        self.weak = StorageWeakRef(x.untyped_storage())
        self.allocated = False  # by nothing but an allocation
        self.computed_with = False


class Recorder(TorchDispatchMode):
    """Sees every operator and launch of a call on ``inputs``, no two of which share memory."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.inputs = inputs
        self.steps: list[Launched | Beside | Joined | Computed] = []
        self.given_up = self.launching = False
        self.constants: list[tuple[int, Tensor]] = []
        self._owners: list[_Owner] = []
        self._asides = 0
        self._under_way: dict[Aside, Beside] = {}
        self._slots: dict[int, int] = {}  # by where a storage is
        for x in inputs:
            self._own(x)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.given_up and not self.launching:
            self._note(func, args, kwargs or {}, out)
        return out

    def launch(self, call: Launch) -> None:
        """Launch, and remember."""
        self.launching = True  # what Triton does with tensors is no part of the call
        try:
            launch(call)
        finally:
            self.launching = False
        if self.given_up:
            return
        if call.after is not None:
            self._add(Joined(self._under_way.pop(call.after)))
        known = self._launched(call)
        if known is None:
            self._give_up()
        elif call.aside is None:
            self._add(known)
        else:
            self._asides += 1  # their slots are counted from the end
            step = self._under_way[call.aside] = Beside(known, call.aside.device, -self._asides)
            self._add(step)

    def _launched(self, call: Launch) -> Launched | None:
        made = prepared(call)
        if made is None:
            return None
        found, grid, arguments = made
        addresses = []
        for place, x in enumerate(arguments):
            if isinstance(x, Tensor):
                slot = self._slot(x)
                addresses.append((place, slot, x.data_ptr() - self._owners[slot].start))
                arguments[place] = 0
        return Launched(found, grid, arguments, addresses)

    def tape(self, results: list[Tensor], device: torch.device) -> Tape | None:
        """What was recorded; None where that can't be replayed."""
        views = [] if self.given_up else [self._view(x) for x in results]
        if self.given_up or not any(isinstance(s, Launched) for s in self.steps):
            return None
        used: dict[int, list[int]] = {}
        for i, step in enumerate(self.steps):
            for slot in step.slots:
                used.setdefault(slot, []).append(i)
        kept = {x.slot for x in views} | {slot for slot, _ in self.constants}
        kept |= set(range(len(self.inputs)))
        new: dict[int, list[Allocated]] = {}
        passed = []
        for slot, owner in enumerate(self._owners):
            if not owner.allocated:
                continue
            if slot in kept or owner.computed_with:
                made = Allocated(slot, owner.shape, owner.stride, owner.dtype, device)
                new.setdefault(owner.made, []).append(made)
            elif slot in used:
                passed.append((slot, used[slot][0], used[slot][-1], owner.bytes))
        placed, size = _places(passed)
        between = {slot for slot, *_ in passed}
        done: dict[int, list[int]] = {}
        for slot, where in used.items():
            if slot not in kept and slot not in between:
                done.setdefault(where[-1], []).append(slot)
        steps: list[tuple[Step, tuple[int, ...]]] = []
        for i, step in enumerate(self.steps):
            steps += [(x, ()) for x in new.pop(i, ())]
            steps.append((step, tuple(done.get(i, ()))))
        steps += [(x, ()) for late in new.values() for x in late]
        return Tape(
            len(self._owners) + self._asides, device, self.constants, size, placed, steps, views
        )

    def _add(self, step: Launched | Beside | Joined | Computed) -> None:
        self.steps.append(step)
        if len(self.steps) > MOST_STEPS:
            self._give_up()

    def _give_up(self) -> None:
        self.given_up = True
        self.steps, self._owners, self._slots = [], [], {}

    def _own(self, x: Tensor) -> int:
        self._owners.append(_Owner(x, len(self.steps)))
        self._slots[_memory(x)] = len(self._owners) - 1
        return len(self._owners) - 1

    def _slot(self, x: Tensor) -> int:
        """The owner of a tensor's memory; what was there before the call stays what it is."""
        slot = self._slots.get(_memory(x))
        if slot is None:
            slot = self._own(x)
            self.constants.append((slot, x))
        return slot

    def _view(self, x: Tensor) -> View:
        slot = self._slot(x)
        owner = self._owners[slot]
        if x.dtype != owner.dtype:
            self.given_up = True  # no view has another dtype than its owner
        offset = (x.data_ptr() - owner.start) // x.itemsize
        whole = offset == 0 and x.shape == owner.shape and x.stride() == owner.stride
        return View(slot, offset, tuple(x.shape), x.stride(), whole)

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        made = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        new = [x for x in made if _memory(x) not in self._slots]
        given = {_memory(x) for x in leaves if isinstance(x, Tensor)}
        if not new and not func._schema.is_mutable:
            return  # a view
        if new and given & {_memory(x) for x in new}:
            return  # a view of what was there before
        if func in _ALLOCATING:
            self._owners[self._own(new[0])].allocated = True
            return
        if len(new) not in (0, len(made)):
            self._give_up()
            return
        views = [self._view(x) if isinstance(x, Tensor) else x for x in leaves]
        for x in views:
            if isinstance(x, View):
                self._owners[x.slot].computed_with = True
        self._add(Computed(func, views, spec, tuple(self._own(x) for x in new)))


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _places(passed: Sequence[tuple[int, int, int, int]]) -> tuple[list[tuple[int, int]], int]:
    """Where tensors lie in one workspace, and its bytes, from their slots, first and last steps, and bytes.

    Memory is used again where nobody reads it any more: kernels of a stream run one after another.
    """
    placed: list[tuple[int, int]] = []
    living: list[tuple[int, int, int]] = []  # start, end, last step
    size = 0
    for slot, first, last, bytes_ in sorted(passed, key=lambda x: x[1]):
        living = sorted(x for x in living if x[2] >= first)
        start = 0
        for begin, end, _ in living:
            if start + bytes_ <= begin:
                break
            start = max(start, end)
        end = start + -(-bytes_ // ALIGNED) * ALIGNED
        living.append((start, end, last))
        placed.append((slot, start))
        size = max(size, end)
    return placed, size
