"""Programs on disk: one file for each key, written whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import io
import pickle
import types
from pathlib import Path
from typing import Any

import torch
from torch._guards import Source, TracingContext, tracing

from tttc.codegen.kernel import cache_dir, warn_about, write_atomically
from tttc.warm.recording import NotKept

FORMAT = b"tttc program 1\n"


class _Pickler(pickle.Pickler):
    """Modules and operators by name."""

    def reducer_override(self, x: Any) -> Any:
        if isinstance(x, torch._ops.OpOverload):
            return _operator, (x.namespace, x._opname, x._overloadname)
        if isinstance(x, Source):  # PyTorch 2.11 gives some more than they take
            parts = {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if f.init}  # type: ignore[arg-type]
            return _source, (type(x), parts)
        if type(x) is types.ModuleType:
            return importlib.import_module, (x.__name__,)
        if isinstance(x, torch.Tensor):
            raise NotKept("it holds a tensor")
        return NotImplemented


def _source(kind: type[Source], parts: dict[str, Any]) -> Source:
    return kind(**parts)


def _operator(namespace: str, name: str, overload: str) -> Any:
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def path_of(name: str, key: str) -> Path:
    """The file of a key."""
    return cache_dir() / "programs" / f"{name}_{key[:16]}.program"


def write(path: Path, key: str, entry: Any) -> None:
    """Keep an entry; nothing is kept where the disk does not take it.

    Raises:
        NotKept: where it is not made of what can be written.
    """
    out = io.BytesIO()
    try:
        _Pickler(out, protocol=pickle.HIGHEST_PROTOCOL).dump((key, entry))
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError) as error:
        raise NotKept(f"it can't be written: {error}") from None
    body = out.getvalue()
    try:
        write_atomically(path, FORMAT + hashlib.sha256(body).digest() + body)
    except OSError as error:
        warn_about(path, f"could not be written ({error}): the next process compiles again")


def read(path: Path, key: str) -> Any:
    """What is kept under a key, or None; a file that is damaged counts as none, with one warning.

    Files are ours as much as the kernels beside them, which are imported: whoever can write them can run code.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        warn_about(path, f"cannot be read ({error})")
        return None
    at = len(FORMAT) + 32
    body = content[at:]
    if content[:at] != FORMAT + hashlib.sha256(body).digest():
        warn_about(path, "is damaged: its program is compiled as if it were not there")
        return None
    try:
        with tracing(TracingContext(None)):  # some sources of guards ask for one when they are made
            found, entry = pickle.loads(body)
    except Exception as error:  # what it names is not there any more
        raise NotKept(f"it can't be read: {error}") from None
    return entry if found == key else None
