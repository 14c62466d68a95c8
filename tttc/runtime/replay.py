"""What a call allocates, launches and computes, remembered: the next call with arguments laid out alike does the same
without working it out again, which takes the host longer than many a scan takes the GPU.

Replaying is not a CUDA graph: memory is allocated anew, kernels are launched one by one, on the stream of the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

from tttc.ir.program import Program
from tttc.runtime.beside import pays
from tttc.runtime.launch import launch, precision
from tttc.runtime.recorder import Recorder
from tttc.runtime.staged import Launcher
from tttc.runtime.tape import Tape

Tensor = torch.Tensor
Run = Callable[[list[Tensor], Launcher], list[Tensor]]
MOST_KNOWN = 256  # calls that a program remembers
_SEEN = object()


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
    key = (call, tuple(program.schedules.items()), device, precision(), pays(), layout)
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
