"""Functions that run while a model is traced, and whose results TorchDynamo takes for constants."""

from __future__ import annotations

import threading
from typing import Any

from torch._dynamo.variables import functions, nn_module

from tttc.warm import recording

# Whose results are the same in every process of these versions, or (steps, tttc.warm.steps) are asked for again there.
_KNOWN = ("torch", "builtins", "math", "_operator")
_STEPS = "tttc._scan_op"
_lock = threading.Lock()
_invoke = functions.invoke_and_store_as_constant


def watch() -> None:
    """Have a recording refuse what was made with the result of somebody's function."""
    with _lock:
        for module in (functions, nn_module):
            module.invoke_and_store_as_constant = _checked  # type: ignore[attr-defined]


def _checked(tx: Any, fn: Any, *rest: Any) -> Any:
    watched = recording.current()
    module = getattr(fn, "__module__", None) or ""
    if watched is not None and module != _STEPS and module.partition(".")[0] not in _KNOWN:
        watched.refuse(f"the result of {fn.__qualname__} is taken for a constant")
    return _invoke(tx, fn, *rest)
