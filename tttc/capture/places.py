"""Where the variables of a loop hold tensors: in lists, tuples, dicts, dataclasses, attributes, modules.

A *place* is named by the expression that reads it, ``state["W"]`` or ``self.memory``.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Change = Callable[[str, torch.Tensor], Any]
_ATOMS = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device)
_OPAQUE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, torch.Size)


_OF_MODULES = frozenset(nn.Module().__dict__)


def _is_of_torch(value: nn.Module) -> bool:
    return type(value).__module__.partition(".")[0] == "torch"


class Copier:
    """A structural copy of values: containers are copied, tensors (and numbers) replaced, shared objects stay shared."""

    def __init__(self, change: Change, atom: Callable[[Any], Any] = lambda x: x) -> None:
        self.change = change
        self.atom = atom
        self.memo: dict[int, Any] = {}
        self.first: dict[int, str] = {}  # where a container was met first
        self.aliases: dict[str, str] = {}
        self.kept: list[Any] = []  # an id names an object only while the object lives
        self.scalars: dict[str, Any] = {}
        self.lists: dict[str, list[Any]] = {}
        self.objects: dict[
            str, Any
        ] = {}  # what is neither a tensor nor a number, before what it holds

    def copy(self, value: Any, path: str, depth: int = 0) -> Any:
        """The copy of ``value``, which the program reads as ``path``."""
        if isinstance(value, torch.Tensor):
            return self.change(path, value)
        if isinstance(value, _ATOMS):
            self.scalars[path] = value
            return self.atom(value)
        if id(value) not in self.memo:
            self.objects[path] = value
        if isinstance(value, _OPAQUE) or depth > 12:
            return value
        if isinstance(value, tuple):
            parts = [self.copy(x, f"{path}[{i}]", depth + 1) for i, x in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if id(value) in self.memo:
            if not path.startswith(self.first[id(value)]):  # a cycle has no end
                self.aliases[path] = self.first[id(value)]
            return self.memo[id(value)]
        self.kept.append(value)
        self.first[id(value)] = path
        if isinstance(value, list):
            made: Any = []
            self.memo[id(value)] = made
            self.lists[path] = made
            made += [self.copy(x, f"{path}[{i}]", depth + 1) for i, x in enumerate(value)]
            return made
        if isinstance(value, dict):
            made = copy.copy(value)
            self.memo[id(value)] = made
            for k, x in value.items():
                made[k] = self.copy(x, f"{path}[{k!r}]", depth + 1)
            return made
        if isinstance(value, types.MethodType):
            owner = self.copy(value.__self__, f"{path}.__self__", depth)
            return types.MethodType(value.__func__, owner)
        if isinstance(value, nn.Module):
            return self._module(value, path, depth)
        if dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
            return self._object(value, path, depth)
        return value

    def everywhere(self, found: dict[str, Any]) -> dict[str, Any]:
        """What was found by place, under every name that the places have."""
        out = dict(found)
        for alias, first in self.aliases.items():
            for path, x in found.items():
                if path.startswith(first) and path[len(first) : len(first) + 1] in ("", ".", "["):
                    out.setdefault(alias + path[len(first) :], x)
        return out

    def _object(self, value: Any, path: str, depth: int) -> Any:
        made = object.__new__(type(value))
        self.memo[id(value)] = made
        for name, x in vars(value).items():
            object.__setattr__(made, name, self.copy(x, f"{path}.{name}", depth + 1))
        return made

    def _module(self, value: nn.Module, path: str, depth: int) -> Any:
        made = object.__new__(type(value))
        self.memo[id(value)] = made
        inside = dict(value.__dict__)
        for group in ("_parameters", "_buffers", "_modules"):
            inside[group] = {}
        made.__dict__.update(inside)
        for group in ("_parameters", "_buffers", "_modules"):
            for name, x in value.__dict__[group].items():
                where = f"{path}.{name}" if name.isidentifier() else f"getattr({path}, {name!r})"
                inside[group][name] = self.copy(x, where, depth + 1)
        for name, x in value.__dict__.items():
            if name not in _OF_MODULES and not (_is_of_torch(value) and name.startswith("_")):
                made.__dict__[name] = self.copy(x, f"{path}.{name}", depth + 1)
        return made


def tensors_of(env: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that the variables hold, by place."""
    found: dict[str, torch.Tensor] = {}

    def note(path: str, x: torch.Tensor) -> torch.Tensor:
        found[path] = x
        return x

    copier = Copier(note)
    for name, value in env.items():
        copier.copy(value, name)
    return copier.everywhere(found)


def scalars_of(env: dict[str, Any]) -> dict[str, Any]:
    """The numbers, strings and flags that the variables hold, by place."""
    copier = Copier(lambda path, x: x)
    for name, value in env.items():
        copier.copy(value, name)
    return copier.scalars


def containers_of(value: Any) -> Iterator[Any]:
    """The dictionaries and dataclasses that a value consists of."""
    if isinstance(value, (dict, list, tuple)) or _is_record(value):
        if not isinstance(value, (list, tuple)):
            yield value
        for x in list(_items(value).values()):
            yield from containers_of(x)


def contents(value: Any) -> list[tuple[Any, dict[Any, Any]]]:
    """What is in each of them."""
    return [(x, dict(_items(x))) for x in containers_of(value)]


def is_changed(before: list[tuple[Any, dict[Any, Any]]]) -> bool:
    """Whether one of them holds something else than before."""
    return any(
        list(_items(x)) != list(old) or any(y is not old[k] for k, y in _items(x).items())
        for x, old in before
    )


def is_shared(env: dict[str, Any]) -> bool:
    """Whether two variables hold the same one."""
    held = [{id(x) for x in containers_of(value)} for value in env.values()]
    return sum(len(x) for x in held) > len(set().union(*held))


def apart(value: Any) -> Any:
    """A copy that shares no dictionary and no dataclass with others."""
    if type(value) is dict:
        return {k: apart(x) for k, x in value.items()}
    if type(value) is tuple:
        return tuple(apart(x) for x in value)
    if _is_record(value):
        made = copy.copy(value)
        for name, x in vars(value).items():
            object.__setattr__(made, name, apart(x))
        return made
    return value


def _is_record(value: Any) -> bool:
    return (
        dataclasses.is_dataclass(value)
        and not isinstance(value, (type, nn.Module))
        and hasattr(value, "__dict__")
    )


def _items(value: Any) -> dict[Any, Any]:
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    return value if isinstance(value, dict) else vars(value)


def root_of(path: str) -> str:
    """The variable that a place starts from."""
    match = re.match(r"(?:getattr\()*([A-Za-z_]\w*)", path)
    assert match is not None
    return match[1]
