"""The torch backend of a scan's backward: mini-batches from the last to the first, states recomputed in groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tttc.codegen.torch_ops import Facts, direct, facts
from tttc.codegen.torch_scan import of_other_dtype, run_part, squeeze_features
from tttc.passes.backward import Backward, backward
from tttc.passes.prune_state import live_states
from tttc.passes.simplify import simplify
from tttc.passes.split import Part, Split, split
from tttc.passes.sums import sums
from tttc.passes.verify import verify_backward

from tttc.ir.body import Body, role
from tttc.ir.build import dims_of
from tttc.ir.cost import element_count
from tttc.ir.program import Program

Tensor = torch.Tensor
Values = dict[str, Tensor]
LEAST_INTERVAL = 8  # mini-batches that are recomputed and reversed together, at least
Leaves = tuple[
    str, ...
]  # token and shared leaves whose cotangents are wanted: ("token_0", "shared_1")


# -- what is derived from a program, once --------------------------------------------------------------


def derive(
    program: Program,
    part: str,
    leaves: Leaves,
    live: tuple[int, ...] | None = None,
    onto: tuple[int, ...] | None = None,
) -> Backward:
    """The simplified VJP of a body of a program ("full", "continued" or "token").

    ``live``: the states that have cotangents, all where None; ``onto``: those whose cotangents are handed on, the same
    where None. These come first in ``wanted``; then, where anchors are not those, the cotangents of all anchors.
    """
    key = (part, leaves, live, onto)
    if key not in program.gradients:
        body: Body = getattr(program, part)
        handed_on = "anchor" if part == "full" else "carry"
        onto = live if onto is None else onto
        states = [f"{handed_on}_{i}" for i in (range(body.states) if onto is None else onto)]
        if part == "continued":
            states = [f"carry_{i}" for i in range(body.states)]
        if part == "continued" or (part == "token" and program.mini_batch_size > 1):
            states += [f"anchor_{i}" for i in range(body.states)]
        made = backward(body, [*states, *leaves], live)
        made.body = sums(simplify(made.body))
        if program.verified:
            verify_backward(f"backward of {part}", body, made, at_anchor=part == "full")
        program.gradients[key] = made
    return program.gradients[key]


def live_cotangents(program: Program, leaves: Leaves, given: Iterable[int]) -> tuple[int, ...]:
    """The states that come to have cotangents, where those ``given`` have them after the last token."""
    live = tuple(sorted(given))
    key = ("live", leaves, live)
    while key not in program.gradients:
        part = "token" if program.sequential else "full"
        body: Body = getattr(program, part)
        states = [f"{kind}_{i}" for kind in ("anchor", "carry") for i in range(body.states)]
        made = backward(body, states, live)
        found = {int(name.rpartition("_")[2]) for name in states if name not in made.zero}
        more = tuple(sorted(found.union(live)))
        if more == live:
            program.gradients[key] = live
        live = more
    return program.gradients[key]


def saved_leaves(program: Program, leaves: Leaves) -> list[int]:
    """The state leaves the backward must know: those it reads, and those needed to compute them again."""
    key = ("saved", leaves)
    if key not in program.gradients:  # asked for several times a call
        part = "token" if program.sequential else "full"
        used = {
            role(n)[1] for n in derive(program, part, leaves).body.placeholders
            if role(n)[0] in ("anchor", "carry") and n.users
        }  # fmt: skip
        program.gradients[key] = sorted(live_states(getattr(program, part), used, []))
    return program.gradients[key]


def save_interval(program: Program, leaves: Leaves, token_bytes: int, state_bytes: int) -> int:
    """How many mini-batches apart states are saved: they then take no more bytes than the tokens do.

    ``token_bytes``: of all token leaves of one token; ``state_bytes``: of one number of a state. At least as many
    as the torch operations of a backward are worth running at once for.
    """
    if program.save_interval is not None:
        return program.save_interval
    state = saved_bytes(program, leaves, state_bytes)
    return max(LEAST_INTERVAL, math.ceil(state / (program.unit * token_bytes)))


def saved_bytes(program: Program, leaves: Leaves, state_bytes: int) -> int:
    """The bytes of what is saved of one state; ``state_bytes``: of one number."""
    dims = {str(n.target): dims_of(n) for n in program.token.placeholders}
    return state_bytes * sum(
        element_count(dims[f"carry_{i}"], program.token.sizes)
        for i in saved_leaves(program, leaves)
    )


def _bound(parts: Split, known: Facts) -> Split:
    for part in (parts.invariant, parts.before, parts.recurrence, parts.outputs):
        part.run = direct(part.gm, known)
    return parts


def _forward_parts(program: Program, live: list[int], others: set[str]) -> Split:
    key = ("recompute", tuple(live))
    if key not in program.gradients:
        body = program.token if program.sequential else program.full
        assert body is not None
        program.gradients[key] = _bound(split(body, live), facts(body, others))
    return program.gradients[key]


def _backward_parts(
    program: Program, part: str, leaves: Leaves, live: tuple[int, ...], others: set[str]
) -> Split:
    key = ("parts", part, leaves, live)
    if key not in program.gradients:
        body = derive(program, part, leaves, live).body
        known = ("token", "goutput", "anchor", "carry")
        parts = split(body, range(body.states), ("gstate",), known)
        program.gradients[key] = _bound(parts, facts(body, others))
    return program.gradients[key]


# -- running units (mini-batches, or tokens) -----------------------------------------------------------


@dataclass
class _Call:
    """What stays the same over a backward."""

    program: Program
    leaves: Leaves
    live: list[int]  # the state leaves to compute again
    given: tuple[int, ...]  # the states that have cotangents
    once: Values  # shared leaves [H, ...] and constants [1, ...]
    others: set[str]  # arguments of another dtype than the one computed in
    like: Tensor  # one of that


@dataclass
class _Units:
    """Mini-batches (or tokens) and the states they start from."""

    tokens: list[Tensor]  # [B, H, N, b, ...], or [B, H, N, ...] of one-token bodies
    states: list[Values]  # of each: "anchor_0", "carry_0", ...
    end: Values  # the states after the last

    def varying(self, wanted: set[str]) -> Values:
        """The arguments that differ from unit to unit, ``[B, H, N, ...]``."""
        found = {f"token_{i}": x for i, x in enumerate(self.tokens)}
        names = [name for name in self.states[0] if name in wanted]
        return found | {name: torch.stack([x[name] for x in self.states], 2) for name in names}


def _prepare(parts: Split, once: Values, varying: Values, like: Tensor) -> tuple[Values, Values]:
    """All that waits for no state: values of parameters alone, and those of every unit ``[B, H, N, ...]``."""
    once = once | run_part(parts.invariant, once, like)
    many = {k: x.unsqueeze(1) for k, x in once.items()} | varying
    return once, many | run_part(parts.before, many, like)


def _columns(part: Part, once: Values, many: Values, count: int) -> list[Sequence[Tensor] | None]:
    """The arguments of a recurrence for each unit, None where they are carried."""
    found: list[Sequence[Tensor] | None] = []
    for name in part.inputs:
        if name in once:
            found.append([once[name]] * count)
        else:
            found.append(many[name].unbind(2) if name in many else None)
    return found


def _arguments(part: Part, columns: list[Any], n: int, carried: Values) -> list[Tensor]:
    return [
        carried[name] if column is None else column[n]
        for name, column in zip(part.inputs, columns, strict=True)
    ]


def _with_states(
    call: _Call, anchor: list[Tensor], carry: list[Tensor], tokens: list[Tensor], place: int
) -> _Units:
    """Units with the states they start from, computed anew; only live leaves are right."""
    program = call.program
    parts = _forward_parts(program, call.live, call.others)
    varying = {f"token_{i}": x for i, x in enumerate(tokens)}
    once, many = _prepare(parts, call.once, varying, call.like)
    step, count = parts.recurrence, tokens[0].shape[2]
    columns, run = _columns(step, once, many, count), step.run.at(call.like)
    places = {i: step.results.index(name) for i, name in parts.states.items()}
    states = []
    for n in range(count):
        if not program.sequential or (place + n) % program.mini_batch_size == 0:
            anchor = carry
        now = _named(anchor, carry)
        states.append(now)
        results = run(*_arguments(step, columns, n, now))
        carry = [results[places[i]] if i in places else x for i, x in enumerate(carry)]
    return _Units(tokens, states, _named(anchor, carry))


def _named(anchor: Sequence[Tensor], carry: Sequence[Tensor]) -> Values:
    return {f"anchor_{i}": x for i, x in enumerate(anchor)} | {
        f"carry_{i}": x for i, x in enumerate(carry)
    }


@dataclass
class _Cotangents:
    """The cotangents of the state, as the reverse scan hands them on."""

    anchor: list[Tensor | None]
    carry: list[Tensor]

    def refresh(self) -> None:
        """The anchor was set to the carry here: the carry takes both cotangents."""
        self.carry = [
            g if a is None else g + a for g, a in zip(self.carry, self.anchor, strict=True)
        ]
        self.anchor = [None] * len(self.anchor)


def _reverse(
    call: _Call, part: str, units: _Units, given: list[Tensor], state: _Cotangents, place: int
) -> dict[str, Tensor]:
    """Units from the last to the first: ``state`` is moved to their start.

    ``given``: cotangents of outputs, shaped like tokens. Returns the cotangents of the wanted leaves, of tokens
    ``[B, H, N, ...]``, of shared leaves ``[H, ...]``.
    """
    program = call.program
    parts = _backward_parts(program, part, call.leaves, call.given, call.others)
    made = derive(program, part, call.leaves, call.given)
    handed_on = "anchor" if part == "full" else "carry"
    names = {x for p in (parts.before, parts.recurrence, parts.outputs) for x in p.inputs}
    varying = units.varying(names) | {f"goutput_{i}": x for i, x in enumerate(given)}
    once, many = _prepare(parts, call.once, varying, call.like)
    step, count = parts.recurrence, len(units.states)
    columns, run = _columns(step, once, many, count), step.run.at(call.like)
    kept = [name for name in parts.outputs.inputs if name not in many]
    left: dict[str, list[Tensor]] = {name: [] for name in kept}
    for n in reversed(range(count)):
        now = {f"gstate_{i}": x for i, x in enumerate(state.carry)}
        results = dict(zip(step.results, run(*_arguments(step, columns, n, now)), strict=True))
        for name, values in left.items():
            values.append(now[name] if name in now else results[name])
        for position, name in parts.states.items():
            kind, _, index = made.wanted[position].rpartition("_")
            if kind == handed_on:
                state.carry[int(index)] = results[name]
            else:
                before = state.anchor[int(index)]
                state.anchor[int(index)] = (
                    results[name] if before is None else before + results[name]
                )
        if part == "full" or (part == "token" and (place + n) % program.mini_batch_size == 0):
            state.refresh()
    many |= {name: torch.stack(values[::-1], 2) for name, values in left.items()}
    emitted = run_part(parts.outputs, many, call.like)
    lead = (*units.tokens[0].shape[:2], count)
    out = {}
    for name, node in zip(made.wanted, made.body.results, strict=True):
        if name in call.leaves:
            x = emitted[node.name]
            x = x.expand(*lead, *x.shape[x.ndim - len(dims_of(node)) :])
            out[name] = x if name.startswith("token") else x.sum((0, 2))
    return out


# -- the whole sequence --------------------------------------------------------------------------------


def run_backward(
    program: Program,
    leaves: Leaves,
    anchor: Sequence[Tensor],
    carry: Sequence[Tensor],
    tokens: Sequence[Tensor],
    shared: Sequence[Tensor],
    place: int,
    given: tuple[Sequence[Tensor | None], Sequence[Tensor | None], Sequence[Tensor | None]],
    live: list[int],
    saved: Sequence[Tensor],
    interval: int,
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """The cotangents of a scan's arguments.

    Args:
        program: the program; its mini-batch size is used.
        leaves: token and shared leaves whose cotangents are wanted.
        anchor, carry, tokens, shared, place: as :func:`tttc.codegen.torch_scan.run_program` takes them.
        given: cotangents of new anchor, new carry and outputs; None for none.
        live: the state leaves that the backward must know, of :func:`saved_leaves`.
        saved: leaf after leaf of ``live``, the states ``[B, H, S, ...]`` at every ``interval``-th
            mini-batch from the first that starts at its anchor; empty where they are to be computed again.
        interval: how many mini-batches are recomputed at a time.

    Returns:
        Cotangents of anchor and of carry (both where ``carry`` is empty: that of the anchor is their sum, and
        the list of the other empty), in the dtype computed in; and of the ``leaves``, tokens ``[B, H, T, ...]``,
        squeezed as bodies take them.
    """
    dtype, device = anchor[0].dtype, anchor[0].device
    b, length = program.unit, tokens[0].shape[2]
    now_anchor = [squeeze_features(x, 2) for x in anchor]
    now_carry = [squeeze_features(x.to(dtype), 2) for x in carry] if carry else now_anchor

    def prepared(x: Tensor, lead: int) -> Tensor:
        return squeeze_features(x.to(dtype) if x.is_floating_point() else x, lead)

    rows = [prepared(x, 3) for x in tokens]
    once = {f"shared_{i}": prepared(x, 1) for i, x in enumerate(shared)}
    once |= {
        f"constant_{i}": prepared(x.to(device)[None], 1)
        for i, x in enumerate(program.token.constants)
    }
    given_states = {i for group in given[:2] for i, x in enumerate(group) if x is not None}
    cotangent_states = live_cotangents(program, leaves, given_states)
    others = of_other_dtype(tokens, shared)
    call = _Call(program, leaves, live, cotangent_states, once, others, anchor[0])

    def filled(x: Tensor | None, like: Tensor) -> Tensor:
        return torch.zeros_like(like) if x is None else x.to(dtype).reshape(like.shape)

    anchors, carries, outputs = given
    state = _Cotangents(
        [None if x is None else filled(x, y) for x, y in zip(anchors, now_anchor, strict=True)],
        [filled(x, y) for x, y in zip(carries, now_carry, strict=True)],
    )
    cotangents = [
        squeeze_features(
            tokens[0].new_zeros((*tokens[0].shape[:3], *shape), dtype=dtype) if x is None else x.to(dtype), 3
        )
        for x, shape in zip(outputs, program.token.output_shapes, strict=True)
    ]  # fmt: skip
    if (place + length) % program.mini_batch_size == 0:
        state.refresh()

    out = {
        name: torch.empty_like(rows[int(name[6:])]) for name in leaves if name.startswith("token")
    }
    sums: dict[str, Tensor] = {}

    def reverse(part: str, start: int, count: int, units: _Units, place: int) -> None:
        """Units over ``count`` tokens from ``start``."""
        whole = slice(start, start + count)
        shaped = (count // len(units.states),) if part != "token" else ()
        pieces = [
            x[:, :, whole].unflatten(2, (-1, *shaped)) if shaped else x[:, :, whole]
            for x in cotangents
        ]
        found = _reverse(call, part, units, pieces, state, place)
        for name, x in found.items():
            if name in out:
                out[name][:, :, whole] = x.flatten(2, 3) if shaped else x
            else:
                sums[name] = sums[name] + x if name in sums else x

    first = min((-place) % b, length)
    groups = [(x, min(interval * b, length - x)) for x in range(first, length, interval * b)]
    starts = [
        {i: prepared(saved[k][:, :, g].reshape(anchor[i].shape), 2) for k, i in enumerate(call.live)}
        for g in range(len(groups))
    ] if saved else _starts(call, now_anchor, now_carry, rows, place, first, groups)  # fmt: skip
    for (start, count), known in zip(reversed(groups), reversed(starts), strict=True):
        at = [known.get(i, x) for i, x in enumerate(now_anchor)]
        piece = [x[:, :, start : start + count] for x in rows]
        if program.sequential:
            reverse("token", start, count, _with_states(call, at, at, piece, 0), 0)
            continue
        whole, rest = divmod(count, b)
        end = _named(at, at)
        units = None
        if whole:
            many = [x[:, :, : whole * b].unflatten(2, (whole, b)) for x in piece]
            units = _with_states(call, at, at, many, 0)
            end = units.end | {f"anchor_{i}": units.end[f"carry_{i}"] for i in range(len(at))}
        if rest:
            tail = [x[:, :, whole * b :].unsqueeze(2) for x in piece]
            reverse("full", start + whole * b, rest, _Units(tail, [end], {}), 0)
        if units is not None:
            reverse("full", start, whole * b, units, 0)
    if first:
        piece = [x[:, :, :first] for x in rows]
        if program.sequential:
            reverse(
                "token", 0, first, _with_states(call, now_anchor, now_carry, piece, place), place
            )
        else:
            units = _Units([x.unsqueeze(2) for x in piece], [_named(now_anchor, now_carry)], {})
            reverse("continued", 0, first, units, place)

    def shaped_like(x: Tensor, like: Tensor) -> Tensor:
        return x.expand(like.shape[:2] + x.shape[2:]).reshape(like.shape)

    if not carry:
        state.refresh()
    by_anchor = [
        torch.zeros_like(g) if a is None else a
        for a, g in zip(state.anchor, state.carry, strict=True)
    ]
    to_anchor = [
        shaped_like(x, y) for x, y in zip(by_anchor if carry else state.carry, anchor, strict=True)
    ]
    to_carry = (
        [shaped_like(x, y) for x, y in zip(state.carry, carry, strict=False)] if carry else []
    )
    return to_anchor, to_carry, out | sums


def _starts(
    call: _Call,
    anchor: list[Tensor],
    carry: list[Tensor],
    rows: list[Tensor],
    place: int,
    first: int,
    groups: list[tuple[int, int]],
) -> list[dict[int, Tensor]]:
    """The live states at the start of every group, computed again from the first."""
    if first and groups:
        carry = _advanced(call, anchor, carry, [x[:, :, :first] for x in rows], place)
    starts = []
    for start, count in groups:
        starts.append({i: carry[i] for i in call.live})
        if start + count < rows[0].shape[2]:
            piece = [x[:, :, start : start + count] for x in rows]
            carry = _advanced(call, carry, carry, piece, 0)
    return starts


def _advanced(
    call: _Call, anchor: list[Tensor], carry: list[Tensor], piece: list[Tensor], place: int
) -> list[Tensor]:
    """The carry after some tokens: whole mini-batches, or the rest of one."""
    program, b = call.program, call.program.unit
    if program.sequential:
        end = _with_states(call, anchor, carry, piece, place).end
    elif place == 0:
        end = _with_states(call, anchor, carry, [x.unflatten(2, (-1, b)) for x in piece], 0).end
    else:
        body = program.continued
        assert body is not None
        given = _named(anchor, carry) | call.once | {f"token_{i}": x for i, x in enumerate(piece)}
        results = body.gm(*(given[str(n.target)] for n in body.placeholders))
        return list(results[: body.states])
    return [end[f"carry_{i}"] for i in range(len(carry))]
