"""The file around a row-wise kernel: its grid, its signature and the function that launches it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import sympy
import torch
from torch import fx
from tttc.codegen.rowwise_index import Names, memory_order
from tttc.codegen.rowwise_ops import HELPERS

from tttc.ir.index_maps import numel, shape_of
from tttc.ir.row_space import RowSpace

_TILE = 1024  # elements a program holds of each value, where a row is not longer
_PER_WARP = 256
_MAX_ROWS = 2**31 - _TILE  # row numbers are 32 bits wide


@dataclass
class Grid:
    """What one program takes: whole rows where there are row sums, else a block of rows and columns."""

    space: RowSpace
    rows: int = field(init=False)
    columns: int = field(init=False)
    blocked: bool = field(init=False)  # whether a row has several blocks of columns
    masked: bool = field(init=False)  # whether a block may reach beyond the last column

    def __post_init__(self) -> None:
        columns = self.space.column.size
        one_row = self.row_count == 1
        if self.space.whole_rows or (columns.is_Integer and columns <= _TILE):
            self.columns = 1 << max(int(columns) - 1, 0).bit_length()
        elif columns.is_Integer:
            # The block that leaves least of itself empty.
            self.columns = min((_TILE, 512, 256), key=lambda b: -(-int(columns) // b) * b)
        else:
            self.columns = _TILE if one_row else 256
        self.rows = 1 if one_row else max(1, _TILE // self.columns)
        self.blocked = not (columns.is_Integer and columns <= self.columns)
        self.masked = not (columns.is_Integer and columns % self.columns == 0)

    @property
    def row_count(self) -> sympy.Expr:
        """The number of rows, an expression."""
        return numel(tuple(v.size for v in self.space.rows))

    @property
    def config(self) -> dict[str, int]:
        """Launch options."""
        warps = min(16, max(1, self.rows * self.columns // _PER_WARP))
        return {"ROWS": self.rows, "COLS": self.columns, "num_warps": warps}


@dataclass
class Body:
    """The statements of a kernel and what they refer to."""

    lines: list[str]
    read: list[str]  # pointers
    packed: set[str]  # those whose strides follow from their shapes
    strides: dict[str, str]  # stride arguments, and how the launcher finds them


def kernel_file(name: str, names: Names, grid: Grid, body: Body, outputs: list[fx.Node]) -> str:
    """Python source that defines ``name``, a Triton kernel, and ``launch``."""
    # What these use of sizes and indices has to be known before the signature is written.
    setup = _setup(names, grid)
    rows, columns = names.size(grid.row_count), names.size(grid.space.column.size)
    allocations = [_allocation(i, n, names) for i, n in enumerate(outputs)]
    results = [f"y{i}" for i in range(len(outputs))]
    pointers = [*body.read, *results]
    parameters = ", ".join([*pointers, "rows", *names.sizes, *body.strides])
    passed = ", ".join([*pointers, "rows", *names.sizes, *body.strides.values()])
    options = ", ".join(f"{k}={v}" for k, v in grid.config.items())
    programs = f"-(-rows // {grid.rows})" if grid.rows > 1 else "rows"
    if grid.blocked:
        programs = f"{programs} * -(-({columns}) // {grid.columns})"
    launch = []
    for tensor in body.read:
        if tensor in body.packed:
            launch += [f"if not {tensor}.is_contiguous():", f"    {tensor} = {tensor}.contiguous()"]
    found = {**names.for_launch, **names.sizes}
    # Products come after what they are products of.
    for size in sorted(found, key=lambda n: (n.startswith("p"), n)):
        launch += [f"{size} = {found[size]}"]
    launch += [f"rows = {rows}", f"programs = {programs}"]
    launch += [f"if programs == 0 or programs >= 2**31 or rows > {_MAX_ROWS}:", "    return None"]
    launch += [*allocations, f"start[(programs,)]({passed}, {options})"]
    launch += [f"return {', '.join(results)}"]
    text = "\n".join(body.lines)
    helpers = [code for h, code in HELPERS.items() if re.search(rf"(?<![.\w]){h}\b", text)]
    return "\n".join(
        [
            f'"""{name}: {rows} rows of {columns}."""',
            "",
            "import torch",
            "import triton",
            "import triton.language as tl",
            "",
            *helpers,
            "",
            "@triton.jit",
            f"def {name}({parameters}, ROWS: tl.constexpr, COLS: tl.constexpr):",
            *(f"    {line}" for line in [*setup, *body.lines]),
            "",
            "",
            f"def launch({', '.join(names.arguments.values())}, start={name}):",
            '    """Run the kernel; None for sizes it is not made for."""',
            *(f"    {line}" for line in launch),
            "",
        ]
    )


def _atom(text: str) -> str:
    return text if re.fullmatch(r"\w+", text) else f"({text})"


def _setup(names: Names, grid: Grid) -> list[str]:
    """Where a program stands."""
    columns = names.text(grid.space.column.size)
    lines = ["program = tl.program_id(0)"]
    if grid.blocked:
        lines += [f"blocks = tl.cdiv({columns}, COLS)"]
        lines += ["block = program % blocks", "program = program // blocks"]
    lines += ["row_number = program * ROWS + tl.arange(0, ROWS)[:, None]"]
    lines += ["row = row_number.to(tl.int64)", "row_ok = row < rows"]
    start = "block * COLS + " if grid.blocked else ""
    lines += [f"col = {start}tl.arange(0, COLS)[None, :]"]
    if grid.masked:
        lines += [f"col_ok = col < {columns}"]
    variables = grid.space.rows
    for i, variable in enumerate(variables):
        if variable in names.row_indices:
            # Divided in 32 bits, which is several times cheaper than in 64.
            place = "row_number"
            below = numel(tuple(v.size for v in variables[i + 1 :]))
            if below != 1:
                place = f"{place} // {_atom(names.text(below))}"
            if numel(tuple(v.size for v in variables[:i])) != 1:
                place = f"{place} % {_atom(names.text(variable.size))}"
            lines += [f"{variable.name} = ({place}).to(tl.int64)"]
    return lines


def _allocation(i: int, node: fx.Node, names: Names) -> str:
    """An output with the strides that the graph expects of it: a view further on may rely on them."""
    value: torch.Tensor = node.meta["val"]
    shape = shape_of(value)
    order = memory_order(value) or tuple(range(len(shape)))
    sizes = "".join(f"{names.size(shape[d])}, " for d in order).rstrip(" ")
    device = next(a for a in names.arguments.values() if a.startswith("x"))
    made = f"y{i} = torch.empty(({sizes}), dtype={value.dtype}, device={device}.device)"
    back = tuple(order.index(d) for d in range(len(order)))
    return made if back == tuple(range(len(back))) else f"{made}.permute({back})"
