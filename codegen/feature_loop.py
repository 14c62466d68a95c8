"""Rendering a :class:`~tttc.codegen.loop.Loop` so that each warp holds some features of every value.

Rows of tiles are features, columns are tokens, and the rows are spread over few warps. What a product of the matrix unit
leaves in registers then is what the next one takes as its left operand, and the state, rows of its output features,
never leaves the registers of its warps::

    z[j t] = W[j i] x[i t];  W[j i] -= g[j t] x[t i]

Tokens come through shared memory several mini-batches ahead and are read either way round. Warps wait for each other
only where features are added up, as in a norm: each adds up its own by shuffles and the parts are read by all.
Written in Gluon, for its layouts.

Source: the accumulators of ``mma.m16n8k16`` are laid out as its operands are (PTX ISA).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx
from tttc.codegen.feature_memory import Late
from tttc.codegen.feature_products import FeatureProducts
from tttc.codegen.gluon_source import for_warps
from tttc.codegen.loop import Loop, forgotten
from tttc.codegen.not_finite import any_not_finite
from tttc.codegen.schedule import Schedule
from tttc.codegen.triton_tiles import Tile

from tttc.ir.errors import NotLowerable


class FeatureRenderer(FeatureProducts):
    """Renders one loop for warps that each hold some features."""

    lines: list[str]
    indent: int
    tiles: dict[fx.Node, Tile]
    late: list[Late]
    numbers: dict[str, fx.Node]
    careful: Sequence[str] = ()  # the function that is called where states are not finite

    def lay_out(self) -> None:
        """Write what the kernel does, but for care for what is not finite: its registers and shared memory are known then."""
        self._declare_arguments()
        self._prologue()
        self._allocate()
        self._invariants()
        self._turns()
        self._epilogue()

    def render(self) -> str:
        """The source of the kernel."""
        self.lay_out()
        if self.schedule.nan == "again":
            self._again()
        self.body, self.lines, self.indent = self.lines, [], 0
        self._header()
        return "\n".join([*self.lines, *self.body]) + "\n"

    def _again(self) -> None:
        """Where the states at the end are not finite, all of it once more with care for what is not.

        By a function that is not inlined: registers for care would make the loop without it slow.
        """
        states = any_not_finite((f"{n}_v", len(dims)) for n, dims in self._state_dims().items())
        names = [x for name in self.arguments for x in (name, *self._strides_of(name))]
        self.write(f"if {states}:")
        self.write(f"    carefully({', '.join(names)}, T, H, {', '.join(self.constants)})")
        careful = FeatureRenderer(self.loop, replace(self.schedule, nan="product"))
        careful.render()
        start = next(
            i for i, line in enumerate(careful.lines) if line.startswith(f"def {self.loop.name}(")
        )
        self.careful = [
            "", "", "@gluon.jit(noinline=True)", "def carefully(", *careful.lines[start + 1 :], *careful.body
        ]  # fmt: skip
        self.layouts.definitions |= careful.layouts.definitions

    def _header(self) -> None:
        super()._header()
        self.lines, self.body = for_warps(self.lines, self.body, self.layouts.lines(), self.careful)

    def _prologue(self) -> None:
        self.write("head = (gl.program_id(0) % H).to(gl.int64)")
        self.write("sequence = (gl.program_id(0) // H).to(gl.int64)")
        self.write(f"N = gl.cdiv(T, {self.loop.mini_batch_size})")
        self._pointers()

    def _turns(self) -> None:
        """All mini-batches, from the states to start from."""
        self.tiles = {n: t for n, t in self.tiles.items() if n in self.invariant}
        self._under_way()
        before = len(self.lines)
        self.write("for step in range(0, N):")
        self.indent += 1
        self.indent_of_turn = self.indent
        self.late = []
        self.numbers = {}
        self._forget()
        start = len(self.lines)
        self._mini_batch()
        waiting = self._store_those_late(after=False)
        arrived = (
            next(i for i in range(start, len(self.lines)) if "wait_group" in self.lines[i]) + 1
        )
        self.lines[arrived:arrived] = waiting
        self.indent -= 1
        self.indent_of_turn = -1
        self.write("async_copy.wait_group(0)  # what comes next may use the same rooms")
        self.lines += self._store_those_late(after=True)
        self.lines[before:before] = [
            *("    " * self.indent + line for line in dict.fromkeys(self.rooms)),
            *self._late_from(),
        ]
        self.rooms.clear()
        self._forget()

    def _mini_batch(self) -> None:
        self.write("n = N - 1 - step" if self.loop.reverse else "n = step")
        self.write(f"first = n * {self.loop.mini_batch_size}")
        self.write(f"count = gl.minimum(T - first, {self.loop.mini_batch_size})")
        self._arrived()
        self._save_states()
        fetched = self._fetched()
        for these in self._together(self._sequence()):
            nodes = these if isinstance(these, tuple) else (these,)
            if isinstance(these, tuple):
                self.emit_together(these)
            elif these not in fetched and not self._deferred(these):
                self.emit(these)
            for node in nodes:
                if node in self.tiles:
                    self._keep(node)
        for node in self.results:
            if node in self.loop.sources or node in self.invariant:
                self._keep(node)
        self._start_next()
        self._renew()


def feature_renderer(loop: Loop, schedule: Schedule) -> FeatureRenderer:
    """A renderer for warps that each hold some features.

    Raises:
        NotLowerable: where the loop has no such form.
    """
    renderer = FeatureRenderer(loop, schedule)
    if schedule.nan == "again" and (name := forgotten(loop)):
        raise NotLowerable(f"what is not finite may not show in {name} at the end")
    return renderer
