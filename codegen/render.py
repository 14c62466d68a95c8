"""From a loop and a schedule to a kernel, by the renderer that the schedule names."""

from __future__ import annotations

import logging
from functools import cache, partial

from tttc.codegen.feature_loop import feature_renderer
from tttc.codegen.gluon_loop import gluon_renderer
from tttc.codegen.kernel import Kernel
from tttc.codegen.loop import Loop
from tttc.codegen.pieces import divided
from tttc.codegen.schedule import Schedule
from tttc.codegen.triton_loop import Renderer
from tttc.codegen.warp_loop import warp_renderer

from tttc.ir.build import dims_of
from tttc.ir.spec import Dims

log = logging.getLogger("tttc.schedule")


def render(loop: Loop, schedule: Schedule) -> Kernel:
    """The kernel of a loop under a schedule.

    Raises:
        NotLowerable: where an operator has no form in kernels, or the renderer has none for the loop.
    """
    log.info("%s: %s", loop.name, schedule)
    instead = schedule.instead
    other = None if instead is None else cache(partial(render, loop, instead))
    loop = divided(loop, schedule.widest) if schedule.widest else loop
    make = {
        "features": feature_renderer,
        "gluon": gluon_renderer,
        "warps": warp_renderer,
    }.get(schedule.renderer, Renderer)
    renderer: Renderer = make(loop, schedule)
    source = renderer.render()

    def sizes(dims: Dims) -> tuple[int, ...]:
        return tuple(loop.whole_size(d) for d in dims)

    config = {
        "arguments": [
            (name, 0 if name in renderer.values else len(renderer.strides[name]))
            for name in renderer.arguments
        ],
        "schedule": schedule,
        "place": bool(loop.refresh),
        "parallel": loop.parallel,
        "words": renderer.by_words,
        "whole": "WHOLE" in renderer.constants,
        "values": renderer.values,
        "new": {
            f"new_{n}": sizes(d)
            for n, d in renderer.stored_states().items()
            if n not in loop.pieces
        },
        "sums": {
            s.name: sizes(dims_of(n))
            for n, s in loop.sinks
            if s.kind == "sum" and s.name not in loop.pieces
        },
        "mini_batch_size": loop.mini_batch_size,
    }
    return Kernel(loop.name, source, config, instead=other)
