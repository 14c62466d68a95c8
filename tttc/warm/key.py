"""What a program is looked up by: all that is cheap to say about a frame and about what compiles it.

Guards decide whether a program is used. A key has what most often tells programs apart, so that each has a file of its own,
and what guards do not look at: versions, configurations, and the compiler's own source.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tttc.options import Options
from tttc.tuning.remembered import device_words, versions
from tttc.warm.names import digest
from tttc.warm.recording import NotKept

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)


_imported = time.time()


@functools.cache
def _compiler() -> str:
    """The source of this package, wherever parts of it are.

    Raises:
        NotKept: where it is newer than this process, which then does not run it.
    """
    whole = hashlib.sha256()
    for package in ("tttc", "tttc.passes", "tttc.codegen"):
        for root in sys.modules[package].__path__:
            for path in sorted(Path(root).rglob("*.py")):
                if path.stat().st_mtime >= _imported:
                    raise NotKept(f"{path} is newer than this process")
                whole.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return whole.hexdigest()


def key_of(frame: Any, options: Options) -> str:
    """The key of a frame that is to be compiled."""
    said = (
        versions(),
        platform.python_version(),
        (sys.platform, platform.machine()),
        _compiler(),
        options,
        [_config(c) for c in (torch._dynamo.config, torch._functorch.config)],
        _config(torch.fx.experimental._config),  # type: ignore[attr-defined]
        torch._C._dynamo.guards.GlobalStateGuard().__getstate__(),
        torch.get_float32_matmul_precision(),
        torch.is_inference_mode_enabled(),
        sorted(
            (k, v) for k, v in os.environ.items() if k.startswith(("TTTC_", "TRITON_INTERPRET"))
        ),
        frame.f_code.co_filename,
        digest(frame.f_code),
        _Described().of(dict(frame.f_locals)),
    )
    return hashlib.sha256(repr(said).encode()).hexdigest()


def _config(module: Any) -> Any:
    return _sorted(module.save_config_portable(ignore_private_configs=False))


def _sorted(x: Any) -> Any:
    if isinstance(x, dict):
        return sorted((str(k), _sorted(v)) for k, v in x.items())
    return sorted(map(repr, x)) if isinstance(x, (set, frozenset)) else repr(x)


class _Described:
    """The variables of a frame in words; what is met again is said to be the same."""

    def __init__(self) -> None:
        self.met: dict[int, int] = {}

    def of(self, x: Any) -> Any:
        """Modules by classes and plain attributes, tensors without values; other objects by their class alone."""
        if isinstance(x, _PLAIN):
            return repr(x)
        if isinstance(x, (torch.Tensor, nn.Module)):
            if id(x) in self.met:
                return "again", self.met[id(x)]
            self.met[id(x)] = len(self.met)
        if isinstance(x, torch.Tensor):
            return self._tensor(x)
        if isinstance(x, nn.Module):
            attributes = {
                k: v
                for k, v in vars(x).items()
                if isinstance(v, _PLAIN) or k in ("_parameters", "_buffers", "_modules")
            }
            return _class(x), self.of(attributes)
        if isinstance(x, dict):
            return _class(x), [(repr(k), self.of(v)) for k, v in x.items()]
        if isinstance(x, (tuple, list)):
            return _class(x), [self.of(v) for v in x]
        return _class(x)

    def _tensor(self, x: torch.Tensor) -> Any:
        if isinstance(x, nn.Parameter):  # its sizes are constants
            shape: Any = (tuple(x.shape), x.stride())
        else:
            shape = [min(n, 2) for n in x.shape], x.is_contiguous()
        device = tuple(device_words(x.device).values()), x.device.index
        return _class(x), shape, x.dtype, device, x.requires_grad


def _class(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"
