"""Translation validation: run a graph before and after a pass, in float64 on random inputs, and compare."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from tttc.passes.backward import Backward

from tttc.ir.body import TOKEN, Body, role
from tttc.ir.build import dims_of
from tttc.ir.errors import CheckError

TOLERANCE = 1e-9
# A VJP may be derived inside an operator, where autograd is switched off: it is checked as if outside.
_EAGER = (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())


def random_arguments(
    body: Body, length: int | None = None, at_anchor: bool = False, seed: int = 0
) -> list[torch.Tensor]:
    """Random float64 arguments for a body; ``length`` tokens where it is batched or tokens are asked for."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[tuple[str, int], torch.Tensor] = {}
    for node in body.placeholders:
        kind, index = role(node)
        if kind == "constant":
            made[kind, index] = body.constants[index].to(torch.float64)
            continue
        if kind == "carry" and at_anchor:
            made[kind, index] = made["anchor", index]
            continue
        shape = [body.sizes[d] for d in dims_of(node) if d != TOKEN]
        if kind == "token" and length is not None:
            shape.insert(0, length)
        # Scaled like weights and activations are: away from overflow, of both signs.
        scale = 0.5 if kind in ("token", "shared") else 0.3
        made[kind, index] = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return [made[role(n)] for n in body.placeholders]


def run_tokens(body: Body, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A one-token body run over tokens, one after another: new carry, then outputs stacked."""
    kinds = [role(n)[0] for n in body.placeholders]
    length = next(x.shape[0] for x, k in zip(arguments, kinds, strict=True) if k == "token")
    values = list(arguments)
    carries = [i for i, k in enumerate(kinds) if k == "carry"]
    outputs = []
    for t in range(length):
        now = [x[t] if k == "token" else x for x, k in zip(values, kinds, strict=True)]
        results = body.gm(*now)
        for i, x in zip(carries, results[: body.states], strict=True):
            values[i] = x
        outputs.append(results[body.states :])
    stacked = [torch.stack(z) for z in zip(*outputs, strict=True)]
    return [values[i] for i in carries] + stacked


def compare(name: str, expected: Sequence[Any], got: Sequence[Any]) -> None:
    """Raise :class:`CheckError` where results differ by more than 1e-9, relative to their size."""
    if len(expected) != len(got):
        raise CheckError(f"{name}: {len(expected)} results before, {len(got)} after")
    for i, (x, y) in enumerate(zip(expected, got, strict=True)):
        if x.shape != y.shape:
            raise CheckError(f"{name}: result {i} had shape {tuple(x.shape)}, has {tuple(y.shape)}")
        finite = x.isfinite()
        if not torch.equal(finite, y.isfinite()):
            raise CheckError(f"{name}: result {i} is finite elsewhere than before")
        scale = float(x[finite].abs().max()) if finite.any() else 0.0
        error = float((x[finite] - y[finite]).abs().max()) if finite.any() else 0.0
        if error > TOLERANCE * max(1.0, scale):
            raise CheckError(
                f"{name}: result {i} changed by {error:.3g} (values up to {scale:.3g})"
            )


def verify_pass(
    name: str, before: Body | fx.GraphModule, after: Body, mini_batch_size: int, at_anchor: bool
) -> None:
    """Check one pass: the graph before it and the graph after it must compute the same."""
    for length in sorted({1, min(3, mini_batch_size), mini_batch_size}):
        if not after.batched:
            arguments = random_arguments(after, at_anchor=at_anchor)
            run = before.gm if isinstance(before, Body) else copy.deepcopy(before).double()
            padded = [x.reshape(after.leaf_shapes.get(str(n.target), x.shape))
                      for x, n in zip(arguments, after.placeholders, strict=True)]  # fmt: skip
            inputs = (
                arguments
                if isinstance(before, Body)
                else [
                    x
                    for x, n in zip(padded, after.placeholders, strict=True)
                    if role(n)[0] != "constant"
                ]
            )
            expected = [x.squeeze() if not isinstance(before, Body) else x for x in run(*inputs)]
            got = [x.squeeze() if not isinstance(before, Body) else x for x in after.gm(*arguments)]
            compare(name, expected, got)
            return
        arguments = random_arguments(after, length, at_anchor)
        assert isinstance(before, Body)
        old = before.gm(*arguments) if before.batched else run_tokens(before, arguments)
        compare(name, old, after.gm(*arguments))


def verify_tiles(before: Body, after: Body, tile: Any) -> None:
    """Check that a body for the tokens of a tile computes what the step of the tile does."""
    arguments = random_arguments(after, tile.size, True)
    given = [x for x, n in zip(arguments, after.placeholders, strict=True)]
    named = {str(n.target): x for x, n in zip(given, after.placeholders, strict=True)}
    old = []
    for node in before.placeholders:
        x = named.get(str(node.target))
        if x is None:
            x = before.constants[role(node)[1]].to(torch.float64)
        elif role(node)[0] == "token":
            x = _moved(x, before.leaf_shapes[str(node.target)], tile.tokens[role(node)[1]])
        old.append(x)
    states, outputs = before.gm(*old)[: before.states], before.gm(*old)[before.states :]
    shapes = zip(outputs, before.output_shapes, tile.outputs, strict=True)
    flat = [x.reshape(shape).movedim(axis, 0).squeeze() for x, shape, axis in shapes]
    got = after.gm(*arguments)
    compare(
        "tiles",
        [*states, *flat],
        [*got[: after.states], *(x.squeeze() for x in got[after.states :])],
    )


def _moved(x: torch.Tensor, shape: Sequence[int], axis: int) -> torch.Tensor:
    """Tokens ``[t, ...]`` as a tile has them."""
    rest = [s for i, s in enumerate(shape) if i != axis]
    return x.reshape(len(x), *rest).movedim(0, axis).reshape([s for s in shape if s != 1])


def verify_backward(name: str, body: Body, made: Backward, at_anchor: bool) -> None:
    """Check a VJP against torch's autograd through the body itself."""
    names = [str(n.target) for n in body.placeholders]
    results = [f"gstate_{i}" for i in range(body.states)]
    results += [f"goutput_{i}" for i in range(len(body.results) - body.states)]
    given = [str(n.target) for n in made.body.placeholders if str(n.target) in results]
    for length in (1, 3) if body.batched else (None,):
        arguments = random_arguments(body, length, at_anchor)
        leaves = {n: x.clone().requires_grad_() for n, x in zip(names, arguments, strict=True)}
        with torch.enable_grad(), torch._C._ForceDispatchKeyGuard(*_EAGER):
            out = dict(zip(results, body.gm(*leaves.values()), strict=True))
        generator = torch.Generator().manual_seed(1)
        cotangents = {
            n: torch.randn(out[n].shape, generator=generator, dtype=out[n].dtype) for n in given
        }
        reached = [n for n in given if out[n].requires_grad]
        expected = torch.autograd.grad(
            [out[n] for n in reached],
            [leaves[n] for n in made.wanted],
            [cotangents[n] for n in reached],
            allow_unused=True,
            materialize_grads=True,
        )
        values = dict(zip(names, arguments, strict=True)) | cotangents
        got = made.body.gm(*(values[str(n.target)] for n in made.body.placeholders))
        compare(name, expected, got)
