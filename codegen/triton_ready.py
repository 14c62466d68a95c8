"""What Triton finds out once a process before it compiles or loads a kernel, found out while a model is looked at.

The digest of its own files takes a third of a second, most of it outside of Python's lock; the driver's helper and the version
of the assembler take less.
"""

from __future__ import annotations

import threading
from contextlib import suppress

import torch

_lock = threading.Lock()
_thread: threading.Thread | None = None


def begin_triton() -> None:
    """Begin with it in another thread, once a process; nothing where no GPU is in use yet."""
    global _thread
    if _thread is not None or not torch.cuda.is_initialized():
        return
    with _lock:
        if _thread is None:
            device = torch.cuda.current_device()
            begun = threading.Thread(target=_find_out, args=(device,), name="tttc: Triton")
            begun.start()
            _thread = begun  # who sees it may wait for it


def wait_for_triton() -> None:
    """Wait until it is done, where it was begun: two threads would find out the same."""
    if _thread is not None and _thread is not threading.current_thread():
        _thread.join()


def _find_out(device: int) -> None:
    with suppress(Exception):  # whoever compiles a kernel meets it again, and says so
        from triton.compiler.compiler import make_backend
        from triton.runtime.cache import triton_key
        from triton.runtime.driver import driver

        torch.cuda.set_device(device)
        triton_key()
        make_backend(driver.active.get_current_target()).hash()
