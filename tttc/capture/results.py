"""What a loop leaves behind, written into what runs in its place: variables, lists, tensors written to."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch

from tttc.capture.assemble import Assembled
from tttc.capture.emit import Loop, Writer
from tttc.capture.index import Index
from tttc.capture.iterations import Iterations, stored_by
from tttc.capture.places import root_of, scalars_of
from tttc.capture.reroll import SCATTERS, Rolled
from tttc.ir.body import source_line
from tttc.ir.errors import NotLowerable


class Results:
    """Writes a plan's function.

    Args:
        met: the loop, and the variables it was met with.
    """

    def __init__(self, met: Iterations) -> None:
        self.met = met

    def write(
        self, loop: Loop, writer: Writer, rolled: Rolled, made: Assembled, appended: list[str]
    ) -> Callable[..., Any]:
        for role, argument in made.arguments.items():
            if argument.place is None:
                writer.scope[f"_constant_{role}"] = argument.tensor
        writer.begin()
        writer.arguments()
        writer.scan()
        writer.results()
        values: dict[str, str] = {}  # by place
        dtypes = {p: x.dtype for p, x in rolled.template.shapes.items()}
        index = {place: i for i, (place, _) in reversed(list(enumerate(made.states)))}
        for place in rolled.carries:
            values[place] = writer.final(index[place], "carry", dtypes[place])
        for place, carry in rolled.anchors.items():
            values[place] = writer.final(index[carry], "anchor", dtypes[place])
        lists = {}
        at = 0
        for path in appended:
            writer.line(f"_items_{at} = {writer.output(at, made.dtypes[at])}")
            lists[path] = f"_items_{at}"
            at += 1
        for path, node in rolled.written.items():
            writer.line(f"_items_{at} = {writer.output(at, made.dtypes[at])}")
            dim = int(node.args[2])  # type: ignore[arg-type]
            dim %= rolled.template.shapes[path].dim()
            start, step = rolled.moving[node, 3]
            picks = ", ".join([":"] * dim)
            items = f"_items_{at}.movedim(0, {dim})"
            where = f"{start}:{start} + (_count - 1) * {step} + 1:{step}"
            if node.target is SCATTERS[1]:
                width = rolled.moving.get((node, 4), (None, 0))[0]
                if width is None or width - start != step or tuple(node.args[5:]) not in ((), (1,)):
                    raise NotLowerable("it writes tokens with gaps", source_line(node))
                where = f"{start}:{start} + _count * {step}"
                items = f"{items}.flatten({dim}, {dim + 1})"
            writer.line(f"{path}[{picks + ', ' if picks else ''}{where}] = {items}")
            at += 1
        for path in rolled.last:
            values[path] = f"({writer.output(at, made.dtypes[at])})[-1]"
            at += 1
        self._store(writer, rolled, values, lists)
        return writer.function("run")

    def _store(
        self, writer: Writer, rolled: Rolled, values: dict[str, str], lists: dict[str, str]
    ) -> None:
        """Bind the results, write to what the program writes to."""
        template, source = rolled.template, self.met.source
        stored = stored_by(source)
        # All values first: writing one may change what another is read from.
        fresh = {}
        wanted = self.met.wanted(template) | {p for p in values if root_of(p) in source.results}
        for i, (place, text) in enumerate(values.items()):
            if place not in wanted:
                continue
            fresh[place] = f"_v_{i}"
            writer.line(f"_v_{i} = {text}")
        for place, variable in fresh.items():
            root = root_of(place)
            if place in template.in_place and place in self.met.entry:
                writer.line(f"{place}.copy_({variable})")
                fresh[place] = place
            elif root in self.met.env and root not in stored and place != root:
                getter = re.fullmatch(r"getattr\((.*), ('[^']*')\)", place)
                if getter:
                    writer.line(f"setattr({getter[1]}, {getter[2]}, {variable})")
                else:
                    writer.line(f"{place} = {variable}")
        for path, variable in lists.items():
            if path in source.joined and path in source.results:
                continue
            writer.line(f"{path}.extend({variable}.unbind(0))")
        out = []
        for name in source.results:
            if name in lists:
                out.append(f"_Joined({lists[name]})" if name in source.joined else name)
            else:
                out.append(self._rebuilt(writer, template.after[name], name, fresh, rolled))
        writer.line(f"return ({', '.join(out)}{',' if len(out) == 1 else ''})")

    def _rebuilt(
        self, writer: Writer, value: Any, path: str, fresh: dict[str, str], rolled: Rolled
    ) -> str:
        """An expression for a variable after the loop."""
        template = rolled.template
        if isinstance(value, torch.Tensor):
            if path in fresh:
                return fresh[path]
            if template.outputs[path] is template.inputs.get(path) or path in rolled.written:
                return path
            raise NotLowerable(f"{path} after the loop is not a value of its last iteration")
        if isinstance(value, Index):
            return (
                f"_start + (_count - 1) * _step + {value.at(0) - self.met.start}"
                if value.scale == self.met.step and not value.moves
                else self._lost(path)
            )
        if isinstance(value, (int, float, bool, str, type(None))):
            if path in scalars_of(self.met.env) or path in template.scalars:
                return repr(value)
            return self._lost(path)
        if path in self.met.env and path not in stored_by(self.met.source):
            return path

        def inner(x: Any, where: str) -> str:
            return self._rebuilt(writer, x, where, fresh, rolled)

        kind = f"_type_{len(writer.scope)}"
        if isinstance(value, tuple):
            items = [inner(x, f"{path}[{i}]") for i, x in enumerate(value)]
            if hasattr(value, "_fields"):
                writer.scope[kind] = type(value)
                return f"{kind}({', '.join(items)})"
            return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
        if isinstance(value, list):
            return f"[{', '.join(inner(x, f'{path}[{i}]') for i, x in enumerate(value))}]"
        if type(value) is dict:
            return f"{{{', '.join(f'{k!r}: ' + inner(x, f'{path}[{k!r}]') for k, x in value.items())}}}"
        if dataclasses.is_dataclass(value):
            writer.scope[kind] = type(value)
            fields = [f for f in dataclasses.fields(value) if f.init]
            return f"{kind}({', '.join(f'{f.name}=' + inner(getattr(value, f.name), f'{path}.{f.name}') for f in fields)})"
        if path in self.met.env:
            return path
        raise self._lost(path)

    def _lost(self, path: str) -> Any:
        raise NotLowerable(f"{path} is used after the loop, and is no tensor of its last iteration")
