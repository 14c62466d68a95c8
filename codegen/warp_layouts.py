"""Layouts of kernels whose warps each hold a piece of the widest dimension."""

from __future__ import annotations

from tttc.codegen.named_layouts import LANES, NamedLayouts


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
        each = min(columns, max(2, rows * columns // (LANES * self.warps)))
        across = min(LANES, columns // each)
        return self._named(
            f"ROWS_{rows}x{columns}",
            f"gl.BlockedLayout([1, {each}], [{LANES // across}, {across}], [{self.warps}, 1], [1, 0])",
        )

    def parts(self, rows: int, columns: int) -> str:
        """The parts of such a matrix that warps have made, all those of an element in one thread."""
        self.rows(rows, columns)
        one = self.definitions[f"ROWS_{rows}x{columns}"]
        each, lanes, _ = (x.split("]")[0] for x in one.split("[")[1:4])
        return self._named(
            f"PARTS_{rows}x{columns}",
            f"gl.BlockedLayout([{self.warps}, {each}], [1, {lanes}], [1, {self.warps}, 1], [2, 1, 0])",
        )

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
