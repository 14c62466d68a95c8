"""Compiling makes millions of objects that stay: looking for garbage among them takes a fifth of the time."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def not_collected() -> Iterator[None]:
    """Cycles of garbage stay until afterwards, and then until Python next looks at all objects there are."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():  # what is new counts as old, unlooked at
                gc.freeze()
                gc.unfreeze()
            gc.enable()
