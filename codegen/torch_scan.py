"""The torch backend of a scan: the same bodies, run by torch operations on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tttc.codegen.torch_ops import direct
from tttc.passes.prune_state import live_states
from tttc.passes.split import Part, Split, split

from tttc.ir.body import Body, role
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


def _split(program: Program, states: bool) -> Split:
    """The full body split, its parts bound to torch operations, once."""
    if states not in program.splits:
        assert program.full is not None
        body = program.full
        outputs = range(len(body.results) - body.states)
        live = live_states(body, range(body.states) if states else [], outputs)
        made = split(body, live)
        for part in (made.invariant, made.before, made.outputs):
            part.gm = direct(part.gm)
        made.recurrence.gm = direct(made.recurrence.gm, into=True)
        program.splits[states] = made
    return program.splits[states]


def _run_group(
    parts: Split,
    anchor: Sequence[Tensor],
    tokens: Sequence[Tensor],
    shared: Sequence[Tensor],
    constants: Sequence[Tensor],
    stacks: dict[int, _Stack],
) -> tuple[list[Tensor], list[Tensor]]:
    """Mini-batches that start at their anchors: the state one after another, the rest all together.

    ``tokens``: leaves ``[N, B, H, b, ...]``, so that each mini-batch lies together and parameters ``[H, ...]`` meet
    them as they are; returns new states and outputs ``[N, B, H, b, ...]``. ``stacks`` is kept from group to group:
    memory that was written once already is much faster to write.
    """
    once = {f"shared_{i}": x for i, x in enumerate(shared)}
    once |= {f"constant_{i}": x for i, x in enumerate(constants)}
    once |= _run(parts.invariant, once)
    many = once | {f"token_{i}": x.contiguous() for i, x in enumerate(tokens)}
    many |= _run(parts.before, many)
    step, count = parts.recurrence, tokens[0].shape[0]
    index = {f"anchor_{i}": i for i in range(len(anchor))}
    given: list[Any] = [
        index[name] if name in index else (once[name] if name in once else many[name].unbind(0))
        for name in step.inputs
    ]
    places = {
        i: step.results.index(name) for i, name in parts.states.items() if name in step.results
    }
    states = list(anchor)
    left = {
        i: stacks.setdefault(i, _Stack(count))
        for i, name in enumerate(step.results)
        if name in parts.outputs.inputs or i in places.values()
    }
    for n in range(count):
        arguments = [
            states[x] if isinstance(x, int) else (x[n] if isinstance(x, tuple) else x)
            for x in given
        ]
        into = [left[i].place(n) if i in left else None for i in range(len(step.results))]
        results = step.gm(*arguments, *into)
        for i, stack in left.items():
            stack.put(n, results[i])
        for i, place in places.items():
            states[i] = left[place].values[n + 1]
    wanted = set(parts.outputs.inputs)
    for name, i in index.items():
        if name in wanted:
            many[name] = left[places[i]].before(anchor[i], count) if i in places else anchor[i]
    many |= {step.results[i]: x.given(count) for i, x in left.items() if step.results[i] in wanted}
    made = _run(parts.outputs, many)
    # What is handed on must not keep the states of the whole group alive.
    return [x.clone() for x in states], [made[name] for name in parts.emitted]


class _Stack:
    """One result of every mini-batch of a group in one tensor, with room before the first for what came before."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.values = torch.empty(0)  # its shape is known with the first result

    def place(self, n: int) -> Tensor | None:
        """Where the result of mini-batch n goes; None before the very first."""
        return self.values[n + 1] if self.values.numel() else None

    def put(self, n: int, x: Tensor) -> None:
        """Keep a result, unless it was written into its place."""
        if not self.values.numel():
            self.values = x.new_empty((self.count + 1, *x.shape))
        place = self.values[n + 1]
        if x.data_ptr() != place.data_ptr():
            place.copy_(x)

    def given(self, count: int) -> Tensor:
        """The results of ``count`` mini-batches."""
        return self.values[1 : count + 1]

    def before(self, first: Tensor, count: int) -> Tensor:
        """What mini-batches start from: ``first``, then the results of all but the last."""
        self.values[0] = first
        return self.values[:count]


def _run(part: Part, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(part.results, part.gm(*(values[x] for x in part.inputs)), strict=True))


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

    Returns:
        New anchor, new carry and output leaves, all in the dtype computed in.
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
    pieces: list[list[Tensor]] = []
    stacks: dict[int, _Stack] = {}
    start = mini_batches = 0
    while start < length:
        if place == 0:
            anchor = carry
            if saved is not None and mini_batches % interval == 0:
                saved.append(list(carry))
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
            parts = _split(program, states)
            carry, outputs = _run_group(parts, anchor, now, shared, constants, stacks)
            pieces.append([x.movedim(0, 2).flatten(2, 3) for x in outputs])
            start += count
            continue
        else:
            unit = program.full if place == 0 else program.continued
            assert unit is not None
            body, count = unit, min(b - place, length - start)
            now = [x[:, :, start : start + count] for x in tokens]
        results = body.gm(*_arguments(body, anchor, carry, now, shared, constants))
        carry = list(results[: body.states])
        outputs = list(results[body.states :])
        pieces.append([x.unsqueeze(2) for x in outputs] if program.sequential else outputs)
        start += count
        place = (place + count) % program.mini_batch_size
    if place == 0:
        anchor = carry
    outputs = [torch.cat(z, 2) for z in zip(*pieces, strict=True)]
    lead = tokens[0].shape[:3]
    shaped = [
        z.reshape(*lead, *shape)
        for z, shape in zip(outputs, program.token.output_shapes, strict=True)
    ]
    return (
        [
            x.expand(*lead[:2], *x.shape[2:]).reshape(s)
            for x, s in zip(anchor, state_shapes, strict=True)
        ],
        [
            x.expand(*lead[:2], *x.shape[2:]).reshape(s)
            for x, s in zip(carry, state_shapes, strict=True)
        ],
        shaped,
    )
