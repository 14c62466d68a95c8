"""Vector states kept as a row for every token, renewed by products."""

from __future__ import annotations

from torch import fx
from tttc.codegen.loop import Loop
from tttc.codegen.schedule import Schedule
from tttc.codegen.triton_products import Products
from tttc.codegen.triton_tiles import Tile

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, operands_of, spec_of
from tttc.ir.build import dims_of
from tttc.ir.spec import Dims, parse


class Vectors(Products):
    """Which vector states are repeated, and how."""

    def __init__(self, loop: Loop, schedule: Schedule) -> None:
        super().__init__(loop, schedule)
        self.repeated, self.repeats = self._repeated()

    def _repeated(self) -> tuple[dict[str, Dims], dict[fx.Node, fx.Node]]:
        """Vector states that are kept repeated for every token, and the sums that renew them.

        Such a tile has the axes of what it is added to, so that products accumulate onto it, and its own
        sum over tokens becomes a product too: no reduction, no change of layout.
        """
        names: dict[str, Dims] = {}
        sums: dict[fx.Node, fx.Node] = {}
        if not self.schedule.repeat_vectors or not self.loop.tokens or self.loop.parallel:
            return names, sums
        if TOKEN not in self.dims or EARLIER not in self.dims:
            return names, sums
        new = {sink.name: node for node, sink in self.loop.sinks if sink.kind == "state"}
        for node, source in self.loop.sources.items():
            if source.kind != "state" or len(dims_of(node)) != 1 or source.name not in new:
                continue
            (d,) = dims_of(node)
            update = new[source.name]
            others = [u for u in node.users if u in self.used and u is not update]
            added = [
                u.target is ops.elementwise and u.args[0] in ("add", "sub") and set(dims_of(u)) == {TOKEN, d}
                for u in others
            ]  # fmt: skip
            total = self._token_sum(update, node)
            if all(added) and total is not None and self.side(d) >= 16:
                names[source.name] = self.order((TOKEN, d))
                sums[update] = total
        return names, sums

    def _token_sum(self, update: fx.Node, state: fx.Node) -> fx.Node | None:
        """The sum over tokens in ``state + sum`` or ``state - sum``, where nobody else reads it."""
        if update.target is not ops.elementwise or update.args[0] not in ("add", "sub"):
            return None
        x, y = operands_of(update)
        if x is not state or not isinstance(y, fx.Node) or y.target is not ops.contraction:
            return None
        if [u for u in y.users if u in self.used] != [update]:
            return None
        spec = parse(spec_of(y))
        if spec.summed != (EARLIER,) or not 1 <= len(spec.operands) <= 2:
            return None
        (d,) = spec.result
        shapes = sorted(spec.operands, key=len)
        right = {EARLIER, d} == set(shapes[-1]) and (len(shapes) == 1 or shapes[0] == (EARLIER,))
        return y if right else None

    def _renewed(self, update: fx.Node) -> Tile:
        """A repeated vector state with its sum over tokens: a product of per-token numbers and rows."""
        total = self.repeats[update]
        state = self.tile(operands_of(update)[0])
        parts = sorted(operands_of(total), key=lambda x: len(dims_of(x)))
        rows = self.tile(parts[-1])
        pair = self.order((TOKEN, EARLIER))
        shape = ", ".join(str(self.side(d)) for d in pair)
        value = self.line_up(self.tile(parts[0]), pair) if len(parts) == 2 else "1.0"
        inside = self.mask((EARLIER,), pair)
        sign = "-" if update.args[0] == "sub" else ""
        zeros = f"tl.zeros(({shape},), tl.float32)"
        weights = self.let("m", f"tl.where({inside}, {sign}{value} + {zeros}, 0.0)", pair)
        (d,) = [x for x in rows.dims if x != EARLIER]
        if state.dims[0] == TOKEN:
            text = self._product(weights, rows, (TOKEN, d, EARLIER), state)
        else:
            text = self._product(rows, weights, (d, TOKEN, EARLIER), state)
        return self.let("c", text, state.dims, note=str(spec_of(total)))

    def _state_tile(self, name: str, dims: Dims) -> Tile:
        """A carried state as it is stored."""
        if name not in self.repeated:
            return Tile(name + "_v", self.order(dims))
        target = self.repeated[name]
        first = f"{TOKEN}{self.index((TOKEN,), target)} == 0"
        value = f"tl.sum(tl.where({first}, {name}_v, 0.0), {target.index(TOKEN)})"
        return self.let("x", value, dims)
