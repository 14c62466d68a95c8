"""The rules of examples/rules on a GPU: values against float64 first, then times beside what peers there are.

    python benchmarks/rules.py benchmarks/results/OUT.json [--budget 300] [--quick]

B8 H16 T4096 d64, bf16, inputs as projections leave them (``[B, T, H, d]``). Everything is compiled first, in
processes beside each other; errors of every rule (outputs and gradients, T4096) are against the torch backend in
float64, which the tests hold to the naive loop. Then, in turn: DeltaNet and gated DeltaNet beside
flash-linear-attention 0.6, Titans beside the naive loop with its token's body under torch.compile (at a length it can
take, the time scaled by the length), LaCT beside the chunk-wise program of its authors under torch.compile
(peers/lact.py). ``--quick`` runs tiny sizes, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peers.lact import lact
from rule_cases import SIZES, rule_case
from scans import Case
from timing import bandwidth, interleaved, record, relative
from torch.utils import _pytree as pytree

import tttc

Run = Callable[[], Any]
PEERS = (
    "inductor" if torch.cuda.is_available() else "eager"
)  # on a CPU all there is to see is that they run


@dataclass(frozen=True)
class Sizes:
    """What is measured at which size."""

    batch: int = 8
    length: int = 4096
    heads: int = 16
    d: int = 64
    chunk: int = 2048
    naive: int = 64  # tokens of the naive loop
    checked: tuple[int, int] = (1, 2)  # sequences and heads compared with float64
    seconds: float = 3.0  # of timing a comparison

    def changes(self, name: str) -> dict[str, int]:
        """The sizes of a rule's own."""
        return {"c": self.chunk} if "c" in SIZES[name] else {}

    def case(self, name: str, **changes: int) -> Case:
        """The inputs of a rule."""
        batch, length = changes.pop("batch", self.batch), changes.pop("length", self.length)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        return rule_case(
            name, batch, length, changes.pop("heads", self.heads), self.d,
            device=device, dtype=dtype, **self.changes(name),
        )  # fmt: skip


QUICK = Sizes(2, 64, 2, 16, 32, 16, (1, 1), 0.0)


# -- running a case -------------------------------------------------------------------------------------


def compiled(case: Case, backend: str = "auto") -> Callable[..., torch.Tensor]:
    """The outputs of a case's scan, compiled, as a function of (init, tokens, shared)."""
    step, b = case.step, case.mini_batch_size

    def run(init: Any, tokens: Any, shared: Any) -> torch.Tensor:
        return tttc.scan(step, init, tokens, b, shared=shared)[1]

    return tttc.compile(run, strict=True, backend=backend)


def trained(run: Callable[..., torch.Tensor], arguments: Sequence[Any]) -> tuple[Run, Run]:
    """Forward without gradients, and forward with the gradients of everything in ``arguments[1]``."""

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return run(*arguments)

    leaves, spec = pytree.tree_flatten(arguments[1])
    leaves = [x.detach().requires_grad_() for x in leaves]
    seed: list[torch.Tensor] = []

    def train() -> tuple[torch.Tensor, list[torch.Tensor]]:
        z = run(arguments[0], pytree.tree_unflatten(leaves, spec), *arguments[2:])
        if not seed:
            g = torch.Generator(z.device).manual_seed(1)
            drawn = torch.randn(z.shape, generator=g, device=z.device)
            seed.append(torch.empty_like(z).copy_(drawn))  # laid out as the output is
        return z, list(torch.autograd.grad(z, leaves, seed[0]))

    return forward, train


def some(case: Case, checked: tuple[int, int]) -> Case:
    """A case cut to a few sequences and heads, in float64."""
    batch, heads = checked
    rows = pytree.tree_map(lambda x: x[:batch, :heads].double(), case.tokens)
    init, shared = pytree.tree_map_only(
        torch.Tensor, lambda x: x[:heads].double(), (case.init, case.shared)
    )
    return replace(case, init=init, tokens=rows, shared=shared)


def errors(name: str, sizes: Sizes) -> dict[str, Any]:
    """Relative errors of outputs and of the gradients of tokens against float64, and finite values throughout."""
    batch, heads = sizes.checked
    case = sizes.case(name, batch=batch, heads=heads)
    run, exact = compiled(case), some(case, sizes.checked)
    _, train = trained(run, (case.init, case.tokens, case.shared))
    z, grads = train()
    leaves, spec = pytree.tree_flatten(exact.tokens)
    leaves = [x.requires_grad_() for x in leaves]
    want = compiled(exact, "torch")(exact.init, pytree.tree_unflatten(leaves, spec), exact.shared)
    g = torch.Generator(z.device).manual_seed(1)
    seed = torch.randn(z.shape, generator=g, device=z.device).to(z.dtype).double()
    want_grads = torch.autograd.grad(want, leaves, seed)
    names = exact.tokens._fields
    program = case.program()
    return {
        "output": relative(z.detach(), want.detach()),
        **{f"gradient of {n}": relative(x, y) for n, x, y in zip(names, grads, want_grads, strict=True)},
        "largest": float(want.detach().abs().max()),
        "form": program.reason or (f"chunks of {program.unit}" if program.chunk_size else "dual"),
        "no_kernels": program.no_kernels,
        "no_backward_kernels": program.no_backward_kernels,
    }  # fmt: skip


# -- contenders -------------------------------------------------------------------------------------------


def fla_delta(case: Case, gated: bool) -> Callable[..., torch.Tensor]:
    """flash-linear-attention's kernel; keys come with norm 1, so that neither has to normalise more than the other."""
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

    return run


def delta(name: str, sizes: Sizes, directions: Sequence[str]) -> dict[str, dict[str, Run]]:
    """DeltaNet or gated DeltaNet, by tttc and by flash-linear-attention."""
    case = sizes.case(name)
    arguments = (case.init, case.tokens, case.shared)
    found = {"tttc": trained(compiled(case), arguments)}
    try:
        found["fla"] = trained(fla_delta(case, "gated" in name), arguments)
    except ImportError as error:
        print(f"  {name}: no flash-linear-attention: {error}")
    return {d: {n: runs[d == "training"] for n, runs in found.items()} for d in directions}


def naive_body(case: Case) -> Callable[..., torch.Tensor]:
    """The naive loop, its token's body (mapped over batch and heads) under torch.compile."""
    step, b = case.step, case.mini_batch_size
    over_heads = torch.vmap(step, (0, 0, 0, 0 if case.shared is not None else None))
    body = torch.vmap(over_heads, (0, 0, 0, None))
    body = torch.compile(body, dynamic=False, backend=PEERS)

    def run(init: Any, tokens: Any, shared: Any) -> torch.Tensor:
        batch, length = pytree.tree_leaves(tokens)[0].shape[0:3:2]
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

    return run


def titans(sizes: Sizes) -> dict[str, dict[str, Run]]:
    """Titans by tttc, and the naive loop at a length it can take."""
    case = sizes.case("titans")
    first = pytree.tree_map(lambda x: x[:, :, : sizes.naive], case.tokens)
    _, ours = trained(compiled(case), (case.init, case.tokens, case.shared))
    _, naive = trained(naive_body(case), (case.init, first, case.shared))
    return {"training": {"tttc": ours, f"naive loop T{sizes.naive}": naive}}


def lact_contenders(sizes: Sizes) -> dict[str, dict[str, Run]]:
    """LaCT by tttc, and as its authors write it under torch.compile."""
    case = sizes.case("lact")
    program = torch.compile(lact, dynamic=False, backend=PEERS)

    def peer(init: Any, tokens: Any, shared: Any) -> torch.Tensor:
        rows = (x.flatten(2, 3).transpose(1, 2) for x in tokens)
        z = program(tuple(init), shared, *rows, sizes.chunk)
        return z.transpose(1, 2).unflatten(2, (-1, sizes.chunk))

    arguments = (case.init, case.tokens, case.shared)
    ours, theirs = trained(compiled(case), arguments), trained(peer, arguments)
    return {
        direction: {"tttc": ours[i], "torch.compile": theirs[i]}
        for i, direction in enumerate(("forward", "training"))
    }


COMPARED: dict[str, Callable[[Sizes], dict[str, dict[str, Run]]]] = {
    "delta_net": lambda sizes: delta("delta_net", sizes, ("forward", "training")),
    "gated_delta_net": lambda sizes: delta("gated_delta_net", sizes, ("forward",)),
    "titans": titans,
    "lact": lact_contenders,
}


def agreement(contenders: dict[str, Run]) -> dict[str, list[float]]:
    """How far the results of contenders are from tttc's: outputs, then gradients where there are such."""

    def results(run: Run) -> list[torch.Tensor]:
        return [x.detach() for x in pytree.tree_leaves(run())]

    ours, found = results(contenders["tttc"]), {}
    for name, run in contenders.items():
        if name == "tttc":
            continue
        theirs = results(run)
        if name.startswith("naive loop"):  # whose gradients are those of fewer tokens
            length = theirs[0].shape[2]
            found[name] = [relative(theirs[0], ours[0][:, :, :length])]
            continue
        found[name] = [relative(x, y) for x, y in zip(theirs, ours, strict=True)]
    return found


def scaled(rows: dict[str, dict[str, float]], sizes: Sizes) -> None:
    """Times of a shorter loop, scaled to the length of the others."""
    for name, row in rows.items():
        if name.startswith("naive loop"):
            row["measured_us"], factor = row["us"], sizes.length / sizes.naive
            row |= {key: factor * row[key] for key in ("us", "q25", "q75")}
            row["scaled_by"] = factor


# -- the parts ------------------------------------------------------------------------------------------------


def warm(jobs: Sequence[str], quick: bool, seconds: float) -> dict[str, Any]:
    """Compile everything once in processes beside each other; kernels stay in the caches on disk."""
    start, running, done = time.time(), {}, {}
    waiting, width = list(jobs), max(1, min(12, (os.cpu_count() or 2) - 2))
    while waiting or running:
        while waiting and len(running) < width:
            job = waiting.pop(0)
            command = [sys.executable, __file__, "-", "--job", job, *(["--quick"] if quick else [])]
            running[job] = (
                subprocess.Popen(
                    command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                ),
                time.time(),
            )
        for job, (process, began) in list(running.items()):
            late = time.time() - start > seconds
            if process.poll() is None and not late:
                continue
            if late:
                process.kill()
            stderr = process.communicate()[1]
            done[job] = {"seconds": round(time.time() - began, 1)}
            if process.returncode:
                why = "took too long" if late else stderr[-1500:]
                done[job]["error"] = why
            del running[job]
        time.sleep(0.1)
    return done


def run_job(job: str, sizes: Sizes) -> None:
    """One of the processes of :func:`warm`: runs every contender of a comparison, or a rule's check, once."""
    kind, _, name = job.partition(":")
    if kind == "errors":
        errors(name, sizes)
        return
    for contenders in COMPARED[name](sizes).values():
        for run in contenders.values():
            run()


def main() -> None:
    """Measure, print, record."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("out", type=Path)
    p.add_argument("--budget", type=float, default=420, help="seconds for all of it")
    p.add_argument("--rules", nargs="+", default=list(SIZES), choices=list(SIZES))
    p.add_argument("--quick", action="store_true")
    p.add_argument("--job", help=argparse.SUPPRESS)
    given = p.parse_args()
    start = time.time()
    sizes = QUICK if given.quick else Sizes()
    if given.job:
        run_job(given.job, sizes)
        return
    made: dict[str, Any] = record()
    shape = f"B{sizes.batch} H{sizes.heads} T{sizes.length} d{sizes.d}"
    made |= {"shape": shape, "chunk of lact": sizes.chunk, "errors": {}, "times": {}}
    made["floor_us"] = (
        4 * 2 * sizes.batch * sizes.length * sizes.heads * sizes.d / bandwidth() * 1e6
    )

    def save() -> None:
        given.out.write_text(json.dumps(made, indent=1) + "\n")

    compared = [n for n in COMPARED if n in given.rules]
    jobs = [f"times:{n}" for n in compared] + [f"errors:{n}" for n in given.rules]
    on_gpu = torch.cuda.is_available()
    made["compiled"] = warm(jobs, given.quick, 0.5 * given.budget) if on_gpu else {}
    failed = {job: x["error"] for job, x in made["compiled"].items() if "error" in x}
    for job, why in failed.items():
        print(f"{job} FAILED: {why[-600:]}")
    print(f"compiled in {time.time() - start:.0f} s", {j: x["seconds"] for j, x in made["compiled"].items()})  # fmt: skip
    save()
    for name in given.rules:
        if f"errors:{name}" in failed:
            continue
        try:
            made["errors"][name] = found = errors(name, sizes)
            shown = {k: f"{x:.1e}" if isinstance(x, float) else x for k, x in found.items() if x is not None}  # fmt: skip
            print(name, shown)
            finite = all(math.isfinite(x) for x in found.values() if isinstance(x, float))
            assert finite, f"{name}: not finite"
        except Exception:
            made["errors"][name] = {"error": traceback.format_exc()}
            print(name, "FAILED", traceback.format_exc()[-1000:])
        save()
    for name in compared:
        if f"times:{name}" in failed or time.time() - start > given.budget:
            continue
        try:
            for direction, contenders in COMPARED[name](sizes).items():
                differences = agreement(contenders)
                rows = interleaved(contenders, sizes.seconds)
                for n, found in differences.items():
                    rows[n]["differences_from_tttc"] = found  # type: ignore[assignment]
                scaled(rows, sizes)
                made["times"].setdefault(name, {})[direction] = rows
                ours = rows["tttc"]["us"]
                line = ", ".join(f"{n} {r['us']:.0f} us" for n, r in rows.items())
                ratios = ", ".join(f"{r['us'] / ours:.2f} times tttc's" for n, r in rows.items() if n != "tttc")  # fmt: skip
                print(f"{name} {direction}: {line} ({ratios or 'alone'})")
                print(
                    f"  largest differences: { {n: f'{max(x):.1e}' for n, x in differences.items()} }"
                )
                save()
        except Exception:
            made["times"][name] = {"error": traceback.format_exc()}
            print(name, "FAILED", traceback.format_exc()[-1000:])
        if on_gpu:
            torch.cuda.empty_cache()
        save()
    print(f"{shape}, floor {made['floor_us']:.0f} us; {time.time() - start:.0f} s in all")


if __name__ == "__main__":
    main()
