"""Which compilations may run beside others: all but those that tell Triton, and by that every thread, of another assembler."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_changed = threading.Condition()
_running = 0  # that read what Triton is told
_alone = 0  # that change it, or wait to


@contextmanager
def together() -> Iterator[None]:
    """Within, what Triton is told stays as it is; not to be entered twice by one thread."""
    global _running
    with _changed:
        _changed.wait_for(lambda: not _alone)
        _running += 1
    try:
        yield
    finally:
        with _changed:
            _running -= 1
            _changed.notify_all()


@contextmanager
def alone() -> Iterator[None]:
    """Within, no other thread compiles."""
    global _alone
    with _changed:
        _alone += 1
        _changed.wait_for(lambda: not _running)
    with _one:
        try:
            yield
        finally:
            with _changed:
                _alone -= 1
                _changed.notify_all()


_one = threading.Lock()
