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
from tttc.ir.row_steps import RowSpace

_TILE = 1024  # elements a program holds of each value, where a row is not longer
_PER_WARP = 256
_PROGRAMS = 1056  # that add up rows: as many of them as a large GPU runs at a time
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
    totals: dict[
        str, tuple[str, str]
    ]  # of outputs that all rows add up to, what a row adds, and its type


def kernel_file(name: str, names: Names, grid: Grid, body: Body, outputs: list[fx.Node]) -> str:
    """Python source that defines ``name``, a Triton kernel, and ``launch``."""
    # What these use of sizes and indices has to be known before the signature is written.
    around, setup = _setup(names, grid, bool(body.totals))
    rows, columns = names.size(grid.row_count), names.size(grid.space.column.size)
    allocations = [_allocation(i, n, names) for i, n in enumerate(outputs)]
    results = [f"y{i}" for i in range(len(outputs))]
    partial = {y: f"t{y[1:]}" for y in body.totals}
    pointers = [*body.read, *(partial.get(y, y) for y in results)]
    counts = ["rows", "count"] if body.totals else ["rows"]
    parameters = ", ".join([*pointers, *counts, *names.sizes, *body.strides])
    passed = ", ".join([*pointers, *counts, *names.sizes, *body.strides.values()])
    options = ", ".join(f"{k}={v}" for k, v in grid.config.items())
    programs = f"-(-rows // {grid.rows})" if grid.rows > 1 else "rows"
    most = _MAX_ROWS
    launch = []
    for tensor in body.read:
        if tensor in body.packed:
            launch += [f"if not {tensor}.is_contiguous():", f"    {tensor} = {tensor}.contiguous()"]
    found = {**names.for_launch, **names.sizes}
    # Products come after what they are products of.
    for size in sorted(found, key=lambda n: (n.startswith("p"), n)):
        launch += [f"{size} = {found[size]}"]
    launch += [f"rows = {rows}"]
    if body.totals:
        launch += [f"count = min({programs}, {_PROGRAMS})"]
        programs, most = "count", _MAX_ROWS // 2
    if grid.blocked:
        programs = f"{programs} * -(-({columns}) // {grid.columns})"
    launch += [f"programs = {programs}"]
    launch += [f"if programs == 0 or programs >= 2**31 or rows > {most}:", "    return None"]
    launch += allocations
    device = next(a for a in names.arguments.values() if a.startswith("x"))
    for y, t in partial.items():
        dtype = body.totals[y][1].replace("tl.", "torch.")
        launch += [f"{t} = torch.empty((count, {columns}), dtype={dtype}, device={device}.device)"]
    launch += [f"start[(programs,)]({passed}, {options})"]
    starts, second = [f"start={name}"], []
    if body.totals:
        second = _add_up(partial)
        pairs = ", ".join(f"{t}, {y}" for y, t in partial.items())
        starts += ["finish=add_up"]
        grid_of = f"(-(-({columns}) // 16), {len(partial)})"
        launch += [f"finish[{grid_of}]({pairs}, count, {columns}, ROWS=128, COLS=16, num_warps=4)"]
    launch += [f"return {', '.join(results)}"]
    text = "\n".join([*body.lines, *(value for value, _ in body.totals.values())])
    helpers = [code for h, code in HELPERS.items() if re.search(rf"(?<![.\w]){h}\b", text)]
    lines = [*around, *setup, *body.lines]
    if body.totals:
        lines = [*around, *_looped([*setup, *body.lines], body, grid, columns, partial)]
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
            *(f"    {line}" for line in lines),
            "",
            "",
            *second,
            f"def launch({', '.join([*names.arguments.values(), *starts])}):",
            '    """Run the kernel; None for sizes it is not made for."""',
            *(f"    {line}" for line in launch),
            "",
        ]
    )


def _looped(
    lines: list[str], body: Body, grid: Grid, columns: str, partial: dict[str, str]
) -> list[str]:
    """The lines for some rows after others, and what these add up to."""
    out = [f"sum_{y} = tl.zeros((ROWS, COLS), {dtype})" for y, (_, dtype) in body.totals.items()]
    out += ["for at in range(program * ROWS, rows, count * ROWS):"]
    for y, (value, _) in body.totals.items():
        lines = [
            *lines,
            f"sum_{y} += {f'tl.where(row_ok, {value}, 0)' if grid.rows > 1 else value}",
        ]
    out += [f"    {line}" for line in lines]
    mask = ", mask=col_ok" if grid.masked else ""
    for y, t in partial.items():
        total = f"tl.sum(sum_{y}, 0, keep_dims=True)" if grid.rows > 1 else f"sum_{y}"
        out += [f"tl.store({t} + program.to(tl.int64) * {columns} + col, {total}{mask})"]
    return out


def _add_up(partial: dict[str, str]) -> list[str]:
    """The kernel that adds up what programs added up."""
    parameters = ", ".join(f"{t}, {y}" for y, t in partial.items())
    lines = [
        "@triton.jit",
        f"def add_up({parameters}, count, columns, ROWS: tl.constexpr, COLS: tl.constexpr):",
        "    col = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]",
    ]
    for i, (y, t) in enumerate(partial.items()):
        lines += [
            f"    if tl.program_id(1) == {i}:",
            f"        total = tl.zeros((ROWS, COLS), {t}.dtype.element_ty)",
            "        for at in range(0, count, ROWS):",
            "            row = at + tl.arange(0, ROWS)[:, None]",
            "            ok = (row < count) & (col < columns)",
            f"            total += tl.load({t} + row * columns + col, mask=ok, other=0)",
            "        result = tl.sum(total, 0, keep_dims=True)",
            f"        tl.store({y} + col, result, mask=col < columns)",
        ]
    return [*lines, "", ""]


def _atom(text: str) -> str:
    return text if re.fullmatch(r"\w+", text) else f"({text})"


def _setup(names: Names, grid: Grid, looped: bool) -> tuple[list[str], list[str]]:
    """Where a program stands, and where among its rows, which may follow each other."""
    columns = names.text(grid.space.column.size)
    lines = ["program = tl.program_id(0)"]
    if grid.blocked:
        lines += [f"blocks = tl.cdiv({columns}, COLS)"]
        lines += ["block = program % blocks", "program = program // blocks"]
    start = "block * COLS + " if grid.blocked else ""
    lines += [f"col = {start}tl.arange(0, COLS)[None, :]"]
    if grid.masked:
        lines += [f"col_ok = col < {columns}"]
    around, lines = lines, []
    lines += [f"row_number = {'at' if looped else 'program * ROWS'} + tl.arange(0, ROWS)[:, None]"]
    lines += ["row = row_number.to(tl.int64)", "row_ok = row < rows"]
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
    return around, lines


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
