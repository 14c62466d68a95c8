"""A re-rolled loop as source: its step, and what runs in the place of the loop.

For a loop like ``W = W - k[:, t] ...`` it reads::

    def step(anchor, carry, token, shared):
        u = contraction("i, j -> i j", token[0], token[1])
        ...

    def run(bounds, values):
        (W, k, v) = values
        ...
        state, z = scan(step, (init_0,), (token_0, token_1), 16, shared=())
        return W, outs
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tttc.capture import layout
from tttc.capture.generated import compiled_source
from tttc.capture.grid import Labelled, Names, Pieces
from tttc.capture.layout import TIME
from tttc.ir import ops
from tttc.ir.body import head_length, head_of, operands_of, role, spec_of
from tttc.ir.build import dims_of
from tttc.ir.functions import FUNCTIONS
from tttc.ir.spec import parse

_counter = itertools.count()


@dataclass
class Given:
    """How a program's tensor becomes an argument of the iteration.

    Attributes:
        expression: what reads it.
        axes: its axes, by name; those an iteration picks from are left out.
        dim, start, step: of the axis that iterations move along; None where they all see the same.
        width: how many of its entries an iteration takes together; None for one, whose axis is left out.
        tensor: the tensor as it was when the loop was captured.
    """

    expression: str
    axes: list[Names]
    tensor: torch.Tensor
    dim: int | None = None
    start: int = 0
    step: int = 1
    width: int | None = None

    def axis(self, at: int) -> int:
        """The axis of the tensor behind the named axis ``at``; negative where iterations see more than came in."""
        if self.dim is None or self.width is not None:
            return at + self.tensor.dim() - len(self.axes)
        return at + self.tensor.dim() - len(self.axes) - 1 + (at >= self.dim)


@dataclass
class Loop:
    """All that is needed to write a loop anew."""

    labelled: Labelled
    pieces: Pieces
    given: dict[str, Given]  # by argument of the iteration: token_0, carry_0, shared_0
    inputs: list[str]  # the variables, in order
    mini_batch_size: int
    offset: int
    anchors: dict[int, str] = field(default_factory=dict)  # a state's anchor, where it has one
    free: set[str] = field(default_factory=set)  # names whose sizes may be any
    names: str = "loop"


def grid_of(loop: Loop) -> tuple[Names, Names]:
    """Which names are the batch and which are heads: parameters have heads, not batches."""
    grid = loop.pieces.grid
    fixed = {d for x in loop.pieces.shared for d in dims_of(x)} | (set(grid) - loop.free)
    batch = next((g for g in grid if g not in fixed), None)
    if batch is None and grid and not any(g in fixed for g in grid[:1]):
        batch = grid[0]
    return ((batch,) if batch else ()), tuple(g for g in grid if g != batch)


def write_step(loop: Loop) -> Callable[..., Any]:
    """The step of one token of one head of one sequence, as a function with a source."""
    body, parts = loop.labelled.body, loop.pieces
    names: dict[Any, str] = {}
    for node in body.placeholders:
        kind, i = role(node)
        if kind in ("anchor", "carry"):
            names[node] = f"{kind}[{i}]"
    for i, node in enumerate(parts.tokens):
        names[node] = f"token[{i}]"
    for i, node in enumerate(parts.shared):
        names[node] = f"shared[{i}]"
    scope: dict[str, Any] = {name: f for f, name in _OPERATORS.items()}
    scope |= {"inf": float("inf"), "nan": float("nan"), "like": layout.like}
    lines = ["def step(anchor, carry, token, shared):"]
    for i, node in enumerate(parts.constants):
        names[node] = f"known_{i}"
        scope[f"KNOWN_{i}"] = body.constants[role(node)[1]]
        lines.append(f"    known_{i} = like(KNOWN_{i}, carry[0])")
    for node in parts.inside:
        operands = [names[x] if isinstance(x, fx.Node) else repr(x) for x in operands_of(node)]
        head = [repr(head_of(node))] if head_length(node) else []
        spec = repr(_without(spec_of(node), parts.grid))
        names[node] = f"x_{len(lines)}"
        lines.append(
            f"    {names[node]} = {_OPERATORS[node.target]}({', '.join([*head, spec, *operands])})"
        )
    states = [names[x] for x in body.results[: body.states]]
    outputs = [names[x] for x in parts.outputs]
    lines.append(f"    return ({_tuple(states)}, {_tuple(outputs)})")
    scope["__name__"] = "tttc.loop"
    step = compiled_source("step", "\n".join(lines) + "\n", scope)
    step.__qualname__ = loop.names
    return step


_OPERATORS: dict[Any, str] = {
    f: f.__name__
    for f in (ops.contraction, ops.elementwise, ops.reduction, ops.rename, ops.broadcast)
}


def _without(spec: str, grid: Names) -> str:
    """A spec without the names of the grid."""
    parsed = parse(spec)
    operands = ", ".join(" ".join(d for d in o if d not in grid) for o in parsed.operands)
    return f"{operands} -> {' '.join(d for d in parsed.result if d not in grid)}"


def _tuple(items: Sequence[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


class Writer:
    """Writes what runs in the place of a loop."""

    def __init__(self, loop: Loop, step: Callable[..., Any], constants: dict[str, Any]) -> None:
        self.loop = loop
        self.lines: list[str] = []
        self.scope: dict[str, Any] = {
            "_torch": torch,
            "_step_function": step,
            **constants,
            **{f"_{f}": getattr(layout, f) for f in (
                "like", "moving", "apart", "scanned", "per_head", "unscanned", "together", "expanded", "Joined"
            )},
        }  # fmt: skip
        self.grid = grid_of(loop)
        self.names: dict[
            Any, tuple[str, Names]
        ] = {}  # nodes made outside the step: variable, names of axes

    def line(self, text: str) -> None:
        """One statement."""
        self.lines.append(f"    {text}")

    def begin(self) -> None:
        """Unpack the variables, count the iterations, find the sizes."""
        self.line(f"{_tuple(self.loop.inputs)} = _values")
        self.line("_start, _stop, _step = _bounds")
        self.line("_count = _whole(_bounds, _values)")
        entries = []
        known: set[str] = set()
        for g in self.loop.given.values():
            for at, names in enumerate(g.axes):
                # A state may come in smaller than iterations leave it: the axis says nothing then.
                axis = g.axis(at)
                if (
                    len(names) == 1
                    and names[0] in self.loop.free
                    and names[0] not in known
                    and axis >= 0
                    and g.tensor.shape[axis] != 1
                ):
                    known.add(names[0])
                    entries.append(f"{names[0]!r}: {g.expression}.shape[{axis}]")
        for name, size in self.loop.labelled.body.sizes.items():
            if name not in known:
                entries.append(f"{name!r}: {size}")
        self.line(f"_sizes = {{{', '.join(entries)}}}")

    def arguments(self) -> None:
        """What tokens and parameters are made of, and what is hoisted out of the iterations."""
        body = self.loop.labelled.body
        used = {x for n in self.loop.pieces.hoisted for x in n.all_input_nodes}
        used |= {*self.loop.pieces.tokens, *self.loop.pieces.shared}
        used |= {x for n in self.loop.pieces.sunk for x in n.all_input_nodes}
        for node in body.placeholders:
            kind, i = role(node)
            if node not in used or kind in ("anchor", "carry"):
                continue
            if kind == "constant":
                self.scope[f"_known_{i}"] = body.constants[i]
                like = next(iter(self.loop.given.values())).expression
                self.line(f"_{node.name} = _like(_known_{i}, {like})")
                self.names[node] = (f"_{node.name}", dims_of(node))
                continue
            g = self.loop.given[str(node.target)]
            text, lead, names = g.expression, 0, tuple(n for axis in g.axes for n in axis)
            if g.dim is not None:
                text = f"_moving({text}, {g.dim}, {g.start}, _count, {g.step}, {g.width})"
                lead, names = 1, (TIME, *names)
            self.line(f"_{node.name} = _apart({text}, {tuple(g.axes)!r}, _sizes, {lead})")
            self.names[node] = (f"_{node.name}", names)
        for node in self.loop.pieces.hoisted:
            self.outside(node)

    def outside(self, node: fx.Node) -> None:
        """One operator for all tokens at once."""
        operands, spec = operands_of(node), parse(spec_of(node))
        timed = [isinstance(x, fx.Node) and TIME in self.names[x][1] for x in operands]
        lead = (TIME,) if any(timed) else ()
        names = (*lead, *spec.result)
        inputs: list[tuple[str, Names]] = [
            self.names[x] if isinstance(x, fx.Node) else (repr(x), ()) for x in operands
        ]
        # The names an operator gives its operands' axes are the operands' own, but for renames.
        if node.target is ops.contraction:
            letters = {d: chr(ord("a") + i) for i, d in enumerate((TIME, *spec.labels))}
            equation = ",".join("".join(letters[d] for d in n) for _, n in inputs)
            equation += "->" + "".join(letters[d] for d in names)
            self.line(
                f"_{node.name} = _torch.einsum({equation!r}, {', '.join(t for t, _ in inputs)})"
            )
        elif node.target is ops.elementwise:
            function = head_of(node)
            self.scope[f"_f_{function}"] = FUNCTIONS[function].torch
            aligned = [self._aligned(t, n, names) if n else t for t, n in inputs]
            self.line(f"_{node.name} = _f_{function}({', '.join(aligned)})")
        elif node.target is ops.reduction:
            (text, have) = inputs[0]
            axes = [i for i, n in enumerate(have) if n not in names]
            for i in reversed(axes):
                text = f"_torch.{head_of(node)}({text}, {i})"
            rest = tuple(n for n in have if n in names)
            self.line(f"_{node.name} = {self._aligned(text, rest, names)}")
        elif node.target is ops.broadcast:
            (text, have), (like, like_names) = inputs
            if set(like_names) - set(names):  # axes that say nothing
                like += f"[{', '.join(':' if n in names else '0' for n in like_names)}]"
                like_names = tuple(n for n in like_names if n in names)
            shape = f"{self._aligned(like, like_names, names)}"
            one = self._aligned(text, have, names) if have else text
            self.line(f"_{node.name} = {one} + _torch.zeros_like({shape})")
        else:  # a rename
            self.line(f"_{node.name} = {inputs[0][0]}")
            names = (*lead, *spec.result)
        self.names[node] = (f"_{node.name}", names)

    @staticmethod
    def _aligned(text: str, have: Names, want: Names) -> str:
        """An expression with its axes in the order wanted, size 1 where it lacks one."""
        order = [n for n in want if n in have]
        if list(have) != order:
            text = f"{text}.permute({[have.index(n) for n in order]})"
        if len(order) != len(want):
            text = f"{text}[{', '.join(':' if n in have else 'None' for n in want)}]"
        return text

    def scan(self) -> None:
        """The scan itself."""
        body, parts = self.loop.labelled.body, self.loop.pieces
        tokens, shared, inits, anchors = [], [], [], []
        for i, node in enumerate(parts.tokens):
            text, names = self.names[node]
            self.line(
                f"_t_{i} = _scanned({text}, {names!r}, {self.grid!r}, {self._features(node)!r}, _sizes)"
            )
            tokens.append(f"_t_{i}")
        if not tokens:
            raise AssertionError("a loop without tokens")
        for i, node in enumerate(parts.shared):
            text, names = self.names[node]
            if any(n in self.grid[0] for n in names):
                raise AssertionError("a parameter with a batch dimension")
            self.line(
                f"_p_{i} = _per_head({text}, {names!r}, {self.grid[1]!r}, {self._features(node)!r}, _sizes)"
            )
            shared.append(f"_p_{i}")
        for i in range(body.states):
            inits.append(self._state(f"_i_{i}", f"carry_{i}"))
        init = _tuple(inits)
        if self.loop.offset:
            for i in range(body.states):
                given = f"anchor_{i}" if f"anchor_{i}" in self.loop.given else f"carry_{i}"
                anchors.append(self._state(f"_a_{i}", given))
            init = f"_ScanState({_tuple(anchors)}, {init}, {self.loop.offset})"
        self.line(
            f"_state, _z = _scan(_step_function, {init}, {_tuple(tokens)}, {self.loop.mini_batch_size}, "
            f"shared={_tuple(shared)})"
        )

    def _features(self, node: fx.Node) -> Names:
        return tuple(d for d in dims_of(node) if d not in self.loop.pieces.grid)

    def _state(self, variable: str, given: str) -> str:
        g = self.loop.given[given]
        node = next(
            p
            for p in self.loop.labelled.body.placeholders
            if p.target == given.replace("anchor", "carry")
        )
        names = tuple(n for axis in g.axes for n in axis)
        self.line(
            f"{variable} = _apart(_expanded({g.expression}, {tuple(g.axes)!r}, _sizes), {tuple(g.axes)!r}, _sizes, 0)"
        )
        self.line(
            f"{variable} = _scanned({variable}, {names!r}, {self.grid!r}, {self._features(node)!r}, _sizes)"
        )
        return variable

    def final(self, i: int, which: str, dtype: torch.dtype) -> str:
        """An expression for a state after the loop, as the program has it."""
        axes = self.loop.given[f"carry_{i}"].axes
        node = next(p for p in self.loop.labelled.body.placeholders if p.target == f"carry_{i}")
        names = tuple(n for axis in axes for n in axis)
        text = f"_unscanned(_state.{which}[{i}], {names!r}, {self.grid!r}, {self._features(node)!r}, False, _sizes)"
        return f"_together({text}, {tuple(axes)!r}, _sizes, 0).to(_{dtype})"

    def results(self) -> None:
        """Outputs of the step for all tokens, and what is sunk below the scan."""
        for i, node in enumerate(self.loop.pieces.outputs):
            dims = dims_of(node)
            self.line(
                f"_{node.name} = _unscanned(_z[{i}], {dims!r}, {self.grid!r}, {self._features(node)!r}, True, _sizes)"
            )
            self.names[node] = (f"_{node.name}", (TIME, *dims))
        for node in self.loop.pieces.sunk:
            self.outside(node)

    def output(self, index: int, dtype: torch.dtype) -> str:
        """An expression for an output of the iteration, ``[T, ...]`` as the program has it."""
        body = self.loop.labelled.body
        node = body.results[body.states + index]
        axes = self.loop.labelled.results[body.states + index]
        text, names = self.names[node]
        want = (TIME, *(n for axis in axes for n in axis))
        if TIME not in names:
            raise AssertionError("an output that is the same for every token")
        return f"_together({self._aligned(text, names, want)}, {tuple(axes)!r}, _sizes, 1).to(_{dtype})"

    def function(self, name: str) -> Callable[..., Any]:
        """What was written, as a function of the loop's bounds and variables."""
        text = "\n".join([f"def {name}(_bounds, _values):", *self.lines]) + "\n"
        return compiled_source(name, text, self.scope)
