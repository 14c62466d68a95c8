"""What variables must have in common with those a plan was made for, their tensors and numbers apart.

A site belongs to a class or a function: its plans are asked about every object of that class, whose activations and
layers may be others.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from tttc.capture.places import Copier


def likeness(
    env: dict[str, Any], growing: set[str], made: set[str], scope: dict[str, Any]
) -> list[str]:
    """Conditions on the kinds of objects that variables hold, and on how many they hold.

    Args:
        env: the variables a plan was made for.
        growing: lists of any length.
        made: variables that every call of the function binds anew: a function among them is another every time.
        scope: what the conditions name goes there.

    Returns:
        Expressions; one may only be asked where those before it hold.
    """
    walk = Copier(lambda path, x: x)
    for name, value in env.items():
        walk.copy(value, name)
    found: list[str] = []

    def named(x: Any) -> str:
        name = f"_kind_{len(scope)}"
        scope[name] = x
        return name

    for path, x in walk.objects.items():
        if path in made and callable(x) and not isinstance(x, nn.Module):
            continue
        if isinstance(x, types.FunctionType) and not x.__closure__ and not x.__defaults__:
            found.append(
                f"{path}.__code__ is {named(x.__code__)}"
            )  # one of its own for every object
        elif isinstance(x, (type, types.FunctionType, types.BuiltinFunctionType)):
            found.append(f"{path} is {named(x)}")
        elif isinstance(x, types.MethodType):
            found.append(f"{path}.__func__ is {named(x.__func__)}")
        elif isinstance(x, (torch.Size, types.ModuleType)) or path in growing:
            continue
        elif isinstance(x, (nn.ModuleList, nn.Sequential, nn.ModuleDict, list, tuple)):
            found += [f"type({path}) is {named(type(x))}", f"len({path}) == {len(x)}"]
        elif isinstance(x, dict):
            found.append(f"len({path}) == {len(x)}")
            found += [f"{k!r} in {path}" for k in x if isinstance(k, (str, int))]
        else:
            found.append(f"type({path}) is {named(type(x))}")
    return found
