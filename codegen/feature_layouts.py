"""Layouts of kernels whose warps each hold some features: rows of every tile, with tokens as columns."""

from __future__ import annotations

from tttc.codegen.named_layouts import LANES, NamedLayouts

ROWS = 16  # of a product that a warp makes at a time
OVER = 8  # of them in the lanes that have the same columns


class FeatureLayouts(NamedLayouts):
    """The layouts of one kernel."""

    def product(self) -> str:
        """What products leave in registers; of pairs of tokens, every warp has all."""
        return self._named(
            "PRODUCT",
            f"gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[{self.warps}, 1], instr_shape=[16, 8])",
        )

    def operand(self, which: int) -> str:
        """An operand of products: 0 for the left one, 1 for the right one."""
        self.product()
        return self._named(["LEFT", "RIGHT"][which], f"gl.DotOperandLayout({which}, PRODUCT, 2)")

    def down(self) -> str:
        """A vector along the rows of products."""
        self.product()
        return self._named("DOWN", "gl.SliceLayout(1, PRODUCT)")

    def across(self) -> str:
        """A vector along the columns of products; every warp has all of it."""
        self.product()
        return self._named("ACROSS", "gl.SliceLayout(0, PRODUCT)")

    def halving(self, columns: int, together: int) -> list[str]:
        """Sums along rows on their way to one number a lane: one half of the rows at each step is in another register.

        Of ``together`` sums whose columns alternate. A lane that passes on a row takes columns of another one instead.
        """
        free, (one, other) = self._columns(columns, together)
        lanes = [[0, 0, one], [0, 0, other], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
        made: list[str] = []
        for lane, column in zip((4, 3, 2), free, strict=False):
            row = lanes[lane]
            lanes[lane] = [0, 0, column]
            registers = [row, *([0, 0, c] for c in free[len(made) + 1 :])]
            made.append(
                self._named(
                    f"HALVING_{together}x{columns}_{len(made)}",
                    self._linear(
                        registers, lanes, self._warp_bits(3), [self.warps, 2 * row[1], columns]
                    ),
                )
            )
        return made

    def parts_apart(self, columns: int) -> str:
        """What every warp has of sums along rows, all parts of a column in one lane."""
        numbers = [[0, 1 << k] for k in range(columns.bit_length() - 1)]
        lanes = [*numbers, *([[0, 0]] * 5)][:5]
        return self._parts_in(f"PARTS_APART_{columns}", numbers[5:], lanes, columns)

    def parts(self, columns: int) -> str:
        """What every warp has of sums along rows, all parts of a column in every thread that has the column."""
        numbers = [[0, 1], *([0, 1 << k] for k in range(3, columns.bit_length() - 1))]
        lanes = [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]]
        return self._parts_in(f"PARTS_{columns}", numbers, lanes, columns)

    def _parts_in(self, name: str, numbers: list[list[int]], lanes: list[list[int]], columns: int) -> str:  # fmt: skip
        parts = self._warp_bits(2)
        layout = self._linear(parts + numbers, lanes, [[0, 0]] * len(parts), [self.warps, columns])
        return self._named(name, layout)

    def everywhere(self, columns: int, together: int) -> str:
        """Sums along rows in every thread that has their columns; of ``together`` sums whose columns alternate."""
        free, (one, other) = self._columns(columns, together)
        registers = [[c] for c in free]
        lanes = [[one], [other], [0], [0], [0]]
        warps = [[0]] * (self.warps.bit_length() - 1)
        return self._named(
            f"EVERYWHERE_{together}x{columns}", self._linear(registers, lanes, warps, [columns])
        )

    def _columns(self, columns: int, together: int) -> tuple[list[int], list[int]]:
        """Powers of two of columns that registers of a product tell apart, and the two that lanes do."""
        powers = [1 << k for k in range(columns.bit_length() - 1)]
        lanes = [2 * together, 4 * together]
        return [c for c in powers if c not in lanes], lanes

    def _warp_bits(self, axes: int) -> list[list[int]]:
        """The first axis over warps."""
        return [[1 << k, *([0] * (axes - 1))] for k in range(self.warps.bit_length() - 1)]

    def _linear(self, registers: object, lanes: object, warps: object, shape: list[int]) -> str:
        return (
            f"gl.DistributedLinearLayout(reg_bases={registers}, lane_bases={lanes}, warp_bases={warps}, "
            f"block_bases=[], shape={shape})"
        )

    def memory(self, rows: int, columns: int, size: int) -> str:
        """Rows as memory is read and written best: 16 bytes a thread; ``size``: bytes of a number."""
        each = min(16 // size, columns)
        along = min(LANES, columns // each)
        return self._named(
            f"MEMORY_{rows}x{columns}x{size}",
            f"gl.BlockedLayout([1, {each}], [{LANES // along}, {along}], [{self.warps}, 1], [1, 0])",
        )

    def vector(self) -> str:
        """A vector, spread over all threads."""
        return self._named("VECTOR", f"gl.BlockedLayout([1], [32], [{self.warps}], [0])")

    def shared(self, columns: int, size: int) -> str:
        """A matrix in shared memory whose rows are read without conflicts either way.

        Eight rows are read at a time, 16 bytes of each: those that lie over each other in the banks are moved apart.
        """
        each = min(16 // size, columns)
        phase = max(1, 128 // size // columns)  # rows that lie beside each other in the banks
        lines = min(8 // phase, columns // each) if phase < 8 else 1
        return self._named(
            f"SHARED_{columns}x{size}",
            f"gl.SwizzledSharedLayout({each}, {phase}, {lines}, [1, 0])",
        )

    def numbers(self, axes: int = 1) -> str:
        """Vectors in shared memory; of two axes, the first lies close together."""
        order = "[0, 1]" if axes == 2 else "[0]"
        return self._named(f"NUMBERS_{axes}", f"gl.SwizzledSharedLayout(1, 1, 1, {order})")
