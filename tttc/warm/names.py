"""Objects by their names: what another process finds under the same name, and whether it is the same thing."""

from __future__ import annotations

import enum
import hashlib
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

from tttc.warm.recording import NotKept

_CONSTANTS = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    type(...),
    type(NotImplemented),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_MADE = 1 << 9  # of types: by a class statement, not by an extension module (Py_TPFLAGS_HEAPTYPE)
_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops._OpNamespace)


def digest(code: types.CodeType) -> str:
    """A function's code by content, that of functions in it too; where it is written matters as little as comments do."""
    return hashlib.sha256(repr(_content(code)).encode()).hexdigest()[:32]


def _content(x: Any) -> Any:
    if isinstance(x, types.CodeType):
        return (
            x.co_qualname,
            x.co_code,
            [_content(c) for c in x.co_consts],
            (x.co_names, x.co_varnames, x.co_freevars, x.co_cellvars),
            (x.co_argcount, x.co_posonlyargcount, x.co_kwonlyargcount, x.co_flags),
            x.co_exceptiontable,
        )
    if isinstance(x, frozenset):
        return "frozenset", sorted(map(repr, map(_content, x)))
    return (type(x).__name__, [_content(y) for y in x]) if isinstance(x, tuple) else x


def resolve(module: str, qualname: str) -> Any:
    """What a module has under a name with dots; a function in a function is that which it is in.

    Raises:
        NotKept: where there is nothing.
    """
    try:
        found: Any = sys.modules.get(module) or importlib.import_module(module)
        for part in qualname.partition(".<locals>")[0].split("."):
            inside = vars(found).get(part) if isinstance(found, type) else None
            found = getattr(found, part) if inside is None else inside
    except (ImportError, AttributeError):
        raise NotKept(f"there is no {module}.{qualname}") from None
    return found


def codes(found: Any) -> Iterator[types.CodeType]:
    """The code of a function, and of what it wraps."""
    for _ in range(16):
        found = getattr(found, "fget", None) or getattr(found, "__func__", found)
        code = getattr(found, "__code__", None)
        if code is not None:
            yield code
        found = getattr(found, "__wrapped__", None)
        if found is None:
            return


def _holds(code: types.CodeType, wanted: types.CodeType) -> bool:
    return code is wanted or any(
        _holds(c, wanted) for c in code.co_consts if isinstance(c, types.CodeType)
    )


class Codes:
    """Functions whose code a program was made of, so that a program made of other code is not used.

    Args:
        traced: the code that TorchDynamo went through.
        classes: some of which may have made functions that have no other name (named tuples).
    """

    def __init__(self, traced: list[types.CodeType], classes: list[type]) -> None:
        modules = {
            file: name
            for name, m in list(sys.modules.items())
            if isinstance(file := getattr(m, "__file__", None), str)
        }
        self.known: dict[tuple[str, str], str] = {}
        for code in dict.fromkeys(traced):
            name = modules.get(code.co_filename)
            if name is not None:
                self._add(code, name, code.co_qualname)
            else:
                self._add_of_class(code, classes)

    def _add(self, code: types.CodeType, module: str, qualname: str) -> None:
        for found in codes(resolve(module, qualname)):
            if _holds(found, code):
                self.known[module, qualname] = digest(found)
                return
        raise NotKept(f"{module}.{qualname} is not the code that was traced")

    def _add_of_class(self, code: types.CodeType, classes: list[type]) -> None:
        for cls in classes:
            for name, value in vars(cls).items():
                if any(found is code for found in codes(value)):
                    resolve(cls.__module__, f"{cls.__qualname__}.{name}")
                    self.known[cls.__module__, f"{cls.__qualname__}.{name}"] = digest(code)
                    return
        raise NotKept(f"{code.co_filename} has code that no module has")


def check_codes(known: dict[tuple[str, str], str]) -> None:
    """Raise :class:`NotKept` where a function is not what it was."""
    for (module, qualname), wanted in known.items():
        if all(digest(code) != wanted for code in codes(resolve(module, qualname))):
            raise NotKept(f"{module}.{qualname} has changed")


def described(x: Any) -> str:
    """What a single object is, in words that are the same in every process; ``x`` is all that answers to them.

    Raises:
        NotKept: for what no other process could find.
    """
    if type(x) in _CONSTANTS:
        return f"{type(x).__name__} {x!r}"
    if isinstance(x, types.CodeType):
        return f"code {x.co_filename}:{x.co_qualname} {digest(x)}"
    if isinstance(x, types.ModuleType) and not isinstance(x, _OPERATORS):
        if sys.modules.get(x.__name__) is x:
            return f"module {x.__name__}"
        if x is torch.ops:
            return "torch.ops"
    if isinstance(x, _OPERATORS):
        return f"operator {x}"
    if isinstance(x, enum.Enum):
        return f"{described(type(x))} {x.name}"
    if isinstance(x, types.BuiltinFunctionType):
        return _builtin(x)
    if isinstance(x, type) and not x.__flags__ & _MADE:
        return f"type {x.__module__}.{x.__qualname__}"
    module, qualname = getattr(x, "__module__", None), getattr(x, "__qualname__", None)
    if isinstance(module, str) and isinstance(qualname, str) and "<locals>" not in qualname:
        found = resolve(module, qualname)
        if found is x or getattr(found, "__func__", None) is x:
            code = getattr(x, "__code__", None)
            return f"{module}.{qualname}" + ("" if code is None else f" {digest(code)}")
    if isinstance(qualname, str):
        raise NotKept(f"another process has no name for {module}.{qualname}")
    raise NotKept(f"another process has no name for a {type(x).__qualname__}")


def content(x: Any) -> str:
    """A value in words, as :func:`described`; two that are equal but of other types read differently.

    Raises:
        NotKept: for what is no number, string, single object, or made of these.
    """
    if isinstance(x, slice):
        return f"slice {content((x.start, x.stop, x.step))}"
    if isinstance(x, (tuple, list, torch.Size)):
        return f"{described(type(x))} [{', '.join(map(content, x))}]"
    if isinstance(x, (set, frozenset)):
        return f"{described(type(x))} {sorted(map(content, x))}"
    return repr(x) if isinstance(x, range) else described(x)


def _builtin(x: types.BuiltinFunctionType) -> str:
    """A function of an extension module, or a method of a class; PyTorch's own belong to nobody."""
    of: Any = x.__self__
    for owner in (of,) if of is not None else (torch, torch._C):
        if isinstance(owner, (types.ModuleType, type)) and getattr(owner, x.__name__, None) == x:
            where = "" if isinstance(owner, types.ModuleType) else f"{owner.__module__}."
            return f"builtin {where}{owner.__name__}.{x.__name__}"
    raise NotKept(f"another process has no name for the builtin {x.__name__}")
