"""Layouts of kernels whose warps each hold some features: rows of every tile, with tokens as columns."""

from __future__ import annotations

from tttc.codegen.named_layouts import LANES, NamedLayouts

ROWS = 16  # of a product that a warp makes at a time


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

    def parts(self, columns: int) -> str:
        """What every warp has of sums along rows, all parts of a column in the threads that have the column."""
        bits = columns.bit_length() - 1
        parts = [[1 << k, 0] for k in range(self.warps.bit_length() - 1)]
        registers = [*parts, [0, 1], *([0, 1 << k] for k in range(3, bits))]
        lanes = [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]]
        warps = [[0, 0]] * (self.warps.bit_length() - 1)
        return self._named(
            f"PARTS_{columns}",
            f"gl.DistributedLinearLayout(reg_bases={registers}, lane_bases={lanes}, warp_bases={warps}, "
            f"block_bases=[], shape=[{self.warps}, {columns}])",
        )

    def rows_of_lanes(self, columns: int) -> str:
        """What every row of lanes has of sums along rows, spread over all threads: the rows of a column in one warp."""
        rows = (8 * self.warps).bit_length() - 1
        row, column = (
            [[1 << k, 0] for k in range(rows)],
            [[0, 1 << k] for k in range(columns.bit_length() - 1)],
        )
        registers, lanes = row[:2], row[2:]
        free = 5 - len(lanes)
        lanes += column[:free]
        across = self.warps.bit_length() - 1
        warps, registers = column[free : free + across], registers + column[free + across :]
        return self._named(
            f"ROWS_OF_LANES_{columns}",
            f"gl.DistributedLinearLayout(reg_bases={registers}, lane_bases={lanes}, warp_bases={warps}, "
            f"block_bases=[], shape=[{8 * self.warps}, {columns}])",
        )

    def columns_apart(self) -> str:
        """A matrix in shared memory whose columns lie together."""
        return self._named("COLUMNS_APART", "gl.SwizzledSharedLayout(4, 1, 8, [0, 1])")

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
