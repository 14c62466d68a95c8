"""What the compilation of a frame leaves for a later process, gathered while it happens."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tttc._within import within


class NotKept(Exception):
    """Why something can't be kept for, or used by, another process."""


@dataclass
class Recording:
    """The parts of one compilation, as they come.

    Attributes:
        graphs: the fused graphs as text, by direction.
        autograd: what AOTAutograd made around them.
        guards: when all of it holds.
        warnings: what was said meanwhile, and is said again.
        captured: how many graphs TorchDynamo made of the frame.
        outermost: whether AOTAutograd is now given the whole graph, and not a block of it.
        reason: why it can't be kept.
    """

    graphs: dict[str, Any] = field(default_factory=dict)
    autograd: Any = None
    guards: Any = None
    warnings: list[str] = field(default_factory=list)
    captured: int = 0
    outermost: bool = False
    reason: str | None = None

    def refuse(self, reason: str) -> None:
        """Keep nothing of this compilation."""
        self.reason = self.reason or reason

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Within, an error refuses: PyTorch may have changed, and a program that is not kept is compiled again."""
        try:
            yield
        except NotKept as error:
            self.refuse(str(error))
        except Exception as error:
            self.refuse(f"{type(error).__name__}: {error}")


_current: contextvars.ContextVar[Recording | None] = contextvars.ContextVar(
    "tttc_warm_recording", default=None
)


def current() -> Recording | None:
    """The recording of the frame that is being compiled, if it may be kept."""
    recording = _current.get()
    return None if recording is None or recording.reason else recording


@contextlib.contextmanager
def record() -> Iterator[Recording]:
    """Record the compilation that happens within."""
    recording = Recording()
    with within(_current, recording):
        yield recording


@contextlib.contextmanager
def outermost() -> Iterator[None]:
    """Within, AOTAutograd is given the whole graph of the frame."""
    recording = _current.get()
    if recording is None:
        yield
        return
    recording.outermost = True
    try:
        yield
    finally:
        recording.outermost = False


def said(message: str) -> None:
    """What was warned of; a later process says it again."""
    recording = _current.get()
    if recording is not None:
        recording.warnings.append(message)
