"""Sums of features over warps: from lane to lane, then through shared memory.

Each warp has some rows of what is added up, spread over its threads: those of eight lanes have the same columns. Lanes
add what others have until every lane has every sum, and all threads read the sums of all warps from shared memory.

With fewer shuffles, of two lanes each passes half of its numbers to the other one and adds what it gets to the other
half; so do the next two with half as many, until every lane has one number. The sums of the warps meet in shared memory,
where a lane reads one column, and every thread gets from lanes the columns that it has in products::

    lanes     0  a b c d     0  ac bd     0  abcd      numbers of four columns in four lanes: three passed on,
              1  a b c d     1  ac bd     1      abcd  where eight are if every lane is to have every sum
              2  a b c d     2    ..      2  ..

Source: the recursive halving of a reduce-scatter (Thakur, Rabenseifner, Gropp 2005, section 4.2), within a warp.
"""

from __future__ import annotations

from collections.abc import Sequence

from tttc.codegen.feature_layouts import OVER, ROWS
from tttc.codegen.feature_memory import FeatureMemory
from tttc.codegen.feature_tiles import Placed
from tttc.codegen.named_layouts import LANES

from tttc.ir.spec import Dims


class FeatureSums(FeatureMemory):
    """Sums along rows of tiles."""

    def _sums_of_features(self, given: Sequence[tuple[str, Dims]]) -> list[Placed]:
        """Sums along rows of values over (rows, columns): vectors along columns, which every warp has all of."""
        under_way = [(these, self._parts(these)) for these in self._at_once(given)]
        made = [x for these, room in under_way for x in self._totals(these, room)]
        self._start_next()
        return made

    def _at_once(self, given: Sequence[tuple[str, Dims]]) -> list[list[tuple[str, Dims]]]:
        """Two sums that are as wide together, where every lane gets one number and there are fewer columns than lanes."""
        groups: list[list[tuple[str, Dims]]] = []
        for value, dims in given:
            width = self.side(dims[1])
            last = (
                groups[-1] if groups and self.schedule.few_shuffles and 2 * width <= LANES else []
            )
            if len(last) == 1 and self.side(last[0][1][1]) == width:
                last.append((value, dims))
            else:
                groups.append([(value, dims)])
        return groups

    def _parts(self, these: Sequence[tuple[str, Dims]]) -> str:
        """Each warp adds up its own and stores that; of two sums, the numbers of a column lie beside each other."""
        columns = len(these) * self.side(these[0][1][1])
        name, rows = self.fresh("parts"), OVER
        values = []
        for value, (summed, column) in these:
            shape = [self.side(summed) // (ROWS * self.warps), self.warps, ROWS // OVER, OVER, self.side(column)]  # fmt: skip
            values.append(f"gl.sum(gl.sum(gl.reshape({value}, {shape}), 2), 0)")
        value = values[0] if len(values) == 1 else f"gl.join({', '.join(values)})"
        self.write(f"{name} = gl.reshape({value}, {[self.warps, rows, columns]})")
        for layout in (
            self.layouts.halving(columns, len(these)) if self.schedule.few_shuffles else ()
        ):
            rows //= 2
            halves = (
                f"gl.reshape(gl.convert_layout({name}, {layout}), {[self.warps, 2, rows, columns]})"
            )
            self.write(f"{name} = gl.sum({halves}, 1)")
        room = f"{name}_s"
        self.rooms.append(self.room(room, "gl.float32", 4, [self.warps, columns], self.layouts.numbers(2)))  # fmt: skip
        self.write(f"{room}.store(gl.sum({name}, 1))")
        return room

    def _totals(self, these: Sequence[tuple[str, Dims]], room: str) -> list[Placed]:
        """The parts of all warps, added up, in every thread that has the column in products."""
        together, width = len(these), self.side(these[0][1][1])
        columns = together * width
        if self.schedule.few_shuffles and columns <= LANES:
            there = self.layouts.everywhere(columns, together)
            value = f"gl.sum({room}.load({self.layouts.parts_apart(columns)}), 0)"
            value = f"gl.gather({value}, gl.arange(0, {columns}, layout={there}), 0)"
        else:
            value = f"gl.sum({room}.load({self.layouts.parts(columns)}), 0)"
        values = [value]
        if together > 1:
            values = [self.fresh("total") for _ in these]
            self.write(f"{', '.join(values)} = gl.split(gl.reshape({value}, {[width, together]}))")
        return [
            self.let("c", f"gl.convert_layout({v}, {self.natural((column,))})", (column,))
            for v, (_, (_, column)) in zip(values, these, strict=True)
        ]
