"""The iterations of a loop that are looked at, and the loop re-rolled from them."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tttc.capture.facts import Facts
from tttc.capture.index import Index, Length
from tttc.capture.iteration import Env, Iteration, trace
from tttc.capture.layout import Pieces
from tttc.capture.loop_source import LoopSource
from tttc.capture.places import apart, is_shared, root_of, tensors_of
from tttc.capture.reroll import (
    SCATTERS,
    Match,
    Rolled,
    moving_indices,
    quietest,
    reroll,
    results_of,
)
from tttc.ir.errors import NotLowerable

LARGEST_PERIOD = 64  # iterations that are looked at


class NoTokens(NotLowerable):
    """A loop that does not run over tokens: no business of this compiler."""


class Iterations:
    """A loop and the variables it starts from, as far as its iterations are looked at."""

    def __init__(
        self,
        source: LoopSource,
        bounds: tuple[int, int, int],
        values: Sequence[Any],
        mode: FakeTensorMode,
    ) -> None:
        self.source = source
        self.start, self.stop, self.step = (int(x) for x in bounds)
        self.count = whole_iterations(source, bounds, values)
        self.env: Env = dict(zip(source.inputs, values, strict=True))
        self.mode = mode
        self.facts = Facts(self.count)
        code = source.body.__code__  # type: ignore[union-attr]
        self.names = list(code.co_varnames[1 : code.co_argcount])
        self.entry = tensors_of(self.env)
        self.gradients = torch.is_grad_enabled()

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
            iterations[0] = self.iteration(0, _all_apart(self.env), {})
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
        if self.facts.lost:
            where = self.facts.lost[0]
            raise NotLowerable("what it does with the loop variable can't be followed", where)
        base = quietest({m: x for m, x in iterations.items() if m}, self.facts.limits)
        moving = {
            (_counterpart(iterations[n], iterations[base])[node], place): x
            for (node, place), x in moving.items()
        }
        self.base = base
        return reroll(iterations, base, moving, period, self.wanted(iterations[base]), self._same)

    @staticmethod
    def _left(iteration: Iteration) -> Env:
        """The variables that an iteration hands to the next."""
        return iteration.after if iteration.mutates else _all_apart(iteration.after)

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
            root = root_of(path)
            carried = root in self.env or root in self.source.results
            if carried and not isinstance(x, Index) and first.scalars.get(path, x) != x:
                raise NotLowerable(f"{path} counts along with the loop")

    def wanted(self, iteration: Iteration) -> set[str]:
        """Places whose values are seen after the loop."""
        stored = stored_by(self.source)
        wanted = set()
        for path, node in iteration.outputs.items():
            root = root_of(path)
            inside = root in self.env and root not in stored
            if root in self.source.results or inside or path in iteration.in_place:
                if node is iteration.inputs.get(path) and path not in self.source.results:
                    continue
                wanted.add(path)
        return wanted


def whole_iterations(source: LoopSource, bounds: Any, values: Any) -> int:
    """How many iterations certainly take as many tokens as they ask for."""
    count = (bounds[1] - bounds[0]) // bounds[2]
    for name, x in zip(source.inputs, values, strict=True):
        if isinstance(x, Pieces) and name.startswith("__tttc_source"):
            pieces = x.whole.shape[x.dim] // x.size
            if pieces < count:
                count = pieces
    return count


def _all_apart(env: Env) -> Env:
    return {name: apart(value) for name, value in env.items()}


def stored_by(source: LoopSource) -> set[str]:
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
