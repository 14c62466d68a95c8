"""A kernel of few programs beside those that come after it, on a stream of its own, until one waits for it.

A recurrence keeps few multiprocessors busy, for long. What the next mini-batches need before theirs, and what is made of the
last ones', does not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

FIRST = -1  # priority: others wait for its programs, which take the next room there is


def pays() -> bool:
    """Whether kernels that run beside each other are done sooner: as nodes of a CUDA graph.

    On an H200 forward and backward of TTT-Linear (B1 T32768) take 5918 us so, 6605 one kernel after another; launched one by
    one 8025 and 6620, since each time one stream waits for the other it takes longer than what is won.
    """
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class _Side:
    """A stream beside another one, and its events: to make one takes the host longer than to launch a kernel."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device, priority=FIRST)
        self.begin = torch.cuda.Event()
        self.idle: list[torch.cuda.Event] = []


_sides: dict[tuple[torch.device, int], _Side] = {}


@dataclass(eq=False)
class Aside:
    """What runs beside others, on a device; on a CPU nothing does."""

    device: torch.device
    _ran: tuple[_Side, torch.cuda.Event] | None = field(default=None, repr=False)

    def start(self, run: Callable[[], None]) -> None:
        """Run after all that the current stream has got, beside what it gets from now on."""
        if self.device.type != "cuda":
            run()
            return
        now = torch.cuda.current_stream(self.device)
        key = (self.device, now.cuda_stream)
        side = _sides.get(key) or _sides.setdefault(key, _Side(self.device))
        side.begin.record(now)
        side.stream.wait_event(side.begin)
        with torch.cuda.stream(side.stream):
            run()
        try:
            event = side.idle.pop()
        except IndexError:
            event = torch.cuda.Event()
        event.record(side.stream)
        self._ran = side, event

    def join(self) -> None:
        """What the current stream gets from now on waits."""
        if self._ran is not None:
            side, event = self._ran
            torch.cuda.current_stream(self.device).wait_event(event)
            side.idle.append(event)
            self._ran = None
