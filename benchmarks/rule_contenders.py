"""The rules of examples/rules by tttc, and what peers they have, as functions to time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from peers.lact import lact
from peers.titans import mini_batch, titans
from rule_cases import SIZES, rule_case
from scans import Case
from timing import relative
from torch.utils import _pytree as pytree

import tttc

Run = Callable[[], Any]
PEERS = (
    "inductor" if torch.cuda.is_available() else "aot_eager"
)  # on a CPU all there is to see is that they run


@dataclass(frozen=True)
class Sizes:
    """What is measured at which size."""

    batch: int = 8
    length: int = 4096
    heads: int = 16
    d: int = 64
    chunk: int = 2048
    naive: int = 64  # tokens of what could not take all
    checked: tuple[int, int] = (1, 2)  # sequences and heads compared with float64
    seconds: float = 3.0  # of timing a comparison

    @property
    def shape(self) -> str:
        return f"B{self.batch} H{self.heads} T{self.length} d{self.d}"

    def case(self, name: str) -> Case:
        """The inputs of a rule."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        changes = {"c": self.chunk} if "c" in SIZES[name] else {}
        return rule_case(
            name, self.batch, self.length, self.heads, self.d, device=device, dtype=dtype, **changes
        )


QUICK = Sizes(2, 64, 2, 16, 32, 16, (1, 1), 0.0)


@dataclass(frozen=True)
class Contender:
    """Something to time, in both directions; ``length``: of the tokens it takes, None for all.

    ``tunes``: it times schedules when it first runs, for which it needs the machine to itself.
    """

    forward: Run
    training: Run
    length: int | None = None
    tunes: bool = False


def compiled(case: Case, backend: str = "auto") -> Callable[..., torch.Tensor]:
    """The outputs of a case's scan, compiled, as a function of (init, tokens, shared)."""
    step, b = case.step, case.mini_batch_size

    def run(init: Any, tokens: Any, shared: Any) -> torch.Tensor:
        return tttc.scan(step, init, tokens, b, shared=shared)[1]

    return tttc.compile(run, strict=True, backend=backend)


def contender(run: Callable[..., torch.Tensor], case: Case, **rest: Any) -> Contender:
    """Forward without gradients, and forward with the gradients of all tokens."""
    init, tokens, shared = case.init, case.tokens, case.shared
    if (length := rest.get("length")) is not None:
        tokens = pytree.tree_map(lambda x: x[:, :, :length], tokens)

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return run(init, tokens, shared)

    leaves, spec = pytree.tree_flatten(tokens)
    leaves = [x.detach().requires_grad_() for x in leaves]
    seed: list[torch.Tensor] = []

    def training() -> tuple[torch.Tensor, list[torch.Tensor]]:
        z = run(init, pytree.tree_unflatten(leaves, spec), shared)
        if not seed:
            seed.append(torch.empty_like(z).copy_(cotangent(z)))  # laid out as the output is
        return z, list(torch.autograd.grad(z, leaves, seed[0]))

    return Contender(forward, training, **rest)


def cotangent(z: torch.Tensor) -> torch.Tensor:
    """Random numbers in the shape of an output, the same each time, in float32."""
    g = torch.Generator(z.device).manual_seed(1)
    return torch.randn(z.shape, generator=g, device=z.device)


def ours(case: Case) -> Contender:
    """A rule by tttc."""
    return contender(compiled(case), case)


# -- errors -----------------------------------------------------------------------------------------------


def last(case: Case, checked: tuple[int, int]) -> Case:
    """A case cut to the last few sequences and heads, in float64."""
    batch, heads = checked
    rows = pytree.tree_map(lambda x: x[-batch:, -heads:].double(), case.tokens)
    init, shared = pytree.tree_map_only(
        torch.Tensor, lambda x: x[-heads:].double(), (case.init, case.shared)
    )
    return replace(case, init=init, tokens=rows, shared=shared)


def errors(name: str, sizes: Sizes) -> dict[str, Any]:
    """Relative errors of outputs and of the gradients of tokens, at full size, of the last sequences and heads.

    Against the torch backend in float64, which the tests hold to the naive loop.
    """
    case, (batch, heads) = sizes.case(name), sizes.checked
    z, grads = ours(case).training()
    exact = last(case, sizes.checked)
    leaves, spec = pytree.tree_flatten(exact.tokens)
    leaves = [x.requires_grad_() for x in leaves]
    want = compiled(exact, "torch")(exact.init, pytree.tree_unflatten(leaves, spec), exact.shared)
    seed = cotangent(z).to(z.dtype)[-batch:, -heads:].double()
    want_grads = torch.autograd.grad(want, leaves, seed)
    program = case.program()
    part = (slice(-batch, None), slice(-heads, None))
    named = zip(exact.tokens._fields, grads, want_grads, strict=True)
    form = f"chunks of {program.unit}" if program.chunk_size else "dual"
    if program.sequential:
        form = "one after another"
    return {
        "output": relative(z.detach()[part], want.detach()),
        **{f"gradient of {n}": relative(x[part], y) for n, x, y in named},
        "largest": float(want.detach().abs().max()),
        "finite": all(bool(x.isfinite().all()) for x in (z, *grads)),
        "form": form,
        "reason": program.reason,
        "no_kernels": program.no_kernels,
        "no_backward_kernels": program.no_backward_kernels,
    }


# -- peers -------------------------------------------------------------------------------------------------


def fla_delta(case: Case) -> Contender:
    """flash-linear-attention's kernel; keys come with norm 1, so that neither has to normalise more than the other."""
    gated = hasattr(case.tokens, "alpha")
    if gated:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as peer
    else:
        from fla.ops.delta_rule import chunk_delta_rule as peer

    extra = {"g": case.tokens.alpha.transpose(1, 2).float().log()} if gated else {}
    state = case.init.expand(case.tokens.q.shape[0], *case.init.shape).contiguous()

    def run(init: Any, tokens: Any, shared: Any) -> torch.Tensor:
        q, k, v, beta = (x.transpose(1, 2) for x in (*tokens[:3], tokens.beta))
        out = peer(q, k, v, beta=beta, scale=1.0, initial_state=state, **extra)[0]
        return out.transpose(1, 2)

    return contender(run, case, tunes=True)


def naive_loop(case: Case, length: int) -> Contender:
    """The naive loop, its token's body (mapped over batch and heads) under torch.compile."""
    step, b = case.step, case.mini_batch_size
    over_heads = torch.vmap(step, (0, 0, 0, 0 if case.shared is not None else None))
    body = torch.vmap(over_heads, (0, 0, 0, None))
    body = torch.compile(body, dynamic=False, backend=PEERS)

    def run(init: Any, tokens: Any, shared: Any) -> torch.Tensor:
        batch = pytree.tree_leaves(tokens)[0].shape[0]
        carry = pytree.tree_map(lambda x: x.expand(batch, *x.shape), init)
        tokens = pytree.tree_map(lambda x: x.float(), tokens)
        out = []
        for t in range(length):
            if t % b == 0:
                anchor = carry
            carry, z = body(
                anchor, carry, pytree.tree_map(lambda x, t=t: x[:, :, t], tokens), shared
            )
            out.append(z)
        return torch.stack(out, 2)

    return contender(run, case, length=length)


def vmapped_titans(case: Case, length: int) -> Contender:
    """Titans by gradients under vmap, its mini-batch under torch.compile."""
    body = torch.compile(mini_batch, dynamic=False, backend=PEERS)

    def run(init: Any, tokens: Any, shared: Any) -> torch.Tensor:
        return titans(body, tuple(init.weights), tuple(init.momentum), tokens, case.mini_batch_size)

    return contender(run, case, length=length)


def lact_program(case: Case) -> Contender:
    """LaCT as its authors write it, under torch.compile."""
    program, size = torch.compile(lact, dynamic=False, backend=PEERS), case.tokens.q.shape[3]

    def run(init: Any, tokens: Any, shared: Any) -> torch.Tensor:
        rows = (x.flatten(2, 3).transpose(1, 2) for x in tokens)
        z = program(tuple(init), shared, *rows, size)
        return z.transpose(1, 2).unflatten(2, (-1, size))

    return contender(run, case)


MAKERS: dict[str, dict[str, Callable[[Case, Sizes], Contender]]] = {
    "delta_net": {"fla": lambda case, _: fla_delta(case)},
    "gated_delta_net": {"fla": lambda case, _: fla_delta(case)},
    "titans": {
        "naive loop": lambda case, sizes: naive_loop(case, sizes.naive),
        "vmapped": lambda case, sizes: vmapped_titans(case, sizes.naive),
    },
    "lact": {"torch.compile": lambda case, _: lact_program(case)},
}
DIRECTIONS = {
    "delta_net": ("forward", "training"),
    "gated_delta_net": ("forward",),
    "titans": ("training",),
    "lact": ("forward", "training"),
}


def contenders(name: str, sizes: Sizes, only: str | None = None) -> dict[str, Contender]:
    """Those of a rule, tttc first, or one of them."""
    case = sizes.case(name)
    found: dict[str, Contender] = {}
    for n, make in {"tttc": lambda case, _: ours(case), **MAKERS[name]}.items():
        if only not in (None, n):
            continue
        try:
            found[n] = make(case, sizes)
        except ImportError as error:
            print(f"{name}: no {n}: {error}")
    return found


# -- comparing ----------------------------------------------------------------------------------------------


def agreement(found: dict[str, Contender], direction: str) -> dict[str, list[float]]:
    """How far the results of contenders are from tttc's: outputs, then gradients where there are such."""

    def results(x: Contender) -> list[torch.Tensor]:
        return [y.detach() for y in pytree.tree_leaves(getattr(x, direction)())]

    mine, differences = results(found["tttc"]), {}
    for name, x in found.items():
        theirs = results(x)
        if x.length is not None:  # whose gradients are those of fewer tokens
            differences[name] = [relative(theirs[0], mine[0][:, :, : x.length])]
        elif name != "tttc":
            differences[name] = [relative(a, b) for a, b in zip(theirs, mine, strict=True)]
    return differences


def scaled(rows: dict[str, dict[str, Any]], found: dict[str, Contender], sizes: Sizes) -> None:
    """Times of fewer tokens, scaled to the length of the others."""
    for name, row in rows.items():
        length = found[name].length
        if length is not None:
            row["measured_us"], factor = row["us"], sizes.length / length
            row |= {key: factor * row[key] for key in ("us", "q25", "q75")}
            row |= {"scaled_by": factor, "length": length}


def kernels(run: Run, calls: int = 3, most: int = 20) -> dict[str, float]:
    """Microseconds of the longest kernels of a call, by name; none without a GPU."""
    if not torch.cuda.is_available():
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    times = {x.key[:80]: x.self_device_time_total / calls for x in found.key_averages()}
    longest = sorted(times.items(), key=lambda x: -x[1])[:most]
    return {name: round(us, 1) for name, us in longest if us > 0}
