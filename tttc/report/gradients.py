"""Gradients of scans and of their VJPs, measured against those of the naive loop in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tttc._scan_op import interned
from tttc.ir.body import Body, role
from tttc.report.leaves import leaf_names
from tttc.report.scans import (
    Call,
    Groups,
    cast,
    given_arguments,
    reference,
    relative_error,
    stage_inputs,
)
from tttc.runtime.fused_scan import saving_interval

Tensor = torch.Tensor
GROUPS = ("anchor", "carry", "tokens", "shared")


def gradient_errors(call: Call, tokens: int) -> dict[str, float]:
    """The errors of gradients over the first ``tokens`` of the first sequence, where outputs have cotangents.

    Of initial state, tokens and parameters, by the user's names; each relative to its largest value.
    """
    first = {
        **call.arguments,
        "anchor": [x[:1] for x in call.anchor],
        "carry": [x[:1] for x in call.carry],
        "tokens": [x[:1, :, :tokens] for x in call.tokens],
    }
    skipped = 2 * len(call.anchor)  # the states

    def leaves(dtype: torch.dtype | None) -> list[list[Tensor]]:
        return [[_leaf(x) for x in cast(first[name], dtype)] for name in GROUPS]

    with torch.enable_grad():
        groups = leaves(None)
        anchor, carry, given, shared = groups
        key, size, backend = (first[k] for k in ("key", "mini_batch_size", "backend"))
        interval = saving_interval(anchor, carry, given, shared, key, size, backend)
        named = dict(zip(GROUPS, groups, strict=True))
        out = call.operator(**{**first, **named, "states": True, "interval": interval})
        outputs = len(interned(key).outputs)
        results = out[skipped : skipped + outputs]
        cotangents = [_direction(x) for x in results]
        got = _pulled_back(results, [x for g in groups for x in g], cotangents)
        groups = leaves(torch.float64)
        anchor, carry, given, shared = groups
        out = reference(anchor, carry, given, shared, key, size, first["place"])
        # The same cotangents, as rounded for the compiled scan.
        exact = [g.to(x.dtype) for g, x in zip(cotangents, out[skipped:], strict=True)]
        expected = _pulled_back(out[skipped:], [x for g in groups for x in g], exact)
    said = leaf_names(interned(key))
    names = [
        said[f"{kind}_{i}"]
        for kind, group in zip(("anchor", "carry", "token", "shared"), groups, strict=True)
        for i, x in enumerate(group)
        if x.requires_grad
    ]
    return dict(zip(names, map(relative_error, got, expected), strict=True))


def backward_inputs(stage: Body, forward: Body, groups: Groups) -> tuple[Tensor, ...]:
    """Arguments of a VJP of ``forward``: those of one mini-batch (or token), and cotangents of its outputs alone."""
    with torch.no_grad():
        results = forward.gm(*stage_inputs(forward, groups))
    given = given_arguments(forward, groups)
    given["gstate"] = [torch.zeros_like(x) for x in results[: forward.states]]
    given["goutput"] = [_direction(x) for x in results[forward.states :]]
    return tuple(given[kind][i] for kind, i in map(role, stage.placeholders))


def naive_gradients(groups: Groups, key: str, mini_batch_size: int) -> dict[str, Tensor]:
    """Gradients of a few tokens by the naive loop in float64, by name: of the state, tokens and parameters."""
    anchor, _, tokens, shared = ([_leaf(x) for x in cast(g, torch.float64)] for g in groups)
    leaves = {f"state_{i}": x for i, x in enumerate(anchor)}
    leaves |= {f"token_{i}": x for i, x in enumerate(tokens) if x.requires_grad}
    leaves |= {f"shared_{i}": x for i, x in enumerate(shared) if x.requires_grad}
    with torch.enable_grad():
        state, rows = ([x[None, None] for x in group] for group in (anchor, tokens))
        out = reference(state, [], rows, [x[None] for x in shared], key, mini_batch_size, 0)
        results = [x[0, 0] for x in out[2 * len(anchor) :]]
        cotangents = [_direction(x) for x in results]
        found = _pulled_back(results, [*leaves.values()], cotangents)
        return dict(zip(leaves, found, strict=True))


def backward_error(
    stage: Body, wanted: Sequence[str], inputs: Sequence[Tensor], expected: dict[str, Tensor]
) -> float:
    """The largest error of a VJP's cotangents against gradients by name, each relative to its largest value."""
    got: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, x in zip(wanted, stage.gm(*inputs), strict=True):
            # A mini-batch starts at its anchor: cotangents of anchor and carry both belong to the state.
            kind, _, index = name.rpartition("_")
            name = f"state_{index}" if kind in ("anchor", "carry") else name
            got[name] = got[name] + x if name in got else x
    return max(
        relative_error(x.reshape(expected[name].shape), expected[name]) for name, x in got.items()
    )


def _leaf(x: Tensor) -> Tensor:
    """A tensor of the same values that gradients are taken of, where it may have one."""
    return x.detach().clone().requires_grad_(x.is_floating_point())


def _direction(x: Tensor) -> Tensor:
    """A cotangent for a result, whoever made it."""
    # No straight line: norms take that out, and what is left is small beside its own rounding.
    waves = torch.cos(1.618 * torch.arange(x.numel(), dtype=torch.float64, device=x.device))
    return waves.to(x.dtype).view(x.shape)


def _pulled_back(
    results: Sequence[Tensor], leaves: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor]:
    """The gradients of the floating leaves."""
    pairs = [(x, g) for x, g in zip(results, cotangents, strict=True) if x.requires_grad]
    wanted = [x for x in leaves if x.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in wanted]
    reached, given = zip(*pairs, strict=True)
    return list(
        torch.autograd.grad(reached, wanted, given, allow_unused=True, materialize_grads=True)
    )
