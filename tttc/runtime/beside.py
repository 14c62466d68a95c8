"""A kernel of few programs beside those that come after it, on a stream of its own, until one waits for it.

A recurrence keeps few multiprocessors busy, for long. What the next mini-batches need before theirs, and what is made of the
last ones', does not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

FIRST = -1  # priority: others wait for its programs, which take the next room there is
_sides: dict[tuple[torch.device, int], torch.cuda.Stream] = {}


@dataclass(eq=False)
class Aside:
    """What runs beside others; ``event`` tells when it is done, None where there are no streams."""

    device: torch.device
    event: torch.cuda.Event | None = None

    def start(self, run: Callable[[], None]) -> None:
        """Run after all that the current stream has got, beside what it gets from now on."""
        if self.device.type != "cuda":
            run()
            return
        now = torch.cuda.current_stream(self.device)
        key = (self.device, now.cuda_stream)
        if key not in _sides:
            _sides[key] = torch.cuda.Stream(self.device, priority=FIRST)
        side = _sides[key]
        side.wait_stream(now)
        with torch.cuda.stream(side):
            run()
            self.event = side.record_event()

    def join(self) -> None:
        """What the current stream gets from now on waits."""
        if self.event is not None:
            torch.cuda.current_stream(self.device).wait_event(self.event)
