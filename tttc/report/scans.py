"""Running the stages of a scan on what a model really gave it, and measuring them against the naive loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tttc._scan_op import interned, run_naive
from tttc.codegen.torch_scan import run_program, squeeze_features
from tttc.ir.body import Body, role
from tttc.ir.program import Program
from tttc.pipeline import build_program

Tensor = torch.Tensor
Groups = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
SCANS = (torch.ops.tttc.scan.default, torch.ops.tttc.fused_scan.default)


@dataclass(frozen=True)
class Call:
    """The arguments of one scan as it ran, by name: state leaves ``[B, H, ...]``, tokens ``[B, H, T, ...]``."""

    operator: Any
    arguments: dict[str, Any]

    @property
    def anchor(self) -> list[Tensor]:
        return self.arguments["anchor"]

    @property
    def carry(self) -> list[Tensor]:
        return self.arguments["carry"]

    @property
    def tokens(self) -> list[Tensor]:
        return self.arguments["tokens"]

    @property
    def shared(self) -> list[Tensor]:
        return self.arguments["shared"]

    @property
    def key(self) -> str:
        return self.arguments["key"]

    @property
    def mini_batch_size(self) -> int:
        return self.arguments["mini_batch_size"]

    @property
    def lowered(self) -> bool:
        """Whether it is compiled, not the naive loop."""
        return self.operator is torch.ops.tttc.fused_scan.default

    @property
    def empty(self) -> bool:
        """Whether there is no token to read."""
        return 0 in self.tokens[0].shape[:3]

    @property
    def length(self) -> int:
        """How many tokens it reads."""
        return self.tokens[0].shape[2]

    def run(self, tokens: int) -> list[Tensor]:
        """States and outputs, of the first ``tokens``."""
        given = {**self.arguments, "tokens": [x[:, :, :tokens] for x in self.tokens]}
        if "states" in given:
            given["states"] = True  # also where the model doesn't read them
        with torch.no_grad():
            return list(self.operator(**given))

    def naive(self, tokens: int) -> list[Tensor]:
        """The same by the naive loop in float64."""
        anchor, carry, shared = (
            cast(x, torch.float64) for x in (self.anchor, self.carry, self.shared)
        )
        given = cast([x[:, :, :tokens] for x in self.tokens], torch.float64)
        with torch.no_grad():
            place = self.arguments["place"]
            return reference(anchor, carry, given, shared, self.key, self.mini_batch_size, place)

    def naive_rule(self, tokens: int, mini_batch_size: int) -> list[Tensor]:
        """The same by the rule that this scan approximates, at its own mini-batch size."""
        key = interned(self.key).of or self.key
        own = Call(
            self.operator, {**self.arguments, "key": key, "mini_batch_size": mini_batch_size}
        )
        return own.naive(tokens)


def reference(anchor, carry, tokens, shared, key, mini_batch_size, place) -> list[Tensor]:
    """A scan token by token: the naive loop or, of an approximation, which no Python says, its one-token body."""
    entry = interned(key)
    if entry.of is None:
        return run_naive(anchor, carry, tokens, shared, key, mini_batch_size, place)
    token = build_program(entry, mini_batch_size).token
    program = Program(key, mini_batch_size, token)
    groups = run_program(program, anchor, carry, tokens, shared, place % mini_batch_size)
    return [x for group in groups for x in group]


class _Collect(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.calls: dict[tuple[str, int], Call] = {}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in SCANS:
            names = (a.name for a in target._schema.arguments)
            call = Call(target, {**dict(zip(names, args, strict=False)), **kwargs})
            self.calls.setdefault((call.key, call.mini_batch_size), call)
        return super().call_function(target, args, kwargs)


def collect_calls(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[tuple[str, int], Call]:
    """The first call of each distinct scan of a graph, by step and mini-batch size, when it runs on ``inputs``."""
    collector = _Collect(gm)
    with torch.no_grad():
        collector.run(*inputs)
    return collector.calls


def cast(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """The tensors, floating ones in ``dtype`` (None: as they are)."""
    return [x.to(dtype) if dtype is not None and x.is_floating_point() else x for x in tensors]


def one_head(call: Call, count: int) -> Groups:
    """State, ``count`` tokens, and parameters of the first head of the first sequence, no such axes left.

    They start at their anchor: (anchor, carry, tokens, shared) with equal anchor and carry.
    """
    state = [x[0, 0].detach() for x in (call.carry or call.anchor)]
    state = cast(state, torch.promote_types(state[0].dtype, torch.float32))
    tokens = cast([x[0, 0, :count].detach() for x in call.tokens], state[0].dtype)
    return state, state, tokens, cast([x[0].detach() for x in call.shared], state[0].dtype)


def stage_inputs(stage: Body | fx.GraphModule, groups: Groups) -> tuple[Tensor, ...]:
    """Arguments of a stage: one mini-batch of one head, or its first token where it handles one token."""
    if not isinstance(stage, Body):
        anchor, carry, tokens, shared = groups
        return (*anchor, *carry, *(x[0] for x in tokens), *shared)
    given = given_arguments(stage, groups)
    return tuple(given[kind][i] for kind, i in map(role, stage.placeholders))


def given_arguments(stage: Body, groups: Groups) -> dict[str, list[Tensor]]:
    """The arguments of a body by kind, axes of size 1 squeezed away."""
    anchor, carry, tokens, shared = groups
    lead = 1 if stage.batched else 0
    return {
        "anchor": [squeeze_features(x, 0) for x in anchor],
        "carry": [squeeze_features(x, 0) for x in carry],
        "token": [squeeze_features(x if lead else x[0], lead) for x in tokens],
        "shared": [squeeze_features(x, 0) for x in shared],
        "constant": cast(stage.constants, anchor[0].dtype),
    }


def stage_error(
    stage: Body | fx.GraphModule, groups: Groups, expected: Sequence[Tensor], mini_batch_size: int
) -> float:
    """The largest error of a stage's carry and outputs over some tokens, relative to the largest value."""
    anchor, carry, tokens, shared = groups
    states, length = len(anchor), tokens[0].shape[0]
    if isinstance(stage, Body) and stage.batched:
        got = list(_module(stage)(*stage_inputs(stage, groups)))
    else:
        outputs: list[list[Tensor]] = []
        now = list(carry)
        for t in range(length):
            anchor = now if t % mini_batch_size == 0 else anchor
            inputs = stage_inputs(stage, (anchor, now, [x[t : t + 1] for x in tokens], shared))
            results = list(_module(stage)(*inputs))
            now = [x.reshape(c.shape) for x, c in zip(results, carry, strict=False)]
            outputs.append(results[states:])
        got = [*now, *(torch.stack(z) for z in zip(*outputs, strict=True))]
    return max(relative_error(x.reshape(y.shape), y) for x, y in zip(got, expected, strict=True))


def naive_mini_batch(groups: Groups, key: str, mini_batch_size: int) -> list[Tensor]:
    """Carry and outputs of the tokens of ``groups`` by the naive loop in float64, of the step with this key."""
    anchor, _, tokens, shared = (cast(x, torch.float64) for x in groups)
    leading: list[list[Tensor]] = [[x[None, None] for x in anchor], [x[None, None] for x in tokens]]
    params = [x[None] for x in shared]
    with torch.no_grad():
        out = reference(leading[0], [], leading[1], params, key, mini_batch_size, 0)
    return [x[0, 0] for x in out[len(anchor) :]]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value (or 1, if that is smaller than 1e-30)."""
    if not expected.numel():
        return 0.0
    wide = expected.detach().to(torch.float64)
    scale = float(wide.abs().max())
    return float((got.detach().to(torch.float64) - wide).abs().max()) / (
        scale if scale > 1e-30 else 1.0
    )


def source_of_step(key: str) -> str | None:
    """File and line of the user's step."""
    code = getattr(interned(key).step, "__code__", None)
    return None if code is None else f"{code.co_filename}:{code.co_firstlineno}"


def _module(stage: Body | fx.GraphModule) -> fx.GraphModule:
    return stage.gm if isinstance(stage, Body) else stage
