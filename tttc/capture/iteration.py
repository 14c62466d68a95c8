"""One iteration of a loop as an ATen graph: what goes in and what comes out, by place.

Iterations are traced one by one, each from values of its own, so that no trace grows with the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from tttc.capture.constants import fold_constants
from tttc.capture.facts import Facts
from tttc.capture.index import Earlier, Index
from tttc.capture.lines import user_line
from tttc.capture.picks import compose_picks
from tttc.capture.places import Copier, contents, is_changed
from tttc.capture.step import SourceLines, WithLines, decomposition_table
from tttc.ir.errors import NotLowerable

aten = torch.ops.aten
Env = dict[str, Any]


@dataclass
class Iteration:
    """The graph of one iteration.

    Attributes:
        inputs: the placeholder of each place that held a tensor before.
        outputs: the node of each place that holds a tensor afterwards.
        appended: what was appended to each list.
        after: the variables afterwards, their tensors without values.
        scalars: their numbers and flags.
        shapes: of the inputs.
        in_place: places whose tensors are written to, if anything.
        env: the variables before.
        facts: what was asked of the loop variable.
        mutates: whether it changes what dictionaries and dataclasses hold that were there before.
    """

    graph: fx.Graph
    inputs: dict[str, fx.Node]
    outputs: dict[str, fx.Node]
    appended: dict[str, list[fx.Node]]
    after: Env
    scalars: dict[str, Any]
    shapes: dict[str, torch.Tensor]
    in_place: set[str]
    env: Env
    facts: Facts
    mutates: bool


class _Marks(TorchFunctionMode):
    """Leaves a mark in the graph where the program stops gradients: a clamp to all numbers.

    Saved values are detached by autograd itself all the time, so that ``aten.detach`` says nothing.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.backward, torch.autograd.backward):
            raise NotLowerable("it calls backward(): use torch.autograd.grad", user_line())
        recorded = torch.is_grad_enabled()
        if func is torch.Tensor.__setitem__ and not recorded and _differentiable(args[2]):
            args = (*args[:2], _stopped(args[2]))
        out = func(*args, **kwargs)
        if func is torch.autograd.grad and not kwargs.get("create_graph"):
            # Constants to whoever differentiates the program.
            return tuple(None if g is None else _stopped(g) for g in out)
        if func in _DETACHES or (not recorded and _differentiable(out)):
            return _stopped(out)
        return out


_DETACHES = (torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__)  # type: ignore[attr-defined]


def _differentiable(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _stopped(x: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunction():
        return torch.clamp(x.detach(), -float("inf"), float("inf"))


def is_stop(node: Any) -> bool:
    """Whether a node is the mark of a stopped gradient."""
    return (
        isinstance(node, fx.Node)
        and node.target is aten.clamp.default
        and tuple(node.args[1:]) == (-float("inf"), float("inf"))
    )


def fresh(x: torch.Tensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """A tensor without values like ``x``, made in the fake mode at hand."""
    if shape is None or tuple(shape) == tuple(x.shape):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def trace(
    body: Callable[..., Env],
    variable: Any,
    env: Env,
    names: list[str],
    mode: FakeTensorMode,
    shapes: dict[str, tuple[int, ...]],
    facts: Facts,
) -> Iteration:
    """Trace one iteration.

    Args:
        body: the iteration; it takes the loop variable and the variables, and returns the variables.
        env: the variables before it; those among ``names`` that it lacks are unbound.
        shapes: places whose tensors shall have another shape than they have.
        facts: where the loop variable notes what is asked of it.
    """
    given: dict[str, torch.Tensor] = {}

    def note(path: str, x: torch.Tensor) -> torch.Tensor:
        given[path] = fresh(x, shapes.get(path))
        return x

    with mode, torch.no_grad():
        noting = Copier(note)
        for name, value in env.items():
            noting.copy(value, name)
    paths = list(given)
    left: dict[str, Any] = {}

    def flat(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Copies, so that what requires gradients may be written to as in the middle of a program.
        now = {p: x.clone() for p, x in zip(paths, tensors, strict=True)}
        copier = Copier(
            lambda path, x: now[path], lambda x: Earlier() if isinstance(x, Index) else x
        )
        values = {name: copier.copy(value, name) for name, value in env.items()}
        before = {path: len(x) for path, x in copier.lists.items()}
        lists = dict(copier.lists)
        bound = {name: values.get(name, ...) for name in names}
        held = contents(list(values.values()))
        with SourceLines(), _Marks():
            out = body(variable, **bound)
        left["mutates"] = is_changed(held)
        out = {k: v for k, v in out.items() if k in names}
        appended: dict[str, list[Any]] = {}
        for path, x in lists.items():
            if len(x) > before[path]:
                appended[path] = x[before[path] :]
                del x[before[path] :]
            elif len(x) < before[path]:
                raise NotLowerable(f"the list {path} gets shorter")
        found: dict[str, torch.Tensor] = {}

        def keep(path: str, x: torch.Tensor) -> torch.Tensor:
            found[path] = x
            return x

        collect = Copier(keep)
        left["after"] = {name: collect.copy(value, name) for name, value in out.items()}
        left["scalars"] = collect.everywhere(collect.scalars)
        left["collect"] = collect
        left["places"] = list(found)
        left["in_place"] = {p for p, x in found.items() if x is now.get(p)}
        left["appended"] = {}
        results = list(found.values())
        for path, items in appended.items():
            for x in items:
                if not isinstance(x, torch.Tensor):
                    raise NotLowerable(f"the list {path} gets something that is no tensor")
            left["appended"][path] = len(items)
            results += items
        return tuple(results)

    leaves = [given[p] for p in paths]
    for x in leaves:
        if x.is_floating_point():
            x.requires_grad_()
    plain = torch._guards.tracing(None)
    lines = torch.fx.traceback.preserve_node_meta()
    with plain, lines, mode, torch.enable_grad(), torch.autocast("cpu", enabled=False):
        gm = make_fx(flat, decomposition_table=decomposition_table(), tracing_mode="real")(*leaves)
    gm.graph.eliminate_dead_code()
    if _mutates(gm.graph):
        gm = _functional(gm, leaves, mode)
    _drop_copies(gm.graph)
    compose_picks(gm.graph)
    fold_constants(gm)
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    results = list(gm.graph.output_node().args[0])  # type: ignore[arg-type]
    outputs = dict(zip(left["places"], results, strict=False))
    rest = results[len(outputs) :]
    lists: dict[str, list[fx.Node]] = {}
    for path, count in left["appended"].items():
        lists[path], rest = rest[:count], rest[count:]
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            node.meta["constant"] = getattr(gm, node.target)
    before_nodes = noting.everywhere(dict(zip(paths, nodes, strict=True)))
    outputs = left["collect"].everywhere(outputs)
    return Iteration(
        gm.graph,
        before_nodes,
        outputs,
        lists,
        left["after"],
        left["scalars"],
        noting.everywhere(given),
        {p for p in left["in_place"] if outputs[p] is not before_nodes[p]},
        env,
        facts,
        left["mutates"],
    )


def _mutates(graph: fx.Graph) -> bool:
    return any(
        n.op == "call_function"
        and isinstance(n.target, torch._ops.OpOverload)
        and n.target._schema.is_mutable
        for n in graph.nodes
    )


def _functional(
    gm: fx.GraphModule, leaves: list[torch.Tensor], mode: FakeTensorMode
) -> fx.GraphModule:
    """The same graph without in-place operations."""
    leaves = [x.detach() for x in leaves]

    def run(*xs: torch.Tensor) -> Any:
        return WithLines(gm).run(*xs)

    with mode, torch.no_grad(), torch.fx.traceback.preserve_node_meta():
        made = make_fx(torch.func.functionalize(run, remove="mutations"), tracing_mode="real")(
            *leaves
        )
    made.graph.eliminate_dead_code()
    return made


_COPIES = {
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
}


def _drop_copies(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _COPIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
