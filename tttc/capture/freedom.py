"""Which sizes and numbers a plan leaves free: those with which an iteration comes out the same program."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from tttc.capture.assemble import Assembled, assemble
from tttc.capture.emit import Loop
from tttc.capture.facts import Facts
from tttc.capture.grid import labelled
from tttc.capture.iteration import Env
from tttc.capture.iterations import Iterations
from tttc.capture.places import Copier, scalars_of
from tttc.capture.reroll import SCATTERS, Match, Rolled, results_of
from tttc.ir.body import Body, operands_of, spec_of
from tttc.ir.errors import NotLowerable


@dataclass(frozen=True)
class Size:
    """A number that is the size of a dimension."""

    name: str


class Freedom:
    """What of the variables of a loop matters to its iterations.

    Args:
        met: the loop, and the variables it was met with.
        text: what an iteration computes, of :func:`text_of`.
    """

    def __init__(self, met: Iterations, text: str) -> None:
        self.met, self.text = met, text

    def numbers(self, rolled: Rolled) -> dict[str, Any]:
        """The numbers and flags among the variables; a plan holds for their values."""
        found = scalars_of(self.met.env)
        if not self._same_with(rolled, {}, _other_mode(rolled.template.env)):
            found |= {
                f"{name}.training": x.training
                for name, x in self.met.env.items()
                if isinstance(x, nn.Module)
            }
        return found

    def find(self, loop: Loop, rolled: Rolled, numbers: dict[str, Any]) -> None:
        """Which sizes of the grid may be any: those with which the iteration comes out the same."""
        body = loop.labelled.body
        for name in list(numbers):
            x = numbers[name]
            length = (
                name.isidentifier() and type(x) is int and x == self.met.stop and self.met.count > 2
            )
            # How many tokens there are: does the iteration look at it?
            if length and self._same_with(rolled, {}, {name: x + 13 * self.met.step}):
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
                    numbers[k] = Size(name)

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
        facts, self.met.facts = self.met.facts, Facts(self.met.count)
        try:
            other = self.met.iteration(self.met.base, env, shapes)
            if other.facts.moduli != template.facts.moduli:
                return False
            match = Match()
            for a, b in results_of(template, other):
                match.extend(a, b)
            nodes = match.nodes
            moving = {(nodes[n], i): x for (n, i), x in rolled.moving.items() if n in nodes}
            if any(
                nodes[n].args[i] != x[0] + x[1] * self.met.base
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
            text = self._text_with(again)
        except (NotLowerable, KeyError):
            return False
        finally:
            self.met.facts = facts
        return text == self.text

    def _text_with(self, rolled: Rolled) -> str:
        made = assembled(self.met, rolled)
        return text_of(labelled(made.gm, made.roles).body)


def assembled(met: Iterations, rolled: Rolled) -> Assembled:
    """A re-rolled iteration as a graph of its own."""
    outputs = list(rolled.appended.values())
    outputs += [n.args[1] for n in rolled.written.values()]  # type: ignore[misc]
    outputs += [rolled.template.outputs[p] for p in rolled.last]
    free = {p for p, x in met.entry.items() if not x.requires_grad}
    return assemble(rolled, outputs, met.gradients, free)


def _other_mode(env: Env) -> Env:
    """The modules among the variables, in training where they are evaluated and the other way round."""
    found: Env = {}
    for name, value in env.items():
        if isinstance(value, nn.Module):
            found[name] = Copier(lambda path, x: x).copy(value, name)
            for module in found[name].modules():
                module.training = not module.training
    return found


def text_of(body: Body) -> str:
    """What a body computes, sizes apart."""
    lines = [f"{p.target} {p.meta['dims']}" for p in body.placeholders]
    lines += [
        f"{n.name} = {getattr(n.target, '__name__', n.target)} {spec_of(n)} {operands_of(n)} {n.args[:1]}"
        for n in body.nodes
    ]  # type: ignore[union-attr]
    return "\n".join([*lines, str(body.results)])
