"""The grid: dimensions of an iteration that are only carried along, batch and heads, are taken out of it.

The iteration is normalised as it stands, every axis under a name; what a name does then says what it is.

Before (one iteration, batch b and heads h explicit)::

    u = contraction("b h i, b h j -> b h i j", k, v)
    W = elementwise("add", "b h i j, b h i j -> b h i j", carry_0, u)

After (one token of one head of one sequence, the step of a scan)::

    u = contraction("i, j -> i j", k, v)
    W = elementwise("add", "i j, i j -> i j", carry_0, u)

Linear layers of tokens alone are *hoisted*, those of outputs alone *sunk*: they run before and after the scan, for
all tokens at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from tttc.ir import ops
from tttc.ir.body import Body, operands_of, role, spec_of
from tttc.ir.build import ancestors, dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.spec import parse
from tttc.passes.labels import Label
from tttc.passes.named_values import Axis, Value
from tttc.passes.normalise import Normaliser
from tttc.passes.simplify import simplify

Names = tuple[str, ...]


class _Split(Exception):
    """An axis of an argument must be taken apart: its label, and the sizes of its parts."""

    def __init__(self, label: Label, sizes: tuple[int, ...]) -> None:
        self.label = label
        self.sizes = sizes


class _Loop(Normaliser):
    """Normalises an iteration; axes of arguments may be taken apart as reshapes ask for."""

    def __init__(
        self, captured: fx.GraphModule, roles: Sequence[str], parts: dict[Any, Any]
    ) -> None:
        super().__init__(captured, roles)
        self.parts = parts
        self.arguments: dict[str, list[Axis]] = {}

    def axes_of(self, role: str, shape: tuple[int, ...]) -> list[Axis]:
        axes: list[Axis] = []
        for i, size in enumerate(shape):
            sizes = self.parts.get((role, i), (size,))
            axes.append(tuple(Label(s) for s in sizes if s != 1))
        self.arguments[role] = axes
        return axes

    def mismatch(self, axis: Axis, other: Axis, meeting: str) -> NoReturn:
        for one, parts in ((axis, other), (other, axis)):
            if len(one) == 1 and math.prod(x.size for x in parts) == one[0].size:
                raise _Split(one[0].root, tuple(x.size for x in parts))
        raise NotLowerable(f"merged axes are {meeting} with other axes", self.where)

    def view(self, value: Value, shape: Sequence[int]) -> Value:
        flat = [x for axis in value.axes for x in axis]
        sizes = [int(s) for s in shape]
        total = math.prod(x.size for x in flat)
        if -1 in sizes:
            known = math.prod(s for s in sizes if s != -1)
            sizes[sizes.index(-1)] = total // max(known, 1)
        for size in sizes:
            have = 1
            while have < size and flat:
                if size % (have * flat[0].size):
                    inner = size // have
                    if flat[0].size % inner == 0:
                        raise _Split(flat[0].root, (inner, flat[0].size // inner))
                    break
                have *= flat.pop(0).size
        return super().view(value, shape)


@dataclass
class Labelled:
    """An iteration with all its dimensions named.

    Attributes:
        axes: for each argument, the names of each axis of the tensor as the program has it; for results likewise.
    """

    body: Body
    axes: dict[str, list[Names]]
    results: list[list[Names]]


def labelled(captured: fx.GraphModule, roles: Sequence[str]) -> Labelled:
    """Normalise an iteration; its arguments' axes are split where reshapes split them."""
    parts: dict[tuple[str, int], tuple[int, ...]] = {}
    for _ in range(64):
        run = _Loop(captured, roles, parts)
        try:
            with _disable_current_modes():  # whoever asks may be tracing; constants have values
                body = run.run()
            break
        except _Split as split:
            if not _take_apart(run, parts, split):
                raise NotLowerable("a reshape splits an axis of the loop", run.where) from None
    else:
        raise NotLowerable("its reshapes do not settle")
    sizes = body.sizes
    axes = {
        name: [tuple(str(x.root.name) for x in axis) for axis in of]
        for name, of in run.arguments.items()
    }
    results = [
        _grouped(shape, dims_of(node), sizes)
        for shape, node in zip(
            [*(body.leaf_shapes[f"carry_{i}"] for i in range(body.states)), *body.output_shapes],
            body.results,
            strict=True,
        )
    ]
    return Labelled(simplify(body), axes, results)


def _take_apart(run: _Loop, parts: dict[Any, Any], split: _Split) -> bool:
    """Split every argument's axis that has the label."""
    found = False
    for name, axes in run.arguments.items():
        for i, axis in enumerate(axes):
            sizes: list[int] = []
            for x in axis:
                same = x.root is split.label
                found |= same
                sizes += split.sizes if same else (x.size,)
            if len(sizes) > len(axis):
                parts[name, i] = tuple(sizes)
    return found


def _grouped(shape: Sequence[int], dims: Names, sizes: dict[str, int]) -> list[Names]:
    """The names of each axis of a tensor of this shape, from its names in order."""
    rest, axes = list(dims), []
    for size in shape:
        axis: list[str] = []
        while math.prod(sizes[d] for d in axis) < size:
            axis.append(rest.pop(0))
        axes.append(tuple(axis))
    return axes


@dataclass
class Pieces:
    """An iteration in three pieces, by its nodes, and the names that make the grid.

    Attributes:
        grid: names of the grid, in order.
        hoisted: nodes of tokens and parameters alone that run before the scan.
        sunk: nodes of outputs alone that run after it.
        tokens: what the step takes of each token, made outside.
        shared: what it takes that is the same for all tokens.
        outputs: what it gives of each token.
        constants: what it takes that is made from nothing.
        constants: what it takes that is always the same.
    """

    grid: Names
    hoisted: list[fx.Node]
    sunk: list[fx.Node]
    inside: list[fx.Node]
    tokens: list[fx.Node] = field(default_factory=list)
    shared: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)
    constants: list[fx.Node] = field(default_factory=list)


def pieces(body: Body) -> Pieces:
    """Take an iteration apart.

    Raises:
        NotLowerable: where no state depends on tokens.
    """
    nodes = body.nodes
    varies: set[fx.Node] = {
        p for p in body.placeholders if role(p)[0] in ("token", "anchor", "carry")
    }
    on_state: set[fx.Node] = {p for p in body.placeholders if role(p)[0] in ("anchor", "carry")}
    for node in nodes:
        if any(x in varies for x in node.all_input_nodes):
            varies.add(node)
        if any(x in on_state for x in node.all_input_nodes):
            on_state.add(node)
    # What is made of constants alone stays what it is wherever it is needed.
    known: set[fx.Node] = {p for p in body.placeholders if role(p)[0] == "constant"}
    for node in nodes:
        if node.all_input_nodes and all(x in known for x in node.all_input_nodes):
            known.add(node)
    states, results = body.results[: body.states], body.results[body.states :]
    layers = [
        n for n in nodes if n not in on_state and n in varies and _is_layer(n, varies | known)
    ]
    hoisted = (ancestors(layers) & set(nodes)) | {n for n in nodes if n not in varies | known}
    feeding = ancestors(states)
    inside = [n for n in nodes if n not in hoisted or n in known]
    grid = _grid(body, [n for n in inside if n in feeding], hoisted, varies)
    largest = max([math.prod(body.sizes[d] for d in dims_of(n)) for n in varies - on_state] or [1])
    sunk: set[fx.Node] = set()
    for node in inside:
        if node in feeding or node not in on_state:
            continue
        small = all(
            math.prod(body.sizes[d] for d in dims_of(x)) <= largest for x in node.all_input_nodes
        )
        late = any(x in sunk for x in node.all_input_nodes)
        if late or (
            small and (_is_layer(node, varies | known) or _breaks(node, grid, hoisted, varies))
        ):
            sunk.add(node)
    inside = [n for n in inside if n not in sunk]
    grid = _grid(body, inside, hoisted, varies)
    wanted: list[fx.Node] = [n for n in results if n not in sunk]
    wanted += [x for n in nodes if n in sunk for x in n.all_input_nodes if x not in sunk]
    made = set(inside)
    outputs = list(dict.fromkeys(n for n in wanted if n in made or n in on_state))
    out = Pieces(grid, [n for n in nodes if n in hoisted], [n for n in nodes if n in sunk], inside)
    out.outputs = outputs
    needed = ancestors([*states, *outputs])
    out.inside = [n for n in inside if n in needed]
    taken = dict.fromkeys(
        x for n in [*out.inside] for x in n.all_input_nodes if x not in made and x not in on_state
    )
    for x in states:
        if x not in made and x not in on_state:
            taken[x] = None
    out.constants = [x for x in taken if x in known]
    out.tokens = [x for x in taken if x in varies]
    out.shared = [x for x in taken if x not in varies | known]
    return out


def _is_layer(node: fx.Node, varies: set[fx.Node]) -> bool:
    """Whether a node is a linear layer: a sum over a dimension of a parameter."""
    if node.target is not ops.contraction:
        return False
    parameters = [x for x in operands_of(node) if x not in varies]
    summed = parse(spec_of(node)).summed
    return any(d in dims_of(x) for x in parameters for d in summed)


def _breaks(node: fx.Node, grid: Names, hoisted: set[fx.Node], varies: set[fx.Node]) -> bool:
    have = {d for x in node.all_input_nodes for d in dims_of(x)}
    if any(g in have and g not in dims_of(node) for g in grid):
        return True
    return bool(_not_carried(node, set(grid), varies))


def _not_carried(node: fx.Node, grid: set[str], varies: set[fx.Node]) -> set[str]:
    """Names that are more than carried along by a product: an operand with other features lacks them."""
    if node.target is not ops.contraction or len(operands_of(node)) < 2:
        return set()
    gone: set[str] = set()
    present = {d for x in operands_of(node) for d in dims_of(x)} & grid
    for x in operands_of(node):
        if isinstance(x, fx.Node) and x in varies and set(dims_of(x)) - grid:
            gone |= present - set(dims_of(x))
    return gone


def _grid(
    body: Body, inside: Sequence[fx.Node], hoisted: set[fx.Node], varies: set[fx.Node]
) -> Names:
    """The names that are only carried along, batch and heads; a name of the last axis of a state is a feature."""
    carries = [p for p in body.placeholders if role(p)[0] == "carry"]
    if not carries:
        raise NotLowerable("no value goes from one token to the next")
    order = list(dict.fromkeys(d for p in carries for d in dims_of(p)))
    grid = {d for d in order if all(d in dims_of(p) for p in carries)}
    while True:
        gone: set[str] = set()
        for node in inside:
            have = {d for x in node.all_input_nodes for d in dims_of(x)}
            gone |= {g for g in grid & have if g not in dims_of(node)}
            gone |= _not_carried(node, grid, varies)
            if node.target is ops.rename:
                (before,), after = parse(spec_of(node))
                gone |= {a for a, b in zip(before, after, strict=True) if a != b} & grid
                gone |= {b for a, b in zip(before, after, strict=True) if a != b} & grid
        if not gone & grid:
            break
        grid -= gone
    # A state keeps at least its last dimension.
    for p in carries:
        dims = dims_of(p)
        if dims and set(dims) <= grid:
            grid.discard(dims[-1])
    return tuple(d for d in order if d in grid)
