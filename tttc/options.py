"""What :func:`tttc.compile` may be asked for, and what it warns of."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass

from tttc import logs
from tttc._checks import check_mini_batch_size
from tttc.tuning.choose import tuning_wanted
from tttc.warm.recording import said

BACKENDS = ("auto", "triton", "torch")
# Of torch.compile: whether to search for schedules, whether to replay CUDA graphs.
MODES = {
    "default": (False, False),
    "reduce-overhead": (False, True),
    "max-autotune": (True, True),
    "max-autotune-no-cudagraphs": (True, False),
}


@dataclass(frozen=True)
class Options:
    """What :func:`compile` was asked for."""

    backend: str = "auto"
    mini_batch_size: int | None = None
    strict: bool = False
    verify: bool = False
    tune: bool = False
    cuda_graphs: bool = False


class TTTCWarning(UserWarning):
    """A TTT layer runs eagerly, or approximates what its model says; each is said once."""


_warned: set[str] = set()
_warn_lock = threading.Lock()


def warn_once(message: str) -> None:
    """Warn unless the same was said before in this process."""
    said(message)
    with _warn_lock:
        if message in _warned:
            return
        _warned.add(message)
    warnings.warn(message, TTTCWarning, stacklevel=3)


def check_options(options: Options) -> Options:
    """Raise where an option is not what it may be."""
    if options.backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {options.backend!r}")
    if options.mini_batch_size is not None:
        check_mini_batch_size(options.mini_batch_size)
    logs.configure()
    return options


def of_mode(mode: str | None, tune: bool | None) -> dict[str, bool]:
    """The options that a mode of torch.compile stands for; ``tune`` says more than the mode does."""
    if mode is None:
        mode = "default"
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    search, graphs = MODES[mode]
    wanted = (search or None) if tune is None else tune
    return {"tune": tuning_wanted(wanted), "cuda_graphs": graphs}
