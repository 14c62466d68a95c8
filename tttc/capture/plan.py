"""From a loop in a running program to what runs in its place."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tttc.capture.assemble import Argument, Assembled, assemble
from tttc.capture.check import check_run
from tttc.capture.emit import Given, Loop, Writer, write_step
from tttc.capture.facts import Facts
from tttc.capture.grid import labelled, pieces
from tttc.capture.index import Index, Length
from tttc.capture.iteration import Env, Iteration, trace
from tttc.capture.layout import Pieces
from tttc.capture.likeness import likeness
from tttc.capture.places import Copier, apart, is_shared, scalars_of, tensors_of
from tttc.capture.reroll import (
    SCATTERS,
    Match,
    Rolled,
    moving_indices,
    quietest,
    reroll,
    results_of,
)
from tttc.capture.source import LoopSource, compiled_source
from tttc.ir.body import Body, operands_of, source_line, spec_of
from tttc.ir.errors import NotLowerable

CHECKED_MINI_BATCHES = 1  # of a re-rolled loop, compared with the loop itself when it is planned
CHECKED_ITERATIONS = 20  # more, or more numbers, cost too much unless validation is asked for
CHECKED_NUMBERS = 1 << 20
LARGEST_PERIOD = 64  # iterations that are looked at
FREE_MINI_BATCH = 16  # of a state that no update looks at: any size gives the same


class NoTokens(NotLowerable):
    """A loop that does not run over tokens: no business of this compiler."""


@dataclass
class Plan:
    """What runs in the place of a loop, and for which variables it was made."""

    fits: Callable[[Any, Any], bool]
    run: Callable[[Any, Any], Any]
    step: Callable[..., Any]
    whole: (
        Callable[[Any, Any], Any] | None
    )  # how many iterations ``run`` does, where it may leave one

    def rest(self, bounds: Any, values: Any) -> tuple[Any, ...]:
        """The numbers of the iterations that are left: the last one, where it takes fewer tokens than the others."""
        if self.whole is None:
            return ()
        start, stop, step = bounds
        done = self.whole(bounds, values)
        return (start + done * step,) if start + done * step < stop else ()


class Planner:
    """Makes a plan for one loop and the variables it starts from."""

    def __init__(
        self,
        source: LoopSource,
        bounds: tuple[int, int, int],
        values: Sequence[Any],
        mode: FakeTensorMode,
        scan: Callable[..., Any],
        verify: bool = False,
    ) -> None:
        self.source = source
        self.verify = verify
        self.start, self.stop, self.step = (int(x) for x in bounds)
        self.count = whole_iterations(source, bounds, values)
        self.env: Env = dict(zip(source.inputs, values, strict=True))
        self.mode = mode
        self.scan = scan
        self.facts = Facts(self.count)
        code = source.body.__code__  # type: ignore[union-attr]
        self.names = list(code.co_varnames[1 : code.co_argcount])
        self.entry = tensors_of(self.env)
        self.gradients = torch.is_grad_enabled()

    # -- the iterations --------------------------------------------------------------------------------

    def iteration(self, n: int, env: Env, shapes: dict[str, tuple[int, ...]]) -> Iteration:
        """Iteration n, from variables like ``env``."""
        facts = Facts(self.count)
        variable = Index.of(facts, n, self.step, self.start)
        env = {k: Length(x) if type(x) is int and x == self.stop else x for k, x in env.items()}
        try:
            made = trace(self.source.body, variable, env, self.names, self.mode, shapes, facts)  # type: ignore[arg-type]
        except NotLowerable:
            raise
        except Exception as error:  # whatever a user's program may raise where it is only traced
            raise NotLowerable(f"it can't be traced: {type(error).__name__}: {error}") from error
        self.facts.add(facts)
        return made

    def rolled(self) -> Rolled:
        """The loop re-rolled."""
        iterations = {0: self.iteration(0, self.env, {})}
        if is_shared(self.env) and not iterations[0].mutates:
            # An anchor may be the very object that the carry is; what each is for shows where they differ.
            iterations[0] = self.iteration(0, _apart(self.env), {})
        for n in range(1, min(self.count, 3)):
            iterations[n] = self.iteration(n, self._left(iterations[n - 1]), {})
        last = max(iterations)
        first, second = iterations[last - 1], iterations[last]
        if not _reads_tokens(first, second):
            raise NoTokens("it does not run over tokens")
        self._check_scalars(first, second)
        # What the quiet ones do, those that renew a mini-batch do too.
        n = quietest({m: iterations[m] for m in (last, last - 1)}, self.facts.limits)
        other = 2 * last - 1 - n
        moving = moving_indices(iterations[n], iterations[other], (n, other))
        if self.facts.lost:
            raise NotLowerable(
                "what it does with the loop variable can't be followed", self.facts.lost[0]
            )
        period = self.facts.period
        more = self.facts.places()
        if period is not None:
            more |= {period - 1, period, period + 1, 2 * period}
        elif not more:
            more.add(min(self.count - 1, 3))
        if len(more) > LARGEST_PERIOD:
            raise NotLowerable("too many of its iterations may do something else")
        shapes = self._longer(iterations[n], moving, max([self.count - 1, *more]))
        steady = self._left(iterations[n])
        for m in sorted(more - set(iterations)):
            iterations[m] = self.iteration(m, steady, shapes)
        base = quietest({m: x for m, x in iterations.items() if m}, self.facts.limits)
        moving = {
            (_counterpart(iterations[n], iterations[base])[node], place): x
            for (node, place), x in moving.items()
        }
        self.base = base
        return reroll(iterations, base, moving, period, self._wanted(iterations[base]), self._same)

    @staticmethod
    def _left(iteration: Iteration) -> Env:
        """The variables that an iteration hands to the next."""
        return iteration.after if iteration.mutates else _apart(iteration.after)

    def _longer(self, iteration: Iteration, moving: Any, last: int) -> dict[str, tuple[int, ...]]:
        """Shapes in which every tensor has as many tokens as iterations up to ``last`` read."""
        if last < self.count:
            return {}
        shapes: dict[str, tuple[int, ...]] = {}
        by_node = {n: p for p, n in iteration.inputs.items()}
        for (node, _), (start, step) in moving.items():
            place = by_node.get(node.args[0])
            if place is None:
                continue
            old = iteration.shapes[place].shape
            dim = node.args[2 if node.target in SCATTERS else 1] % len(old)
            size = max(old[dim], start + step * last + abs(step))
            shape = list(shapes.get(place, old))
            shape[dim] = max(shape[dim], size)
            shapes[place] = tuple(shape)
        return shapes

    def _same(self, p: str, q: str) -> bool:
        return p in self.entry and self.entry[p] is self.entry.get(q)

    def _check_scalars(self, first: Iteration, second: Iteration) -> None:
        for path, x in second.scalars.items():
            root = _root(path)
            carried = root in self.env or root in self.source.results
            if carried and not isinstance(x, Index) and first.scalars.get(path, x) != x:
                raise NotLowerable(f"{path} counts along with the loop")

    def _wanted(self, iteration: Iteration) -> set[str]:
        """Places whose values are seen after the loop."""
        stored = _stored(self.source)
        wanted = set()
        for path, node in iteration.outputs.items():
            root = _root(path)
            inside = root in self.env and root not in stored
            if root in self.source.results or inside or path in iteration.in_place:
                if node is iteration.inputs.get(path) and path not in self.source.results:
                    continue
                wanted.add(path)
        return wanted

    # -- the plan ------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """What runs in the place of the loop.

        Raises:
            NotLowerable: where it can't be re-rolled, with the reason and the line.
        """
        if self.source.refusal is not None:
            raise NotLowerable(self.source.refusal, self.source.where)
        rolled = self.rolled()
        appended = list(rolled.appended)
        if not rolled.carries:
            raise NoTokens("no value goes from one token to the next")
        made = self._assembled(rolled)
        if not any(x.startswith("token") for x in made.roles):
            raise NoTokens("it reads no tokens")
        for argument in made.arguments.values():
            if argument.place is not None and argument.place not in self.entry:
                raise NotLowerable(f"{argument.place} is first bound inside the loop")
        marked = labelled(made.gm, made.roles)
        parts = pieces(marked.body)
        loop = Loop(
            marked,
            parts,
            {
                role: self._given(role, argument, marked.axes[role])
                for role, argument in sorted(
                    made.arguments.items(),
                    key=lambda x: ("token", "shared", "carry").index(x[0].rpartition("_")[0]),
                )
            },
            self.source.inputs,
            rolled.mini_batch_size or _mini_batch_size(marked.body),
            rolled.offset,
            names=f"{self.source.function}:{self.source.statement.lineno}",
        )
        for place, carry in rolled.anchors.items():
            if rolled.offset:
                for i, (p, stopped) in enumerate(made.states):
                    if p == carry:
                        like = rolled.template.shapes[place]
                        argument = Argument(place, like, stopped=stopped)
                        loop.given[f"anchor_{i}"] = self._given(
                            f"anchor_{i}", argument, marked.axes[f"carry_{i}"]
                        )
        self.text = _text(marked.body)
        numbers = self._numbers(rolled)
        self._find_free(loop, rolled, numbers)
        step = write_step(loop)
        whole = compiled_source("whole", "\n".join(self._counting(loop)) + "\n", {})
        writer = Writer(loop, step, {"_scan": self.scan, "_whole": whole, **_scan_names()})
        run = self._write(loop, writer, rolled, made, appended)
        fits = self._guard(loop, rolled, made, numbers, appended)
        self._check(run, loop, rolled, numbers)
        rest = any(g.width is not None for g in loop.given.values())
        return Plan(fits, run, step, whole if rest else None)

    def _given(self, role: str, argument: Argument, axes: list[Any]) -> Given:
        place = argument.place
        expression = f"_constant_{role}" if place is None else place
        if argument.stopped:
            expression = f"{expression}.detach()"
        tensor = argument.tensor
        if role.startswith("carry") and place in self.entry:
            tensor = self.entry[place]
        dim, start, step = argument.dim, argument.start, argument.step or 1
        return Given(expression, axes, tensor, dim, start, step, argument.width)

    def _check(
        self,
        run: Callable[..., Any],
        loop: Loop,
        rolled: Rolled,
        numbers: dict[str, Any],
    ) -> None:
        """Compare what was written with the loop itself on small numbers."""
        count = min(self.count, CHECKED_MINI_BATCHES * (rolled.mini_batch_size or 1) + 2)
        if count > CHECKED_ITERATIONS and not self.verify:
            return
        small = {name: 2 for name in loop.free}
        shapes: dict[str, tuple[int, ...]] = {}
        for place, axes, dim, moved in self._layouts(loop, rolled):
            if place not in self.entry or place in shapes:
                continue
            shape = list(self.entry[place].shape)
            offset = len(shape) - len(axes) - (dim is not None)
            for at, of_axis in enumerate(axes):
                axis = at + offset + (dim is not None and at >= dim)
                if axis >= 0 and shape[axis] != 1 and any(n in small for n in of_axis):
                    sizes = (small.get(n, loop.labelled.body.sizes[n]) for n in of_axis)
                    shape[axis] = math.prod(sizes)
            if moved is not None:
                axis, start, step, width = moved
                shape[axis] = start + step * (count - 1) + width
            shapes[place] = tuple(shape)
        shapes |= {p: shapes[q] for p, q in rolled.anchors.items() if q in shapes}
        env = {**self.env, **{k: small[x.name] for k, x in numbers.items() if isinstance(x, _Size)}}
        bounds = (self.start, self.start + count * self.step, self.step)
        source = self.source
        numbers_in_all = sum(
            math.prod(shapes.get(p, x.shape)) for p, x in tensors_of(self.env).items()
        )
        if numbers_in_all > CHECKED_NUMBERS and not self.verify:
            return
        kept = [x for x in source.inputs if x not in _stored(source)]
        check_run(
            run,
            source.body,  # type: ignore[arg-type]
            env,
            self.names,
            source.inputs,
            source.results,
            kept,
            shapes,
            bounds,
        )

    def _layouts(self, loop: Loop, rolled: Rolled) -> Iterator[tuple[Any, ...]]:
        """The axes of each tensor, by place: names, which is left out, and where iterations move along it."""
        for g in loop.given.values():
            moved = None if g.dim is None else (g.dim, g.start, g.step, g.width or 1)
            place = g.expression.removesuffix(".detach()")
            yield place, g.axes, None if g.width else g.dim, moved
        first = loop.labelled.body.states + len(rolled.appended)
        for i, (path, node) in enumerate(rolled.written.items()):
            dim = int(node.args[2]) % rolled.template.shapes[path].dim()  # type: ignore[arg-type]
            start, step = rolled.moving[node, 3]
            several = node.target is SCATTERS[1]
            moved = (dim, start, step, step if several else 1)
            yield path, loop.labelled.results[first + i], None if several else dim, moved

    def _counting(self, loop: Loop) -> list[str]:
        """A function that counts the iterations that take as many tokens as they ask for."""
        lines = ["def whole(_bounds, _values):"]
        if self.source.inputs:
            lines.append(f"    {', '.join(self.source.inputs)}, = _values")
        lines.append("    _count = (_bounds[1] - _bounds[0] + _bounds[2] - 1) // _bounds[2]")
        known = set()
        for g in loop.given.values():
            if g.width is None or (g.start, g.step, g.width) in known:
                continue
            known.add((g.start, g.step, g.width))
            size = f"{g.expression}.shape[{g.dim}]"
            lines.append(f"    if ({size} - {g.start + g.width - g.step}) // {g.step} < _count:")
            lines.append(f"        _count = ({size} - {g.start + g.width - g.step}) // {g.step}")
        return [*lines, "    return _count"]

    def _numbers(self, rolled: Rolled) -> dict[str, Any]:
        """The numbers and flags among the variables; a plan holds for their values."""
        found = scalars_of(self.env)
        if not self._same_with(rolled, {}, _other_mode(rolled.template.env)):
            found |= {
                f"{name}.training": x.training
                for name, x in self.env.items()
                if isinstance(x, nn.Module)
            }
        return found

    def _find_free(self, loop: Loop, rolled: Rolled, numbers: dict[str, Any]) -> None:
        """Which sizes of the grid may be any: those with which the iteration comes out the same."""
        body = loop.labelled.body
        for name in list(numbers):
            x = numbers[name]
            length = name.isidentifier() and type(x) is int and x == self.stop and self.count > 2
            # How many tokens there are: does the iteration look at it?
            if length and self._same_with(rolled, {}, {name: x + 13 * self.step}):
                del numbers[name]
        for name in loop.pieces.grid:
            shapes: dict[str, tuple[int, ...]] = {}
            tensors = [
                (g.expression.removesuffix(".detach()"), g.axes, None if g.width else g.dim)
                for g in loop.given.values()
            ]
            first = body.states + len(rolled.appended)
            for i, (path, node) in enumerate(rolled.written.items()):
                dim = int(node.args[2]) if node.target is SCATTERS[0] else None  # type: ignore[arg-type]
                tensors.append((path, loop.labelled.results[first + i], dim))
            for place, axes, dim in tensors:
                if place not in rolled.template.shapes:
                    continue
                old = rolled.template.shapes[place].shape
                shape = list(shapes.get(place, old))
                at = 0
                for names in axes:
                    if at == dim:
                        at += 1
                    if name in names:
                        size = 1
                        for n in names:
                            size *= body.sizes[n] + (n == name)
                        shape[at] = size
                    at += 1
                if tuple(shape) != tuple(old):
                    shapes[place] = tuple(shape)
            for place, carry in rolled.anchors.items():
                if carry in shapes:
                    shapes[place] = shapes[carry]
            size = body.sizes[name]
            equal = {
                k: size + 1
                for k, x in numbers.items()
                if k.isidentifier() and type(x) is int and x == size
            }
            if self._same_with(rolled, shapes, {}):
                loop.free.add(name)
            elif equal and self._same_with(rolled, shapes, equal):
                loop.free.add(name)
                for k in equal:
                    numbers[k] = _Size(name)

    def _same_with(
        self,
        rolled: Rolled,
        shapes: dict[str, tuple[int, ...]],
        changed: Env,
    ) -> bool:
        """Whether the iteration is the same program with other sizes and other variables."""
        template = rolled.template
        env = {**template.env, **{k: v for k, v in changed.items() if k in template.env}}
        shapes = {p: shapes.get(p, tuple(x.shape)) for p, x in template.shapes.items()}
        facts, self.facts = self.facts, Facts(self.count)
        try:
            other = self.iteration(self.base, env, shapes)
            if other.facts.moduli != template.facts.moduli:
                return False
            match = Match()
            for a, b in results_of(template, other):
                match.extend(a, b)
            nodes = match.nodes
            moving = {(nodes[n], i): x for (n, i), x in rolled.moving.items() if n in nodes}
            if any(
                nodes[n].args[i] != x[0] + x[1] * self.base
                for (n, i), x in rolled.moving.items()
                if n in nodes
            ):
                return False
            again = dataclasses.replace(
                rolled,
                template=other,
                moving=moving,
                written={p: other.outputs[p] for p in rolled.written},
            )
            text = self._text_of(again)
        except (NotLowerable, KeyError):
            return False
        finally:
            self.facts = facts
        return text == self.text

    def _text_of(self, rolled: Rolled) -> str:
        made = self._assembled(rolled)
        return _text(labelled(made.gm, made.roles).body)

    def _assembled(self, rolled: Rolled) -> Assembled:
        outputs = list(rolled.appended.values())
        outputs += [n.args[1] for n in rolled.written.values()]  # type: ignore[misc]
        outputs += [rolled.template.outputs[p] for p in rolled.last]
        free = {p for p, x in self.entry.items() if not x.requires_grad}
        return assemble(rolled, outputs, self.gradients, free)

    # -- writing --------------------------------------------------------------------------------------------

    def _write(
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
        template, source = rolled.template, self.source
        stored = _stored(source)
        # All values first: writing one may change what another is read from.
        fresh = {}
        wanted = self._wanted(template) | {p for p in values if _root(p) in source.results}
        for i, (place, text) in enumerate(values.items()):
            if place not in wanted:
                continue
            fresh[place] = f"_v_{i}"
            writer.line(f"_v_{i} = {text}")
        for place, variable in fresh.items():
            root = _root(place)
            if place in template.in_place and place in self.entry:
                writer.line(f"{place}.copy_({variable})")
                fresh[place] = place
            elif root in self.env and root not in stored and place != root:
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
                f"_start + (_count - 1) * _step + {value.at(0) - self.start}"
                if value.scale == self.step and not value.moves
                else self._lost(path)
            )
        if isinstance(value, (int, float, bool, str, type(None))):
            if path in scalars_of(self.env) or path in template.scalars:
                return repr(value)
            return self._lost(path)
        if path in self.env and path not in _stored(self.source):
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
        if path in self.env:
            return path
        raise self._lost(path)

    def _lost(self, path: str) -> Any:
        raise NotLowerable(f"{path} is used after the loop, and is no tensor of its last iteration")

    def _guard(
        self,
        loop: Loop,
        rolled: Rolled,
        made: Assembled,
        numbers: dict[str, Any],
        appended: list[str],
    ) -> Callable[..., Any]:
        """Whether a plan holds for other variables: same ranks, dtypes, features and numbers."""
        conditions = [
            f"_bounds[0] == {self.start}",
            f"_bounds[2] == {self.step}",
            "_bounds[1] - _bounds[0] >= _bounds[2]",
        ]
        scope: dict[str, Any] = {"_torch": torch}
        conditions += likeness(self.env, set(appended), self.source.made, scope)
        if self.facts.known is not None:
            conditions.append(f"_bounds[1] <= {self.start + self.facts.known * self.step}")
        if made.stops:
            conditions.append(f"_torch.is_grad_enabled() is {self.gradients}")
        names: dict[str, str] = {}
        body = loop.labelled.body
        for g in loop.given.values():
            place = g.expression.removesuffix(".detach()")
            if place not in self.entry:
                continue
            x = self.entry[place]
            conditions += [f"{place}.dim() == {x.dim()}", f"{place}.dtype == _{x.dtype}"]
            if made.stops and not x.requires_grad and place in rolled.carries and self.gradients:
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
            if isinstance(x, _Size):
                conditions.append(f"{path} == {names[x.name]}")
            elif isinstance(x, (bool, str, type(None))):
                conditions.append(
                    f"{path} is {x!r}" if not isinstance(x, str) else f"{path} == {x!r}"
                )
            elif isinstance(x, torch.dtype):
                conditions.append(f"{path} is _{x}")
            elif isinstance(x, (int, float)) and x - x == 0:
                conditions.append(f"{path} == {x!r}")
        conditions += [f"len({p}) == 0" for p in appended if p in self.source.joined]
        unpack = f"({', '.join(self.source.inputs)}{',' if len(self.source.inputs) == 1 else ''})"
        lines = [
            "def fits(_bounds, _values):",
            f"    {unpack} = _values" if self.source.inputs else "    pass",
            "    try:",
            *(
                f"        if not ({c}):\n            return False"
                for c in dict.fromkeys(conditions)
            ),
            "    except (AttributeError, IndexError, KeyError, TypeError):",
            "        return False",
            "    return True",
        ]
        return compiled_source("fits", "\n".join(lines) + "\n", scope)


def whole_iterations(source: LoopSource, bounds: Any, values: Any) -> int:
    """How many iterations certainly take as many tokens as they ask for."""
    count = (bounds[1] - bounds[0]) // bounds[2]
    for name, x in zip(source.inputs, values, strict=True):
        if isinstance(x, Pieces) and name.startswith("__tttc_source"):
            pieces = x.whole.shape[x.dim] // x.size
            if pieces < count:
                count = pieces
    return count


def _other_mode(env: Env) -> Env:
    """The modules among the variables, in training where they are evaluated and the other way round."""
    found: Env = {}
    for name, value in env.items():
        if isinstance(value, nn.Module):
            found[name] = Copier(lambda path, x: x).copy(value, name)
            for module in found[name].modules():
                module.training = not module.training
    return found


def _apart(env: Env) -> Env:
    return {name: apart(value) for name, value in env.items()}


@dataclass(frozen=True)
class _Size:
    """A number that is the size of a dimension."""

    name: str


def _scan_names() -> dict[str, Any]:
    from tttc.scan import ScanState

    return {"_ScanState": ScanState}


def _root(path: str) -> str:
    match = re.match(r"(?:getattr\()*([A-Za-z_]\w*)", path)
    assert match is not None
    return match[1]


def _stored(source: LoopSource) -> set[str]:
    return {
        n.id
        for n in ast.walk(source.statement)
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }


def _reads_tokens(first: Iteration, second: Iteration) -> bool:
    """Whether iterations pick from the same tensors at different places."""

    def picks(iteration: Iteration) -> set[Any]:
        places = {n: p for p, n in iteration.inputs.items()}
        return {
            (places.get(n.args[0]), n.target, *n.args[1:])
            for n in iteration.graph.nodes
            if n.target in (torch.ops.aten.select.int, torch.ops.aten.slice.Tensor)
        }

    return bool(picks(first) - picks(second))


def _counterpart(first: Iteration, second: Iteration) -> dict[Any, Any]:
    """The nodes of ``second`` that are those of ``first``."""
    match = Match()
    for a, b in results_of(first, second):
        match.extend(a, b)
    return match.nodes


def _text(body: Body) -> str:
    """What a body computes, sizes apart."""
    lines = [f"{p.target} {p.meta['dims']}" for p in body.placeholders]
    lines += [
        f"{n.name} = {getattr(n.target, '__name__', n.target)} {spec_of(n)} {operands_of(n)} {n.args[:1]}"
        for n in body.nodes
    ]  # type: ignore[union-attr]
    return "\n".join([*lines, str(body.results)])


def _mini_batch_size(body: Body) -> int:
    """For a loop without an anchor: 1 where updates look at the state, any where they do not."""
    from tttc.passes.batch import batch

    try:
        batch(body)
    except NotLowerable:
        return 1
    return FREE_MINI_BATCH
