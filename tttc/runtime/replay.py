"""What a call allocates, launches and computes, remembered: the next call with arguments laid out alike does the same
without working it out again, which takes the host longer than many a scan takes the GPU.

Replaying is not a CUDA graph: memory is allocated anew, kernels are launched one by one, on the stream of the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tttc.ir.program import Program
from tttc.runtime.launch import Launch, launch, precision, prepared

Tensor = torch.Tensor
Launcher = Callable[[Launch], None]
Run = Callable[[list[Tensor], Launcher], list[Tensor]]
MOST_KNOWN = 256  # calls that a program remembers
MOST_STEPS = 128  # of one of them: what runs by torch operations is not worth remembering
ALIGNED = 512  # bytes, as the allocator places tensors
_SEEN = object()
_ALLOCATING = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
    torch.ops.aten.empty_like.default,
)


def remembered(program: Program, call: Hashable, inputs: list[Tensor], run: Run) -> list[Tensor]:
    """``run(inputs, launcher)``, or what it did the last time it was called with inputs laid out like these.

    Args:
        program: that is run; it keeps what is known of earlier calls.
        call: whatever ``run`` depends on beside the program, its schedules and ``inputs``.
        inputs: ``run`` must depend on no values, and write to none of them.

    The first call runs as it is (kernels are compiled, schedules are searched for), the second is recorded. Nothing is
    remembered of what runs without a GPU.
    """
    device = inputs[0].device
    if not _at_hand(device):
        return run(inputs, launch)
    memory = program.calls
    layout = tuple([(x.dtype, x.shape, x.stride(), x.data_ptr() % 16) for x in inputs])
    key = (call, tuple(program.schedules.items()), device, precision(), layout)
    known = memory.get(key)
    if isinstance(known, Tape):
        return known(inputs)
    if known is not _SEEN:
        if known is None:
            if len(memory) >= MOST_KNOWN:
                memory.clear()
            memory[key] = _SEEN
        return run(inputs, launch)
    recorder = Recorder(_apart(inputs))
    with recorder:
        results = run(recorder.inputs, recorder.launch)
    memory[key] = recorder.tape(results, device) or False
    return results


def _at_hand(device: torch.device) -> bool:
    """Whether it is the GPU that kernels are launched on now."""
    return device.type == "cuda" and device.index == torch.cuda.current_device()


def _apart(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The inputs, each in memory of its own: views of one tensor may be views of several the next time."""
    seen: set[int] = set()
    found = []
    for x in inputs:
        storage = x.untyped_storage()
        if storage._cdata in seen:
            storage = storage.clone()
            x = x.new_empty(0).set_(storage, x.storage_offset(), x.shape, x.stride())
        seen.add(storage._cdata)
        found.append(x.detach())
    return found


# -- what is remembered ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
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
class _Launched:
    """A launch: addresses are put in the places of tensors."""

    runner: Callable[..., Any]
    arguments: list[Any]
    addresses: list[tuple[int, int, int]]  # place, slot, bytes from its start

    @property
    def slots(self) -> list[int]:
        """The tensors it reads or writes."""
        return [slot for _, slot, _ in self.addresses]

    def __call__(self, tensors: list[Any], pointers: list[int]) -> None:
        arguments = self.arguments.copy()
        for place, slot, offset in self.addresses:
            arguments[place] = pointers[slot] + offset
        self.runner(*arguments)


@dataclass(frozen=True)
class _Computed:
    """An operator on tensors."""

    operator: Any
    arguments: list[Any]
    spec: Any
    made: tuple[int, ...]  # slots of its results that are new

    @property
    def slots(self) -> list[int]:
        """The tensors it reads or writes."""
        return [*(x.slot for x in self.arguments if isinstance(x, _View)), *self.made]

    def __call__(self, tensors: list[Any], pointers: list[int]) -> None:
        given = [x.of(tensors) if isinstance(x, _View) else x for x in self.arguments]
        args, kwargs = pytree.tree_unflatten(given, self.spec)
        out = self.operator(*args, **kwargs)
        if self.made:
            for slot, x in zip(self.made, pytree.tree_leaves(out), strict=True):
                tensors[slot] = x
                pointers[slot] = x.data_ptr()


@dataclass(frozen=True)
class _Allocated:
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


_Step = _Launched | _Computed | _Allocated


@dataclass(frozen=True)
class Tape:
    """What a call did."""

    slots: int
    device: torch.device
    constants: list[tuple[int, Tensor]]
    workspace: int  # bytes of what kernels pass on to each other
    placed: list[tuple[int, int]]  # slot, bytes from where the workspace starts
    steps: list[tuple[_Step, tuple[int, ...]]]  # and the slots that nobody reads after it
    results: list[_View]

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


# -- recording ----------------------------------------------------------------------------------------------


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
        self.steps: list[_Launched | _Computed] = []
        self.given_up = self.launching = False
        self.constants: list[tuple[int, Tensor]] = []
        self._owners: list[_Owner] = []
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
        made = None if self.given_up else prepared(call)
        if made is None:
            self._give_up()
            return
        runner, arguments = made
        addresses = []
        for place, x in enumerate(arguments):
            if isinstance(x, Tensor):
                slot = self._slot(x)
                addresses.append((place, slot, x.data_ptr() - self._owners[slot].start))
                arguments[place] = 0
        self._add(_Launched(runner, arguments, addresses))

    def tape(self, results: list[Tensor], device: torch.device) -> Tape | None:
        """What was recorded; None where that can't be replayed."""
        views = [] if self.given_up else [self._view(x) for x in results]
        if self.given_up or not any(isinstance(s, _Launched) for s in self.steps):
            return None
        used: dict[int, list[int]] = {}
        for i, step in enumerate(self.steps):
            for slot in step.slots:
                used.setdefault(slot, []).append(i)
        kept = {x.slot for x in views} | {slot for slot, _ in self.constants}
        kept |= set(range(len(self.inputs)))
        new: dict[int, list[_Allocated]] = {}
        passed = []
        for slot, owner in enumerate(self._owners):
            if not owner.allocated:
                continue
            if slot in kept or owner.computed_with:
                made = _Allocated(slot, owner.shape, owner.stride, owner.dtype, device)
                new.setdefault(owner.made, []).append(made)
            elif slot in used:
                passed.append((slot, used[slot][0], used[slot][-1], owner.bytes))
        placed, size = _places(passed)
        between = {slot for slot, *_ in passed}
        done: dict[int, list[int]] = {}
        for slot, where in used.items():
            if slot not in kept and slot not in between:
                done.setdefault(where[-1], []).append(slot)
        steps: list[tuple[_Step, tuple[int, ...]]] = []
        for i, step in enumerate(self.steps):
            steps += [(x, ()) for x in new.pop(i, ())]
            steps.append((step, tuple(done.get(i, ()))))
        steps += [(x, ()) for late in new.values() for x in late]
        return Tape(len(self._owners), device, self.constants, size, placed, steps, views)

    def _add(self, step: _Launched | _Computed) -> None:
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

    def _view(self, x: Tensor) -> _View:
        slot = self._slot(x)
        owner = self._owners[slot]
        if x.dtype != owner.dtype:
            self.given_up = True  # no view has another dtype than its owner
        offset = (x.data_ptr() - owner.start) // x.itemsize
        whole = offset == 0 and x.shape == owner.shape and x.stride() == owner.stride
        return _View(slot, offset, tuple(x.shape), x.stride(), whole)

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
            if isinstance(x, _View):
                self._owners[x.slot].computed_with = True
        self._add(_Computed(func, views, spec, tuple(self._own(x) for x in new)))


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
