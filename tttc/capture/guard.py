"""The condition under which a plan holds for other variables, as source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tttc.capture.assemble import Assembled
from tttc.capture.emit import Loop
from tttc.capture.freedom import Size
from tttc.capture.generated import compiled_source
from tttc.capture.iterations import Iterations
from tttc.capture.likeness import likeness
from tttc.capture.reroll import Rolled


def guard(
    met: Iterations,
    loop: Loop,
    rolled: Rolled,
    made: Assembled,
    numbers: dict[str, Any],
    appended: list[str],
) -> Callable[..., Any]:
    """Whether a plan holds for other variables: same ranks, dtypes, features and numbers."""
    conditions = [
        f"_bounds[0] == {met.start}",
        f"_bounds[2] == {met.step}",
        "_bounds[1] - _bounds[0] >= _bounds[2]",
    ]
    scope: dict[str, Any] = {"_torch": torch}
    conditions += likeness(met.env, set(appended), met.source.made, scope)
    if met.facts.known is not None:
        conditions.append(f"_bounds[1] <= {met.start + met.facts.known * met.step}")
    if made.stops:
        conditions.append(f"_torch.is_grad_enabled() is {met.gradients}")
    names: dict[str, str] = {}
    body = loop.labelled.body
    for g in loop.given.values():
        place = g.expression.removesuffix(".detach()")
        if place not in met.entry:
            continue
        x = met.entry[place]
        conditions += [f"{place}.dim() == {x.dim()}", f"{place}.dtype == _{x.dtype}"]
        if made.stops and not x.requires_grad and place in rolled.carries and met.gradients:
            conditions.append(f"not {place}.requires_grad")
        for at, of_axis in enumerate(g.axes):
            axis = g.axis(at)
            if axis < 0 or (g.width is not None and at == g.dim):
                continue
            if x.shape[axis] == 1 or not of_axis or not any(n in loop.free for n in of_axis):
                conditions.append(f"{place}.shape[{axis}] == {x.shape[axis]}")
            elif len(of_axis) == 1:
                known = names.setdefault(of_axis[0], f"{place}.shape[{axis}]")
                conditions.append(
                    f"{place}.shape[{axis}] "
                    + (f"== {known}" if known != f"{place}.shape[{axis}]" else "!= 1")
                )
            else:
                size = " * ".join(names.get(n, str(body.sizes[n])) for n in of_axis)
                conditions.append(f"{place}.shape[{axis}] == {size}")
    for path, x in numbers.items():
        if isinstance(x, Size):
            conditions.append(f"{path} == {names[x.name]}")
        elif isinstance(x, (bool, str, type(None))):
            conditions.append(f"{path} is {x!r}" if not isinstance(x, str) else f"{path} == {x!r}")
        elif isinstance(x, torch.dtype):
            conditions.append(f"{path} is _{x}")
        elif isinstance(x, (int, float)) and x - x == 0:
            conditions.append(f"{path} == {x!r}")
    conditions += [f"len({p}) == 0" for p in appended if p in met.source.joined]
    unpack = f"({', '.join(met.source.inputs)}{',' if len(met.source.inputs) == 1 else ''})"
    lines = [
        "def fits(_bounds, _values):",
        f"    {unpack} = _values" if met.source.inputs else "    pass",
        "    try:",
        *(f"        if not ({c}):\n            return False" for c in dict.fromkeys(conditions)),
        "    except (AttributeError, IndexError, KeyError, TypeError):",
        "        return False",
        "    return True",
    ]
    return compiled_source("fits", "\n".join(lines) + "\n", scope)
