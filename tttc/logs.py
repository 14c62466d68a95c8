"""Logging under the logger ``tttc``, switched on by ``TTTC_LOGS`` in the manner of PyTorch's ``TORCH_LOGS``."""

from __future__ import annotations

import logging
import os
import sys
import threading

VARIABLE = "TTTC_LOGS"
CHANNELS = {
    "capture": "the graphs TorchDynamo hands over, and each step as captured",
    "passes": "each pass of a scan: its time and its nodes; with + the graph it leaves",
    "scans": "the form each tttc.scan takes, and why",
    "fusion": "the regions of the model graph; with + the fused graph",
    "schedule": "the schedule each kernel of a scan is rendered with",
    "kernels": "the file of each kernel and the time of its first launch; with + its source",
    "warm": "the file that a compiled model comes from or goes to, and why it does not",
    "graphs": "what runs without CUDA graphs where they are asked for, and why",
}
LEVELS = {"+": logging.DEBUG, "-": logging.ERROR}

_lock = threading.Lock()
_read: str | None = None  # the value of the variable that is in force


class _ToStderr(logging.StreamHandler):
    """Writes to what ``sys.stderr`` is at the time, which programs and tests replace."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("[%(asctime)s %(name)s] %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


_handler = _ToStderr()


def parse(text: str) -> dict[str, int]:
    """``{channel: level}`` of a value like ``"+passes,schedule"``.

    A name alone logs at INFO, with ``+`` at DEBUG, with ``-`` errors only; ``all`` is every channel, and what
    comes later wins.

    Raises:
        ValueError: a name that is none; it lists those there are.

    Example:
        >>> parse("+passes, kernels")
        {'passes': 10, 'kernels': 20}
    """
    levels: dict[str, int] = {}
    for item in filter(None, (x.strip() for x in text.split(","))):
        level, name = LEVELS.get(item[0], logging.INFO), item.lstrip("+-")
        if name == "all":
            levels |= dict.fromkeys(CHANNELS, level)
        elif name in CHANNELS:
            levels[name] = level
        else:
            known = "\n".join(f"  {n:<9} {what}" for n, what in CHANNELS.items())
            raise ValueError(
                f"{VARIABLE}: expected names separated by commas, each with + for more or - for less, "
                f"got {item!r}. The names are\n{known}\n  {'all':<9} all of these"
            )
    return levels


def configure(text: str | None = None) -> None:
    """Send what the channels of ``text`` log to stderr; None: as the environment variable ``TTTC_LOGS`` says.

    Without the variable nothing is touched: the loggers ``tttc.passes`` and so on are a program's own to
    configure. It is read when a model is compiled; an unchanged value is read once.

    Raises:
        ValueError: as :func:`parse`.
    """
    global _read
    text = os.environ.get(VARIABLE, "") if text is None else text
    with _lock:
        if text == (_read or ""):
            return
        levels, root = parse(text), logging.getLogger("tttc")
        _read = text
        root.removeHandler(_handler)
        if levels:
            root.addHandler(_handler)
        root.propagate = not levels
        for name in CHANNELS:
            logging.getLogger(f"tttc.{name}").setLevel(levels.get(name, logging.NOTSET))
