"""Emitted kernels: source kept where a debugger can step into it, imported from there."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

log = logging.getLogger("tttc.kernels")
_lock = threading.Lock()
_warned: set[Path] = set()
KINDS = (
    "kernels",
    "schedules",
    "programs",
)  # the folders of the cache: what `tttc cache` shows and clears
_lock = threading.Lock()
_modules: dict[tuple[str, bool], ModuleType] = {}


def cache_dir() -> Path:
    """Where emitted sources and measurements are kept: ``$TTTC_CACHE_DIR``, else ``~/.cache/tttc``."""
    root = os.environ.get("TTTC_CACHE_DIR")
    return Path(root) if root else Path.home() / ".cache" / "tttc"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a text, or bytes, so that another process sees the whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def warn_about(path: Path, what: str) -> None:
    """Say what is wrong with a file of ours, once."""
    with _lock:
        if path in _warned:
            return
        _warned.add(path)
    warnings.warn(f"tttc: {path} {what}", RuntimeWarning, stacklevel=3)


@dataclass
class Kernel:
    """One emitted kernel: what ``tttc.explain(...).kernels`` lists.

    ``name`` is the function's name in ``source``; ``config`` holds launch options and constant
    arguments; ``resources`` and ``cost`` are filled in where they are known. ``compiled`` is what launches found for
    arguments laid out in one way; ``instead`` gives the kernel that runs where this one is ``refused``.
    """

    name: str
    source: str
    config: dict[str, Any] = field(default_factory=dict)
    resources: dict[str, Any] | None = None
    cost: Any = None
    compiled: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    instead: Callable[[], Kernel] | None = field(default=None, repr=False, compare=False)
    refused: bool = field(default=False, init=False, repr=False, compare=False)
    _function: Any = field(default=None, init=False, repr=False, compare=False)

    @property
    def path(self) -> Path:
        """The file that holds the source."""
        digest = hashlib.sha256(self.source.encode()).hexdigest()[:16]
        return cache_dir() / "kernels" / f"{self.name}_{digest}.py"

    def module(self) -> ModuleType:
        """The source, imported from :attr:`path` (written first where it isn't there yet)."""
        import triton

        path = self.path
        # The decorator of a kernel asks whether the interpreter runs it.
        key = (str(path), triton.knobs.runtime.interpret)
        with _lock:
            if key not in _modules:
                if not path.exists() or path.read_text(encoding="utf-8") != self.source:
                    write_atomically(path, self.source)
                spec = importlib.util.spec_from_file_location(f"tttc_kernels.{path.stem}", path)
                assert spec is not None and spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                sys.modules[spec.name] = module
                spec.loader.exec_module(module)
                log.info("%s: %s", self.name, path)
                log.debug("%s is\n%s", self.name, self.source)
                _modules[key] = module
            return _modules[key]

    def function(self) -> Any:
        """The ``triton.jit`` function."""
        if self._function is None:  # to find the module is to hash the source: not once a launch
            self._function = getattr(self.module(), self.name)
        return self._function
