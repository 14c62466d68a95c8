"""Layouts of Gluon kernels: which thread holds what of a tile, and how copies lie in shared memory."""

from __future__ import annotations

from tttc.codegen.named_layouts import NamedLayouts

WARPGROUP_ROWS = 64  # of a product that a warpgroup makes at a time


def is_accumulator(rows: int, columns: int, warps: int) -> bool:
    """Whether a tile can be what warpgroups accumulate."""
    return rows >= WARPGROUP_ROWS and columns >= 8 * (warps_of(rows, warps)[1])


def warps_of(rows: int, warps: int) -> tuple[int, int]:
    """Warps along rows and columns of an accumulator: rows first, since every warp has 16 of them."""
    down = min(warps, rows // 16)
    return down, warps // down


class Layouts(NamedLayouts):
    """The layouts of one kernel."""

    def accumulator(self, rows: int, columns: int) -> str:
        """What a warpgroup's product leaves in registers."""
        down, across = warps_of(rows, self.warps)
        width = min(columns // across, 256)
        return self._named(
            f"ACCUMULATOR_{rows}x{columns}",
            "gl.NVMMADistributedLayout("
            f"version=[3, 0], warps_per_cta=[{down}, {across}], instr_shape=[16, {width}, 16])",
        )

    def rows_read(self, rows: int, columns: int) -> str:
        """Rows as memory is read best: 16 bytes of bf16 a thread."""
        each = min(8, columns)
        across = min(32, columns // each)
        return self._named(
            f"ROWS_{rows}x{columns}",
            f"gl.BlockedLayout([1, {each}], [{32 // across}, {across}], [{self.warps}, 1], [1, 0])",
        )

    def vector(self, size: int) -> str:
        """A vector, spread over all threads."""
        return self._named(f"VECTOR_{size}", f"gl.BlockedLayout([1], [32], [{self.warps}], [0])")

    def shared(self, rows: int, columns: int) -> str:
        """A copy in shared memory that warpgroups read either way."""
        return self._named(
            f"SHARED_{columns}",
            f"gl.NVMMASharedLayout({min(128, 2 * columns)}, 16, rank=2)",
        )
