"""Re-rolling: what one iteration of a loop does, found and proved on a few of them.

Two iterations are the same where their graphs are isomorphic up to the index of their slices, which must move by a
constant. An iteration that starts a mini-batch differs in one thing: a place that others leave alone (the
*anchor*) takes the value of one that every iteration renews (the *carry*).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from tttc.capture.iteration import Iteration
from tttc.ir.body import source_line
from tttc.ir.errors import NotLowerable

aten = torch.ops.aten

# Which arguments of an operator are indices along a dimension.
INDICES: dict[Any, tuple[int, ...]] = {
    aten.select.int: (2,),
    aten.slice.Tensor: (2, 3),
    aten.select_scatter.default: (3,),
    aten.slice_scatter.default: (3, 4),
}
SCATTERS = (aten.select_scatter.default, aten.slice_scatter.default)


@dataclass
class Match:
    """How the graph of an iteration differs from another's.

    Attributes:
        inputs: what stands for each placeholder of the first.
        numbers: arguments that differ, by node of the first and place among its arguments.
    """

    inputs: dict[fx.Node, fx.Node] = field(default_factory=dict)
    numbers: dict[tuple[fx.Node, Any], tuple[Any, Any]] = field(default_factory=dict)
    nodes: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def extend(self, first: Any, second: Any) -> None:
        """Match two results, and all they are made of.

        Raises:
            NotLowerable: where they are not made in the same way.
        """
        todo: list[tuple[Any, Any, Any, Any]] = [(first, second, None, None)]
        while todo:
            a, b, owner, where = todo.pop()
            if isinstance(a, fx.Node) and a.op == "placeholder" and isinstance(b, fx.Node):
                if self.inputs.setdefault(a, b) is not b:
                    raise NotLowerable("a variable is used in two roles", source_line(b))
                continue
            if isinstance(a, fx.Node) and isinstance(b, fx.Node):
                known = self.nodes.get(a)
                if known is b:
                    continue
                if known is not None or a.op != b.op:
                    raise _differ(b)
                if a.op == "get_attr":
                    x, y = a.meta["constant"], b.meta["constant"]
                    if x is not y and not _same(x, y):
                        raise _differ(b)
                elif (
                    a.target != b.target
                    or len(a.args) != len(b.args)
                    or set(a.kwargs) != set(b.kwargs)
                ):
                    raise _differ(b)
                self.nodes[a] = b
                for i, (x, y) in enumerate(zip(a.args, b.args, strict=True)):
                    todo.append((x, y, a, i))
                for k in a.kwargs:
                    todo.append((a.kwargs[k], b.kwargs[k], a, k))
            elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
                todo += [
                    (x, y, owner, (where, i)) for i, (x, y) in enumerate(zip(a, b, strict=True))
                ]
            elif isinstance(a, fx.Node) or isinstance(b, fx.Node):
                raise _differ(a if isinstance(a, fx.Node) else b)
            elif isinstance(a, (int, float)) and isinstance(b, (int, float)) and owner is not None:
                if a != b or type(a) is not type(b):
                    self.numbers[owner, where] = (a, b)
            elif a != b:
                raise _differ(owner)


def _same(x: Any, y: Any) -> bool:
    with _disable_current_modes():  # constants have values, whoever asks
        return (
            isinstance(x, torch.Tensor)
            and isinstance(y, torch.Tensor)
            and x.shape == y.shape
            and x.dtype == y.dtype
            and type(x) is type(y) is torch.Tensor
            and bool(torch.equal(x, y))
        )


def _differ(node: Any) -> NotLowerable:
    where = source_line(node) if isinstance(node, fx.Node) else None
    return NotLowerable("its iterations do not all do the same", where)


@dataclass
class Rolled:
    """One iteration, and how iterations hang together.

    Attributes:
        template: an iteration that does not start a mini-batch.
        carries: places that every iteration renews from themselves.
        anchors: for each place that is renewed when a mini-batch starts, the carry it takes its value of.
        last: places of which only the value after the loop matters.
        mini_batch_size: iterations between two renewals of the anchors; None where there are no anchors.
        offset: iterations already done of the mini-batch when the loop starts.
        moving: the first index and the step of each moving argument.
        written: for each tensor written to, the node of what is written.
    """

    template: Iteration
    carries: list[str]
    anchors: dict[str, str]
    last: list[str]
    mini_batch_size: int | None
    offset: int
    moving: dict[tuple[fx.Node, Any], tuple[int, int]]
    written: dict[str, fx.Node]

    @property
    def appended(self) -> dict[str, fx.Node]:
        """What is appended to each list."""
        return {path: nodes[0] for path, nodes in self.template.appended.items()}


def moving_indices(
    first: Iteration, second: Iteration, at: tuple[int, int]
) -> dict[tuple[fx.Node, Any], tuple[int, int]]:
    """The indices of ``first`` that move from it to ``second``, iterations ``at``: index at iteration 0, step."""
    match = Match()
    for a, b in results_of(first, second):
        match.extend(a, b)
    moving = {}
    for key, (a, b) in match.numbers.items():
        node, place = key
        if place not in INDICES.get(node.target, ()):
            raise NotLowerable("a number changes from token to token", source_line(node))
        step = (b - a) // (at[1] - at[0])
        moving[key] = (a - step * at[0], step)
    return moving


def quietest(iterations: dict[int, Iteration], limits: set[int]) -> int:
    """The iteration that changes least: one that renews no anchor.

    Before others come those at no limit, and those to which no place is another's, as the anchor's is the carry's
    right after it was renewed.
    """

    def rank(n: int) -> tuple[Any, ...]:
        x = iterations[n]
        changes = sum(node is not x.inputs.get(p) for p, node in x.outputs.items())
        return (n in limits, changes, len(x.inputs) - len(set(x.inputs.values())), n)

    return min(iterations, key=rank)


def results_of(first: Iteration, second: Iteration) -> Iterable[tuple[fx.Node, fx.Node]]:
    """What two iterations leave, pair by pair."""
    for path, nodes in first.appended.items():
        others = second.appended.get(path, [])
        if len(nodes) != len(others):
            raise NotLowerable(f"the list {path} does not grow by the same with every token")
        yield from zip(nodes, others, strict=True)
    for path, node in first.outputs.items():
        if node is not first.inputs.get(path):
            other = second.outputs.get(path)
            if other is None:
                raise NotLowerable(f"{path} is not always bound")
            yield node, other


def is_written(iteration: Iteration, path: str) -> bool:
    """Whether a place is a tensor that the iteration only writes a part of."""
    node = iteration.outputs[path]
    return node.target in SCATTERS and node.args[0] is iteration.inputs.get(path)


def reroll(
    iterations: dict[int, Iteration],
    base: int,
    moving: dict[tuple[fx.Node, Any], tuple[int, int]],
    period: int | None,
    wanted: set[str],
    same_at_entry: Any,
) -> Rolled:
    """The loop behind some of its iterations.

    Args:
        iterations: by number; ``base`` is the one to go by.
        moving: its indices that move.
        period: after how many iterations the program may do the same again, where it asked for remainders.
        wanted: places whose values are used after the loop.
        same_at_entry: whether two places hold the same tensor before the loop.

    Raises:
        NotLowerable: where the iterations do not fit together, with the line.
    """
    template = iterations[base]
    _forget_names(template, iterations)
    for path, nodes in template.appended.items():
        if len(nodes) != 1:
            raise NotLowerable(f"the list {path} grows by {len(nodes)} with every token")
    written = {p: n for p, n in template.outputs.items() if is_written(template, p)}
    changed = [p for p, n in template.outputs.items() if n is not template.inputs.get(p)]
    bound = {p for p in iterations[0].inputs if p in template.inputs and p in template.outputs}
    handed: set[str] = set()  # places that anchors take their values of
    while True:
        used, carries = _carried(template, changed, written, wanted, handed)
        renewals = {
            n: _renewed(template, other, carries, used, written, wanted, moving, n, bound)
            for n, other in sorted(iterations.items())
        }
        found = {q for renewed in renewals.values() for q, _ in renewed.values()}
        if found <= handed | set(carries):
            break
        handed |= found
    anchors: dict[str, str] = {}
    renewing: set[int] = set()
    late = 0  # 1 where anchors are renewed after the update, for the next iteration
    for n, renewed in renewals.items():
        for p, (q, _) in renewed.items():
            if anchors.setdefault(p, q) != q:
                raise NotLowerable(f"{p} takes its value from {q} and from {anchors[p]}")
        when = {int(after) for _, after in renewed.values()}
        if len(when) > 1 or (renewing and renewed and late not in when):
            raise NotLowerable("variables are renewed before and after the update of a token")
        if renewed:
            renewing.add(n)
            late = when.pop()
    if not anchors:
        last = [p for p in wanted if p in changed and p not in carries and p not in written]
        return Rolled(template, carries, {}, last, None, 0, moving, written)
    if period is None or period < 1:
        raise NotLowerable("when its anchor is renewed does not follow from the loop variable")
    offset = -(min(renewing) + late) % period
    # The anchor at the entry may be the carry without being made so.
    same = all(same_at_entry(p, q) for p, q in anchors.items())
    for n in iterations:
        due = (n + late + offset) % period == 0
        if due != (n in renewing) and not (due and n + late == 0 and same):
            raise NotLowerable("its anchor is not renewed at regular intervals")
    if offset == 0 and (late or 0 not in renewing) and not same:
        raise NotLowerable("its anchor starts from another value than its carry")
    for p in [p for p in anchors if p in carries]:
        raise NotLowerable(f"{p} is renewed by every token and by every mini-batch")
    last = [
        p for p in wanted
        if p in changed and p not in carries and p not in written and p not in anchors
    ]  # fmt: skip
    return Rolled(template, carries, anchors, last, period, offset, moving, written)


def _forget_names(template: Iteration, iterations: dict[int, Iteration]) -> None:
    """Of a tensor's names those are left that no iteration gives to another, if there are any.

    A variable that a loop inside an iteration leaves bound to a layer names what ``self.layers`` holds, too.
    """
    kept = {
        p: node
        for p, node in template.inputs.items()
        if p in iterations[0].inputs
        and all(x.outputs.get(p, ...) is x.inputs.get(p) for x in iterations.values())
    }
    held = set(kept.values())
    for p, node in list(template.inputs.items()):
        if node in held and p not in kept:
            del template.inputs[p]


def _renewed(
    template: Iteration,
    other: Iteration,
    carries: list[str],
    used: set[fx.Node],
    written: dict[str, fx.Node],
    wanted: set[str],
    moving: dict[tuple[fx.Node, Any], tuple[int, int]],
    n: int,
    bound: set[str],
) -> dict[str, tuple[str, bool]]:
    """What iteration ``n`` renews and others do not, where it does the same otherwise."""
    match = Match()
    for path, node in template.outputs.items():
        changed = node is not template.inputs.get(path)
        if not (path in carries or (changed and (path in written or path in wanted))):
            continue
        if path not in other.outputs:
            raise NotLowerable(f"{path} is not always bound")
        match.extend(node, other.outputs[path])
    for path, nodes in template.appended.items():
        if len(other.appended.get(path, ())) != len(nodes):
            raise NotLowerable(f"the list {path} does not grow by the same with every token")
        match.extend(nodes[0], other.appended[path][0])
    _check_numbers(match, moving, n)
    read = {p for p, x in template.inputs.items() if x in used}
    return _refreshes(template, other, match, carries, read, bound)


def _carried(
    template: Iteration,
    changed: list[str],
    written: dict[str, fx.Node],
    wanted: set[str],
    handed: set[str],
) -> tuple[set[fx.Node], list[str]]:
    """The nodes that matter, and the places that iterations hand to each other."""
    carries = [p for p in template.outputs if p in handed]
    while True:
        ends: list[Any] = [n for nodes in template.appended.values() for n in nodes]
        ends += [
            n for p, n in template.outputs.items() if p in carries or (p in changed and p in wanted)
        ]
        ends += [n.args[1] for n in written.values()]
        used = _ancestors([n for n in ends if n not in written.values()])
        more = [
            p
            for p in changed
            if p not in carries and p not in written and template.inputs.get(p) in used
        ]
        if not more:
            for p in written:
                if template.inputs[p] in _reads(template, used, written):
                    raise NotLowerable(f"{p} is written to and read from", source_line(written[p]))
            return used, [p for p in template.outputs if p in carries]
        carries += more


def _reads(template: Iteration, used: set[fx.Node], written: dict[str, fx.Node]) -> set[fx.Node]:
    """What is read by nodes that matter, ``copy`` aside, which takes a shape only."""
    return {
        x
        for n in used
        for x in n.all_input_nodes
        if not (n.target in INDICES and all(u.target is aten.copy.default for u in n.users))
        and n not in written.values()
    }


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        # A copy into a tensor does not read it.
        stack += node.args[1:2] if node.target is aten.copy.default else node.all_input_nodes  # type: ignore[arg-type]
    return found


def _check_numbers(match: Match, moving: dict[Any, tuple[int, int]], n: int) -> None:
    for key, (start, step) in moving.items():
        node, place = key
        if node not in match.nodes:
            continue
        want = start + step * n
        got = match.nodes[node].args[place]
        if got != want:
            raise NotLowerable(
                f"a slice moves to {got} where {want} was expected", source_line(node)
            )
    for node, place in match.numbers:
        if (node, place) not in moving:
            raise NotLowerable("a number changes from token to token", source_line(node))


def _refreshes(
    template: Iteration,
    other: Iteration,
    match: Match,
    carries: list[str],
    used: set[str],
    bound: set[str],
) -> dict[str, tuple[str, bool]]:
    """The places that an iteration renews and others do not: from which place, and whether after its update."""
    found: dict[str, tuple[str, bool]] = {}
    for p in used:
        stand_in = match.inputs.get(template.inputs[p])
        own, left = other.inputs.get(p), other.outputs.get(p)
        if p in carries:
            if stand_in is not None and stand_in is not own:
                raise NotLowerable(f"{p} is sometimes replaced", source_line(stand_in))
            continue
        if stand_in is None or stand_in is own:
            if left is None or left is own:
                continue
            sources = [q for q, x in other.outputs.items() if x is left and q != p]
            found[p] = (_source(p, left, sources, carries, bound), True)
            continue
        sources = [q for q, x in other.inputs.items() if x is stand_in]
        if left is not stand_in:
            raise NotLowerable(f"{p} is sometimes replaced", source_line(stand_in))
        found[p] = (_source(p, stand_in, sources, carries, bound), False)
    return found


def _source(p: str, value: fx.Node, places: list[str], carries: list[str], bound: set[str]) -> str:
    """The place whose value an anchor takes: a carry, or one that can be."""
    for q in places:
        if q in carries:
            return q
    for q in places:
        if q in bound:
            return q
    raise NotLowerable(f"{p} is sometimes replaced", source_line(value))
