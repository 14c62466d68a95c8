"""The torch backend of a scan: the same bodies, run by torch operations on any device and in any dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tttc.codegen.torch_ops import direct, facts
from tttc.passes.prune_state import live_states
from tttc.passes.split import Part, Split, split

from tttc.ir.body import Body, is_token, role
from tttc.ir.program import Program

Tensor = torch.Tensor


def squeeze_features(x: Tensor, lead: int) -> Tensor:
    """``x`` without its axes of size 1 after the first ``lead``, as bodies take their arguments."""
    shape = [*x.shape[:lead], *(n for n in x.shape[lead:] if n != 1)]
    return x if len(shape) == x.ndim else x.reshape(shape)


def _arguments(
    body: Body,
    anchor: Sequence[Tensor],
    carry: Sequence[Tensor],
    tokens: Sequence[Tensor],
    shared: Sequence[Tensor],
    constants: Sequence[Tensor],
) -> list[Tensor]:
    groups = {
        "anchor": anchor,
        "carry": carry,
        "token": tokens,
        "shared": shared,
        "constant": constants,
    }
    return [groups[kind][i] for kind, i in map(role, body.placeholders)]


def _group_size(state: Sequence[Tensor]) -> int:
    """Mini-batches whose outputs are made together: as many as keep their anchors within 8 MiB, near the caches."""
    bytes_each = sum(x.numel() * x.element_size() for x in state)
    return max(1, min(256, (8 << 20) // max(bytes_each, 1)))


def of_other_dtype(tokens: Sequence[Tensor], shared: Sequence[Tensor]) -> set[str]:
    """The arguments of bodies that are not cast to the dtype computed in."""
    named = {f"token_{i}": x for i, x in enumerate(tokens)}
    named |= {f"shared_{i}": x for i, x in enumerate(shared)}
    return {name for name, x in named.items() if not x.is_floating_point()}


def _split(program: Program, states: bool, others: set[str]) -> Split:
    """The full body split, its parts bound to torch operations, once."""
    if states not in program.splits:
        assert program.full is not None
        body = program.full
        outputs = range(len(body.results) - body.states)
        made = split(body, live_states(body, range(body.states) if states else [], outputs))
        known = facts(body, others)
        for part in (made.invariant, made.before, made.outputs):
            part.run = direct(part.gm, known)
        made.recurrence.run = direct(made.recurrence.gm, known, into=True)
        program.splits[states] = made
    return program.splits[states]


class _Stack:
    """One result of every mini-batch of a group in one tensor, with room before the first for what came before."""

    def __init__(self, count: int, values: Tensor | None) -> None:
        self.count = count
        self.values = torch.empty(0)
        self.places: Sequence[Tensor | None] = [None] * (count + 1)  # of mini-batch n at n + 1
        if values is not None:  # else its shape is known with the first result
            self.values, self.places = values, values.unbind(0)

    def put(self, n: int, x: Tensor) -> Tensor:
        """Keep the result of mini-batch n, unless it was written into its place; where it is kept."""
        place = self.places[n + 1]
        if place is None:
            self.values = x.new_empty((self.count + 1, *x.shape))
            self.places = self.values.unbind(0)
            place = self.places[n + 1]
        assert place is not None
        if x.data_ptr() != place.data_ptr():
            place.copy_(x)
        return place


class _Workspace:
    """What the groups of a call write to, kept from group to group: memory written once is much faster to write.

    It is one piece: allocators keep a piece of this size for the next call, where they return many small ones.
    """

    def __init__(self, program: Program, parts: Split, count: int, like: Tensor) -> None:
        assert program.full is not None
        lead, step = like.shape[:2], parts.recurrence
        sizes = program.full.sizes

        def shape(lead: tuple[int, ...], dims: Sequence[str]) -> tuple[int, ...]:
            return (*lead, *(program.unit if is_token(d) else sizes[d] for d in dims))

        shapes: dict[Any, tuple[int, ...]] = {}
        for part in (parts.before, step, parts.outputs):
            first = lead if part is step else (count, *lead)
            shapes |= {(id(part), k): shape(first, dims) for k, dims in enumerate(part.run.spaces)}
        read = {*parts.outputs.inputs, *parts.states.values()}
        self.kept = {i: name for i, name in enumerate(step.results) if name in read}
        for i, name in self.kept.items():
            if name in step.run.owned:
                shapes["stack", i] = shape((count + 1, *lead), step.run.owned[name])
        starts = [0]
        for x in shapes.values():
            starts.append(starts[-1] + -(-math.prod(x) // 64) * 64)
        memory = like.new_empty(starts[-1])
        self.made = {
            key: memory[start : start + math.prod(x)].view(x)
            for (key, x), start in zip(shapes.items(), starts, strict=False)
        }
        self.stacks = {i: _Stack(count, self.made.get(("stack", i))) for i in self.kept}

    def spaces(self, part: Part, count: int | None = None) -> list[Tensor]:
        """The memory that a part writes to, of ``count`` mini-batches."""
        found = [self.made[id(part), k] for k in range(len(part.run.spaces))]
        return found if count is None else [x[:count] for x in found]


def _run_group(
    parts: Split,
    anchor: Sequence[Tensor],
    tokens: Sequence[Tensor],
    shared: Sequence[Tensor],
    constants: Sequence[Tensor],
    space: _Workspace,
) -> tuple[list[Tensor], list[Tensor]]:
    """Mini-batches that start at their anchors: the state one after another, the rest all together.

    ``tokens``: leaves ``[N, B, H, b, ...]``, so that each mini-batch lies together and parameters ``[H, ...]`` meet
    them as they are; returns new states and outputs ``[N, B, H, b, ...]``, which lie in ``space``.
    """
    like = anchor[0]
    once = {f"shared_{i}": x for i, x in enumerate(shared)}
    once |= {f"constant_{i}": x for i, x in enumerate(constants)}
    once |= run_part(parts.invariant, once, like)
    many = once | {f"token_{i}": x.contiguous() for i, x in enumerate(tokens)}
    step, count = parts.recurrence, tokens[0].shape[0]
    many |= run_part(parts.before, many, like, space.spaces(parts.before, count))
    run, length = step.run.at(like), len(step.results)
    index = {f"anchor_{i}": i for i in range(len(anchor))}
    given: list[Any] = [
        index[name] if name in index else (once[name] if name in once else many[name].unbind(0))
        for name in step.inputs
    ]
    places = {
        i: step.results.index(name) for i, name in parts.states.items() if name in step.results
    }
    wanted = set(parts.outputs.inputs)
    left, own = space.stacks, space.spaces(step)
    states = list(anchor)
    for i, place in places.items():
        states[i] = left[place].put(-1, anchor[i])
    for n in range(count):
        arguments = [
            states[x] if isinstance(x, int) else (x[n] if isinstance(x, tuple) else x)
            for x in given
        ]
        into = [left[i].places[n + 1] if i in left else None for i in range(length)]
        results = run(*arguments, *into, *own)
        kept = {i: stack.put(n, results[i]) for i, stack in left.items()}
        for i, place in places.items():
            states[i] = kept[place]
    for name, i in index.items():
        if name in wanted:
            many[name] = left[places[i]].values[:count] if i in places else anchor[i]
    many |= {
        step.results[i]: x.values[1 : count + 1]
        for i, x in left.items()
        if step.results[i] in wanted
    }
    made = run_part(parts.outputs, many, like, space.spaces(parts.outputs, count))
    return states, [made[name] for name in parts.emitted]


def run_part(
    part: Part, values: dict[str, Tensor], like: Tensor, spaces: Sequence[Tensor] = ()
) -> dict[str, Tensor]:
    """The values a part leaves, by name, computed in the dtype of ``like``."""
    results = part.run.at(like)(*(values[x] for x in part.inputs), *spaces)
    return dict(zip(part.results, results, strict=True))


def run_program(
    program: Program,
    anchor: Sequence[Tensor],
    carry: Sequence[Tensor],
    tokens: Sequence[Tensor],
    shared: Sequence[Tensor],
    place: int,
    states: bool = True,
    saved: list[list[Tensor]] | None = None,
    interval: int = 1,
    outputs: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Scan a program over tokens.

    Args:
        program: the program; its mini-batch size is used.
        anchor, carry: state leaves ``[B, H, ...]`` in the dtype to compute in; ``carry`` empty: at the anchor.
        tokens: leaves ``[B, H, T, ...]``, T at least 1.
        shared: leaves ``[H, ...]``.
        place: tokens already read of the mini-batch.
        states: whether the final states are wanted; those returned are wrong where they are not.
        saved: where to append the state leaves at every ``interval``-th mini-batch, from the first that starts
            at its anchor; leaves that no output or wanted state needs are wrong.
        outputs: tensors ``[B, H, T, ...]`` to write the output leaves to, in any layout and dtype; else they are made.

    Returns:
        New anchor and new carry in the dtype computed in, and the output leaves.
    """
    dtype = anchor[0].dtype
    state_shapes = [x.shape for x in anchor]
    anchor = [squeeze_features(x, 2) for x in anchor]
    carry = [squeeze_features(x, 2) for x in carry] if carry else anchor
    floating = [x.to(dtype) if x.is_floating_point() else x for x in tokens]
    tokens = [squeeze_features(x, 3) for x in floating]
    shared = [squeeze_features(x.to(dtype) if x.is_floating_point() else x, 1) for x in shared]
    device = anchor[0].device
    constants = [
        x.to(device, dtype if x.is_floating_point() else x.dtype) for x in program.token.constants
    ]
    b, length = program.unit, tokens[0].shape[2]
    lead = tokens[0].shape[:2]
    others = of_other_dtype(tokens, shared)
    space: _Workspace | None = None

    def emit(made: Sequence[Tensor], start: int, units: tuple[int, ...]) -> None:
        """Write output leaves ``[B, H, *units, ...]`` from token ``start``."""
        nonlocal outputs
        shapes = program.token.output_shapes
        if outputs is None:
            outputs = [
                x.new_empty((*lead, length, *shape)) for x, shape in zip(made, shapes, strict=True)
            ]
        for z, x, shape in zip(outputs, made, shapes, strict=True):
            place = z[:, :, start : start + math.prod(units)].unflatten(2, units)
            place.copy_(x.reshape(*lead, *units, *shape))

    start = mini_batches = 0
    while start < length:
        if place == 0:
            anchor = carry
            if saved is not None and mini_batches % interval == 0:
                saved.append([x.clone() for x in carry] if space else list(carry))
            mini_batches += 1
        whole = (length - start) // b
        if program.sequential:
            body, count = program.token, 1
            now = [x[:, :, start] for x in tokens]
        elif place == 0 and whole > 1:
            group = min(whole, _group_size(anchor))
            if saved is not None:
                group = min(group, interval - (mini_batches - 1) % interval)
            mini_batches += group - 1
            count = group * b
            now = [
                x[:, :, start : start + count].unflatten(2, (group, b)).movedim(2, 0)
                for x in tokens
            ]
            parts = _split(program, states, others)
            space = space or _Workspace(program, parts, group, anchor[0])
            carry, made = _run_group(parts, anchor, now, shared, constants, space)
            emit([x.movedim(0, 2) for x in made], start, (group, b))
            start += count
            continue
        else:
            unit = program.full if place == 0 else program.continued
            assert unit is not None
            body, count = unit, min(b - place, length - start)
            now = [x[:, :, start : start + count] for x in tokens]
        results = body.gm(*_arguments(body, anchor, carry, now, shared, constants))
        carry = list(results[: body.states])
        emit(results[body.states :], start, (count,))
        start += count
        place = (place + count) % program.mini_batch_size
    if place == 0:
        anchor = carry
    assert outputs is not None

    def final(x: Tensor, shape: torch.Size) -> Tensor:
        """A state as it is handed on, which must not keep all those of a group alive."""
        x = x.expand(*lead, *x.shape[2:]).reshape(shape)
        return x.clone() if states and space else x

    new_anchor = [final(x, s) for x, s in zip(anchor, state_shapes, strict=True)]
    if place == 0:
        return new_anchor, new_anchor, list(outputs)
    new_carry = [final(x, s) for x, s in zip(carry, state_shapes, strict=True)]
    return new_anchor, new_carry, list(outputs)
