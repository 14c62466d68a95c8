"""Layouts of kernels whose warps each hold a piece of the widest dimension."""

from __future__ import annotations

from tttc.codegen.named_layouts import LANES, NamedLayouts

BANKS = 32  # of shared memory, each four bytes wide
QUAD = 8  # columns of an accumulator's row that four lanes beside each other have


class WarpLayouts(NamedLayouts):
    """The layouts of one kernel."""

    def product(self) -> str:
        """What products leave in registers: a leading axis of warps, then rows and columns."""
        return self._named(
            "PRODUCT",
            f"gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[{self.warps}, 1, 1], instr_shape=[1, 16, 8])",
        )

    def operand(self, which: int) -> str:
        """An operand of products: 0 for the left one, 1 for the right one."""
        self.product()
        return self._named(["LEFT", "RIGHT"][which], f"gl.DotOperandLayout({which}, PRODUCT, 2)")

    def rows(self, rows: int, columns: int) -> str:
        """A matrix of tokens and features, spread over all threads; the lanes of a row are of one warp."""
        each, across = self._spread(rows, columns)
        return self._named(
            f"ROWS_{rows}x{columns}",
            f"gl.BlockedLayout([1, {each}], [{LANES // across}, {across}], [{self.warps}, 1], [1, 0])",
        )

    def _spread(self, rows: int, columns: int) -> tuple[int, int]:
        """Columns of such a matrix that a thread has, and lanes that share a row."""
        each = min(columns, max(2, rows * columns // (LANES * self.warps)))
        return each, min(LANES, columns // each)

    def rows_of_warp(self, rows: int, columns: int) -> int:
        """Rows of such a matrix that a warp has, if each row is of one warp and those of a warp are neighbours; else 0."""
        mine = LANES // self._spread(rows, columns)[1]
        return mine if mine * self.warps == rows else 0

    def part(self, rows: int, columns: int) -> str:
        """What one warp has made of such a matrix, spread over all threads as the sum is."""
        each, across = self._spread(rows, columns)
        return self._named(
            f"PART_{rows}x{columns}",
            f"gl.BlockedLayout([1, 1, {each}], [1, {LANES // across}, {across}], [1, {self.warps}, 1], [2, 1, 0])",
        )

    def parts(self, columns: int) -> str:
        """What warps have made of it, in shared memory: accumulators are stored and rows loaded without conflicts."""
        beside = max(BANKS // columns, 1)  # rows in all banks
        phases = BANKS // QUAD // beside
        return self._named(
            f"PARTS_{columns}",
            f"gl.SwizzledSharedLayout({QUAD}, {beside}, {phases}, [2, 1, 0])",
        )

    def sums(self, rows: int, columns: int) -> str:
        """What warps have made of a sum over the rows of such a matrix, all of a column in one thread."""
        each, across = self._spread(rows, columns)
        return self._named(
            f"SUMS_{rows}x{columns}",
            f"gl.BlockedLayout([{self.warps}, {each}], [{LANES // across}, {across}], [1, {self.warps}], [1, 0])",
        )

    def sums_shared(self) -> str:
        """The same in shared memory."""
        return self._named("ROWS_OF_SUMS", "gl.SwizzledSharedLayout(1, 1, 1, [1, 0])")

    def read(self, rows: int, columns: int) -> str:
        """Rows as memory is read best: 16 bytes of bf16 a thread."""
        each = min(8, columns)
        across = min(LANES, columns // each)
        return self._named(
            f"READ_{rows}x{columns}",
            f"gl.BlockedLayout([1, {each}], [{LANES // across}, {across}], [{self.warps}, 1], [1, 0])",
        )

    def vector(self, size: int) -> str:
        """A vector, spread over all threads."""
        return self._named(f"VECTOR_{size}", f"gl.BlockedLayout([1], [32], [{self.warps}], [0])")

    def shared(self, columns: int, lead: bool) -> str:
        """A copy in shared memory whose rows are read without conflicts either way."""
        width = min(columns, 64)
        order = "[2, 1, 0]" if lead else "[1, 0]"
        return self._named(
            f"SHARED_{'OF_WARPS_' if lead else ''}{columns}",
            f"gl.SwizzledSharedLayout(8, {64 // width}, {width // 8}, {order})",
        )

    def numbers(self) -> str:
        """A vector in shared memory."""
        return self._named("NUMBERS", "gl.SwizzledSharedLayout(1, 1, 1, [0])")
