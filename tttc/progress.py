"""What is being done at the moment: shown on a terminal, kept in the log."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.RLock()
_texts: list[str] = []  # outermost first
_live: Any = None


def wanted() -> bool:
    """Whether progress is shown: stderr is a terminal, and ``TTTC_PROGRESS`` is not ``0``."""
    return sys.stderr.isatty() and os.environ.get("TTTC_PROGRESS") != "0"


@contextmanager
def doing(what: str) -> Iterator[Callable[[str], None]]:
    """Show on stderr what is being done, with a spinner, if it is a terminal; the value changes the text.

    Within another ``doing`` the text is added to the other's. Nothing stays on the screen.
    """
    with _lock:
        place = len(_texts)
        _texts.append(what)
        _show()

    def change(text: str) -> None:
        with _lock:
            if place < len(_texts):
                _texts[place] = text
                _show()

    try:
        yield change
    finally:
        with _lock:
            del _texts[place:]
            _show()


BAR = 20  # characters


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar that fills with each call of the value, which takes words to show beside it; shown as :func:`doing`.

    It may be called from several threads.
    """
    done = 0
    with doing(f"{what} {'·' * BAR} 0/{total}") as change:

        def advance(words: str = "") -> None:
            nonlocal done
            with _lock:
                done += 1
                filled = BAR * min(done, total) // max(total, 1)
                bar = "━" * filled + "·" * (BAR - filled)
                change(f"{what} {bar} {done}/{total} {words}".rstrip())

        yield advance


def _show() -> None:
    global _live
    if not _texts:
        if _live is not None:
            _live.stop()
            _live = None
        return
    if _live is None and not wanted():
        return
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner
    from rich.text import Text

    shown = Spinner("dots", Text(": ".join(_texts)), style="green")
    if _live is not None:
        _live.update(shown)
        return
    # What the program prints meanwhile goes where it would have gone.
    _live = Live(shown, console=Console(stderr=True), transient=True, redirect_stdout=False)
    _live.start()


@contextmanager
def phase(channel: str, what: str) -> Iterator[Callable[[Any], None]]:
    """A part of a compilation: shown as :func:`doing`, and logged to a channel of ``TTTC_LOGS`` when it is done.

    The value takes what came of it, which is logged too: at INFO its number of nodes, at DEBUG as it prints.
    """
    log = logging.getLogger(f"tttc.{channel}")
    result: Any = None

    def keep(made: Any) -> None:
        nonlocal result
        result = made

    start = time.perf_counter()
    with doing(what):
        yield keep
    if log.isEnabledFor(logging.INFO):
        spent = 1e3 * (time.perf_counter() - start)
        graph = getattr(getattr(result, "gm", result), "graph", None)
        nodes = (
            "" if graph is None else f"{sum(n.op == 'call_function' for n in graph.nodes)} nodes, "
        )
        log.info("%s: %s%.1f ms", what, nodes, spent)
        if result is not None:
            log.debug("%s leaves\n%s", what, result if graph is None else graph)
