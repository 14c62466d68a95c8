"""From a loop in a running program to what runs in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from tttc.capture.assemble import Argument
from tttc.capture.emit import Given, Loop, Writer, write_step
from tttc.capture.freedom import Freedom, assembled, text_of
from tttc.capture.generated import compiled_source
from tttc.capture.grid import labelled, pieces
from tttc.capture.guard import guard
from tttc.capture.iterations import Iterations, NoTokens
from tttc.capture.loop_source import LoopSource
from tttc.capture.results import Results
from tttc.capture.trial import compare
from tttc.ir.body import Body
from tttc.ir.errors import NotLowerable

FREE_MINI_BATCH = 16  # of a state that no update looks at: any size gives the same


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
        self.met = Iterations(source, bounds, values, mode)
        self.scan = scan
        self.verify = verify

    def plan(self) -> Plan:
        """What runs in the place of the loop.

        Raises:
            NotLowerable: where it can't be re-rolled, with the reason and the line.
        """
        if self.met.source.refusal is not None:
            raise NotLowerable(self.met.source.refusal, self.met.source.where)
        rolled = self.met.rolled()
        appended = list(rolled.appended)
        if not rolled.carries:
            raise NoTokens("no value goes from one token to the next")
        made = assembled(self.met, rolled)
        if not any(x.startswith("token") for x in made.roles):
            raise NoTokens("it reads no tokens")
        for argument in made.arguments.values():
            if argument.place is not None and argument.place not in self.met.entry:
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
            self.met.source.inputs,
            rolled.mini_batch_size or _mini_batch_size(marked.body),
            rolled.offset,
            names=f"{self.met.source.function}:{self.met.source.statement.lineno}",
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
        freedom = Freedom(self.met, text_of(marked.body))
        numbers = freedom.numbers(rolled)
        freedom.find(loop, rolled, numbers)
        step = write_step(loop)
        whole = compiled_source("whole", "\n".join(self._counting(loop)) + "\n", {})
        writer = Writer(loop, step, {"_scan": self.scan, "_whole": whole, **_scan_names()})
        run = Results(self.met).write(loop, writer, rolled, made, appended)
        fits = guard(self.met, loop, rolled, made, numbers, appended)
        compare(self.met, run, loop, rolled, numbers, self.verify)
        rest = any(g.width is not None for g in loop.given.values())
        return Plan(fits, run, step, whole if rest else None)

    def _given(self, role: str, argument: Argument, axes: list[Any]) -> Given:
        place = argument.place
        expression = f"_constant_{role}" if place is None else place
        if argument.stopped:
            expression = f"{expression}.detach()"
        tensor = argument.tensor
        if role.startswith("carry") and place in self.met.entry:
            tensor = self.met.entry[place]
        dim, start, step = argument.dim, argument.start, argument.step or 1
        return Given(expression, axes, tensor, dim, start, step, argument.width)

    def _counting(self, loop: Loop) -> list[str]:
        """A function that counts the iterations that take as many tokens as they ask for."""
        lines = ["def whole(_bounds, _values):"]
        if self.met.source.inputs:
            lines.append(f"    {', '.join(self.met.source.inputs)}, = _values")
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


def _scan_names() -> dict[str, Any]:
    from tttc.scan import ScanState

    return {"_ScanState": ScanState}


def _mini_batch_size(body: Body) -> int:
    """For a loop without an anchor: 1 where updates look at the state, any where they do not."""
    from tttc.passes.batch import batch

    try:
        batch(body)
    except NotLowerable:
        return 1
    return FREE_MINI_BATCH
