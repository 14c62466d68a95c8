"""A re-rolled loop tried on small numbers, before it runs in the place of the loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from tttc.capture.check import check_run
from tttc.capture.emit import Loop
from tttc.capture.freedom import Size
from tttc.capture.iterations import Iterations, stored_by
from tttc.capture.places import tensors_of
from tttc.capture.reroll import SCATTERS, Rolled

CHECKED_MINI_BATCHES = 1  # of a re-rolled loop, compared with the loop itself when it is planned
CHECKED_ITERATIONS = 20  # more, or more numbers, cost too much unless validation is asked for
CHECKED_NUMBERS = 1 << 20


def compare(
    met: Iterations,
    run: Callable[..., Any],
    loop: Loop,
    rolled: Rolled,
    numbers: dict[str, Any],
    verify: bool,
) -> None:
    """Compare what was written with the loop itself on small numbers."""
    count = min(met.count, CHECKED_MINI_BATCHES * (rolled.mini_batch_size or 1) + 2)
    if count > CHECKED_ITERATIONS and not verify:
        return
    small = {name: 2 for name in loop.free}
    shapes: dict[str, tuple[int, ...]] = {}
    for place, axes, dim, moved in _layouts(loop, rolled):
        if place not in met.entry or place in shapes:
            continue
        shape = list(met.entry[place].shape)
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
    env = {**met.env, **{k: small[x.name] for k, x in numbers.items() if isinstance(x, Size)}}
    bounds = (met.start, met.start + count * met.step, met.step)
    source = met.source
    numbers_in_all = sum(math.prod(shapes.get(p, x.shape)) for p, x in tensors_of(met.env).items())
    if numbers_in_all > CHECKED_NUMBERS and not verify:
        return
    kept = [x for x in source.inputs if x not in stored_by(source)]
    check_run(
        run,
        source.body,  # type: ignore[arg-type]
        env,
        met.names,
        source.inputs,
        source.results,
        kept,
        shapes,
        bounds,
    )


def _layouts(loop: Loop, rolled: Rolled) -> Iterator[tuple[Any, ...]]:
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
