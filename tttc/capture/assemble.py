"""One iteration as a graph of its own: states, tokens and parameters in, new states and outputs out.

What a program detaches, it computes a second time from detached arguments: f(stop(x)) for stop(f(x)). A state that
goes on detached is carried a second time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tttc.capture.iteration import is_stop
from tttc.capture.reroll import Rolled
from tttc.ir.body import source_line
from tttc.ir.errors import NotLowerable

aten = torch.ops.aten


@dataclass
class Argument:
    """Where an argument of the iteration comes from.

    Attributes:
        place: the place of the program's variable, or None for a tensor the program closes over.
        tensor: as the iteration sees it.
        dim, start, step: of the axis it moves along, if it does.
        width: how many entries of it an iteration takes together, as an axis in the same place; None for one.
        stopped: whether no gradient goes to it.
    """

    place: str | None
    tensor: torch.Tensor
    dim: int | None = None
    start: int = 0
    step: int = 0
    stopped: bool = False
    width: int | None = None


@dataclass
class Assembled:
    """The graph, and what its arguments and results are."""

    gm: fx.GraphModule
    roles: list[str]
    arguments: dict[str, Argument]
    states: list[tuple[str, bool]]  # the place of each state, and whether it is the detached one
    outputs: list[fx.Node]  # the nodes of the template behind the outputs
    dtypes: list[torch.dtype] = field(default_factory=list)
    stops: bool = False


class _Assembler:
    def __init__(self, rolled: Rolled, gradients: bool, grad_free: set[str]) -> None:
        self.rolled = rolled
        self.gradients = gradients
        self.grad_free = grad_free
        self.graph = fx.Graph()
        self.places = {n: p for p, n in rolled.template.inputs.items()}
        self.made: dict[tuple[fx.Node, bool], Any] = {}
        self.leaves: dict[Any, fx.Node] = {}
        self.arguments: dict[str, Argument] = {}
        self.states: list[tuple[str, bool]] = []
        self.stops = False
        self.constants: dict[str, torch.Tensor] = {}
        self.last = self.graph.create_node("placeholder", "end")

    def run(self, outputs: list[fx.Node]) -> Assembled:
        made = [self.copy(n, False) for n in outputs]
        for place in self.rolled.carries:
            self.state(place, self.always_stopped(place))
        new = []
        i = 0
        while i < len(self.states):  # a new state may need another
            place, stopped = self.states[i]
            node = self.rolled.template.outputs[place]
            new.append(self.copy(node, stopped))
            i += 1
        results = [*new, *made]
        constants = [x for x in results if not isinstance(x, fx.Node)]
        if constants:
            raise NotLowerable("a result is the same for every token")
        self.graph.output(tuple(results))
        self.graph.erase_node(self.last)
        order = {"anchor": 0, "carry": 1, "token": 2, "shared": 3}
        nodes = [n for n in self.graph.nodes if n.op == "placeholder"]

        def rank(n: fx.Node) -> tuple[int, int]:
            kind, _, index = str(n.target).rpartition("_")
            return order[kind], int(index)

        nodes.sort(key=rank)
        first = next(iter(self.graph.nodes))
        for n in nodes:
            if n is not first:
                first.prepend(n)
            else:
                first = first.next
        root = torch.nn.Module()
        for name, x in self.constants.items():
            root.register_buffer(name, x, persistent=False)
        gm = fx.GraphModule(root, self.graph)
        gm.graph.eliminate_dead_code()
        return Assembled(
            gm,
            [str(n.target) for n in nodes],
            self.arguments,
            self.states,
            outputs,
            [n.meta["val"].dtype for n in outputs],
            self.stops,
        )

    # -- arguments ---------------------------------------------------------------------------------

    def leaf(self, key: Any, role: str, argument: Argument, like: torch.Tensor) -> fx.Node:
        if key not in self.leaves:
            count = sum(1 for x in self.arguments if x.startswith(role))
            name = f"{role}_{count}"
            with self.graph.inserting_before(self.last):
                node = self.graph.placeholder(name)
            node.meta["val"] = like
            self.leaves[key] = node
            self.arguments[name] = argument
        return self.leaves[key]

    def state(self, place: str, stopped: bool) -> int:
        if (place, stopped) not in self.states:
            i = len(self.states)
            self.states.append((place, stopped))
            like = self.rolled.template.shapes[place]
            for role in ("anchor", "carry"):
                with self.graph.inserting_before(self.last):
                    node = self.graph.placeholder(f"{role}_{i}")
                node.meta["val"] = like
                self.leaves[role, place, stopped] = node
            source = place
            self.arguments[f"carry_{i}"] = Argument(source, like, stopped=stopped)
        return self.states.index((place, stopped))

    def argument(self, node: fx.Node, stopped: bool) -> fx.Node:
        """A placeholder of the template, read as a whole."""
        place = self.places[node]
        rolled = self.rolled
        if place in rolled.carries:
            stopped = stopped or self.always_stopped(place)
            self.state(place, stopped)
            return self.leaves["carry", place, stopped]
        if place in rolled.anchors:
            carry = rolled.anchors[place]
            stopped = stopped or self.always_stopped(carry)
            self.state(carry, stopped)
            return self.leaves["anchor", carry, stopped]
        like = rolled.template.shapes[place]
        return self.leaf((place, stopped), "shared", Argument(place, like, stopped=stopped), like)

    def always_stopped(self, place: str) -> bool:
        """Whether a state goes on detached from every iteration, and came in without a gradient."""
        return (
            self.gradients
            and place in self.grad_free
            and is_stop(self.rolled.template.outputs[place])
        )

    def token(self, node: fx.Node, stopped: bool) -> Any:
        """What an iteration picks of a tensor."""
        source: Any = node.args[0]
        start, step = self.rolled.moving[node, 2]
        dim = int(node.args[1])  # type: ignore[arg-type]
        if source.op != "placeholder" or self.places[source] in (
            *self.rolled.carries,
            *self.rolled.anchors,
        ):
            raise NotLowerable("it picks from a value made inside the loop", source_line(node))
        place = self.places[source]
        whole = self.rolled.template.shapes[place]
        dim = dim % whole.dim()
        width = None
        if node.target is aten.slice.Tensor:
            end, _ = self.rolled.moving.get((node, 3), (None, 0))
            if end is None or end <= start or tuple(node.args[4:]) not in ((), (1,)):
                raise NotLowerable("it takes a part of the tokens that grows", source_line(node))
            width = end - start if end - start > 1 else None
        like = node.meta["val"]
        single = node.target is aten.slice.Tensor and width is None
        if single:
            like = like.squeeze(dim)
        made = self.leaf(
            (place, stopped, dim, start, step, width),
            "token",
            Argument(place, whole, dim, start, step, stopped, width),
            like,
        )
        if single:
            made = self.graph.call_function(aten.unsqueeze.default, (made, dim))
            made.meta["val"] = node.meta["val"]
        return made

    # -- the walk ----------------------------------------------------------------------------------

    def copy(self, node: fx.Node, stopped: bool) -> Any:
        """The node in the new graph; under ``stopped`` from detached arguments."""
        stack: list[Any] = [(node, stopped)]
        while stack:
            now, stop = stack[-1]
            if (now, stop) in self.made:
                stack.pop()
                continue
            if is_stop(now):
                inner = now.args[0]
                self.stops = True
                key: Any = (inner, stop or self.gradients)
                if key in self.made:
                    self.made[now, stop] = self.made[key]
                    stack.pop()
                else:
                    stack.append(key)
                continue
            if now.op == "placeholder":
                self.made[now, stop] = self.argument(now, stop)
            elif now.op == "get_attr" and now.meta.get("known"):
                self.made[now, stop] = self.known(now)
            elif now.op == "get_attr":
                x = now.meta["constant"]
                self.made[now, stop] = self.leaf(
                    (now.target, id(x), stop), "shared", Argument(None, x, stopped=stop), x
                )
            elif (now, 2) in self.rolled.moving and now.target in (
                aten.select.int,
                aten.slice.Tensor,
            ):
                self.made[now, stop] = self.token(now, stop)
            else:
                todo = [(x, stop) for x in now.all_input_nodes if (x, stop) not in self.made]
                if now.target is aten.copy.default:  # into a slice of a tensor that is written to
                    todo = [(x, s) for x, s in todo if x is now.args[1]]
                if todo:
                    stack += todo
                    continue
                if now.target is aten.copy.default:
                    made = self.copied(now, self.made[now.args[1], stop])
                else:
                    made = self._again(now, stop)
                self.made[now, stop] = made
            stack.pop()
        return self.made[node, stopped]

    def known(self, node: fx.Node) -> fx.Node:
        """What the iteration makes from nothing, its value worked out."""
        self.constants[str(node.target)] = node.meta["constant"]
        made = self.graph.get_attr(str(node.target))
        made.meta.update(node.meta)
        return made

    def _again(self, node: fx.Node, stopped: bool) -> fx.Node:
        return self.graph.node_copy(node, lambda x: self.made[x, stopped])

    def copied(self, node: fx.Node, value: Any) -> Any:
        """What is written: the value in the shape of what it goes into."""
        shape = list(node.meta["val"].shape)
        if list(value.meta["val"].shape) == shape:
            return value
        made = self.graph.call_function(aten.expand.default, (value, shape))
        made.meta.update(node.meta)
        return made


def assemble(
    rolled: Rolled, outputs: list[fx.Node], gradients: bool, grad_free: set[str]
) -> Assembled:
    """The iteration as a graph on its own.

    Args:
        outputs: nodes of the template that are wanted of every token.
        gradients: whether gradients may be asked for, so that it matters where they stop.
        grad_free: places that hold no gradient before the loop.
    """
    return _Assembler(rolled, gradients, grad_free).run(outputs)
