"""A program run naively and compiled, and what they differ by."""

from __future__ import annotations

import importlib.util
import math
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

import tttc
from generator.description import Program
from generator.source import Writer, trees_of, write
from tttc import _scan_op, pipeline
from tttc.options import TTTCWarning

TOLERANCES = {"float64": 1e-8, "float32": 1e-3, "bfloat16": 3e-2}
LONGEST = 120  # seconds of CPU for one program
LARGEST = 1e5  # values beyond are no program that anyone would train
Results = dict[str, list[torch.Tensor]]
folder = tempfile.TemporaryDirectory(prefix="tttc-random-programs-")


@dataclass
class Outcome:
    """What became of one program."""

    # same, different, crash, eager, wild (values too large to compare), ill (rounding alone, without the compiler, makes
    # as much of a difference)
    status: str
    form: str = ""  # dual, chunkwise, sequential, eager
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    source: str = ""

    @property
    def failed(self) -> bool:
        return self.status in ("different", "crash")


def loaded(program: Program, source: str) -> Any:
    """The source as a module of its own, which Python, Dynamo and tracebacks can read."""
    name = f"random_program_{program.digest}"
    path = Path(folder.name) / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Draw:
    """Values by kind, float64, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, shape: tuple[int, ...], kind: str, fan: int = 1) -> torch.Tensor:
        if kind == "mask":
            return torch.rand(shape, generator=self.generator) < 0.7
        if kind == "rate":
            return 0.02 + 0.18 * torch.rand(shape, generator=self.generator, dtype=torch.float64)
        if kind == "decay":
            return 0.7 + 0.3 * torch.rand(shape, generator=self.generator, dtype=torch.float64)
        normal = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return 1.0 + 0.3 * normal if kind == "gain" else normal * 0.8 / math.sqrt(fan)


def arguments(w: Writer) -> tuple[Any, Any, Any]:
    """Weights, tokens and parameters, each a dictionary; leaves lie as ``tttc.scan`` or the loop takes them."""
    p, draw = w.program, Draw(w.program.seed)
    heads = (p.H,) if p.loop is None or p.loop.heads in ("BHT", "BTH") else ()
    lead = (p.B, *heads) if p.loop is None and p.batched else heads
    state: dict[str, dict[str, torch.Tensor]] = {}
    for tree, leaves in trees_of(w).items():
        state[tree] = {}
        for name, shape in leaves.items():
            fan = shape[0] if len(shape) == 2 else 1
            value = draw((*lead, *shape), "gain" if not shape else "normal", fan)
            if tree != "weights" and (p.seed % 2 or p.update == "adaptive" or name == "n"):
                value = torch.zeros_like(value)
            state[tree][name] = value
    grid = (p.B, p.H, p.T)
    if p.loop is not None:
        grid = tuple({"B": p.B, "H": p.H, "T": p.T}[x] for x in p.loop.heads)  # type: ignore[assignment]
    tokens = {n: draw((*grid, *s), w.kinds[n]) for n, s in w.tokens.items()}
    if p.strided and p.loop is None:
        tokens = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in tokens.items()}
    fans = {n: s[0] if len(s) == 2 else 1 for n, s in w.shared.items()}
    shared = {n: draw((*heads, *s), w.kinds[n], fans[n]) for n, s in w.shared.items()}
    return state, tokens, shared


def in_container(w: Writer, module: Any, state: dict[str, dict[str, torch.Tensor]]) -> Any:
    """The state as the step takes it."""
    kind = w.program.container
    leaves = {f"{t}_{n}": x for t, xs in state.items() for n, x in xs.items()}
    if kind == "nested":
        return tuple(state.values())
    if kind == "tuple":
        return tuple(leaves.values())
    if kind == "list":
        return list(leaves.values())
    if kind == "namedtuple":
        return module.State(**leaves)
    return next(iter(leaves.values())) if kind == "tensor" and len(leaves) == 1 else leaves


def wants(w: Writer, group: str) -> bool:
    """Whether a group of arguments wants gradients."""
    return {
        "all": True, "none": False, "tokens": group == "tokens", "parameters": group != "tokens",
        "state": group == "state",
    }[w.program.wanted]  # fmt: skip


def results(call: Any, groups: dict[str, Any], w: Writer, parameters: Any = ()) -> Results:
    """Results of a call on leaves of these values, and gradients of what wants one (parameters too)."""

    def made(x: torch.Tensor, group: str) -> torch.Tensor:
        x = x.detach().clone(memory_format=torch.preserve_format)
        return x.requires_grad_() if wants(w, group) and x.is_floating_point() else x

    leaves = {g: pytree.tree_map(lambda x, g=g: made(x, g), v) for g, v in groups.items()}
    if leaves.get("shared") == {}:
        leaves["shared"] = None
    state, z = call(**leaves)
    found = {"state": pytree.tree_leaves(state), "output": pytree.tree_leaves(z)}
    wanted = [x for x in [*pytree.tree_leaves(leaves), *parameters] if x is not None]
    wanted = [x for x in wanted if x.requires_grad]
    flat = [x for xs in found.values() for x in xs if x.requires_grad]
    gradients: list[torch.Tensor] = []
    if wanted and flat:
        # Weights that differ, so that no gradient cancels by symmetry; those of the oracle are rounded as the others.
        given = getattr(torch, w.program.dtype)
        terms = (
            x * torch.linspace(0.5, 1.5, x.numel()).view(x.shape).to(given).to(x) for x in flat
        )
        total = sum(x.sum() for x in terms)
        gradients = list(
            torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
        )
    named = {k: [x.detach() for x in xs] for k, xs in found.items()}
    return named | {"gradient": gradients}


def errors(expected: Results, got: Results) -> dict[str, float]:
    """The largest difference of each kind, relative to the largest value of its tensor.

    Tensors whose values are small beside others of their kind are held against a hundredth of the largest: what
    remains of sums that cancel is no more exact than their terms.
    """
    worst = {}
    for kind, xs in expected.items():
        ys = got[kind]
        if len(xs) != len(ys) or any(x.shape != y.shape for x, y in zip(xs, ys, strict=True)):
            return {kind: math.inf}
        largest = max([float(x.abs().max()) for x in xs if x.numel()], default=0.0)
        worst[kind] = 0.0
        for x, y in zip(xs, ys, strict=True):
            if x.numel():
                scale = max(float(x.abs().max()), 1e-2 * largest, 1e-3)
                error = float((x.double() - y.double()).abs().max()) / scale
                worst[kind] = max(worst[kind], math.inf if math.isnan(error) else error)
    return worst


def cast(tree: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, tree)


class Instance:
    """A program with its arguments, to be run naively or compiled, in any dtype."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.before = set(_scan_op._by_key)
        self.source, self.writer = write(program)
        self.module = loaded(program, self.source)
        state, self.tokens, self.shared = arguments(self.writer)
        self.values = {**state["weights"], **self.shared}
        if program.loop is None:
            self.init = in_container(self.writer, self.module, state)

    def run(self, dtype: torch.dtype, backend: str | None = None, nudge: float = 0.0) -> Results:
        """Results and gradients; compiled where a backend is named; on values moved by ``nudge``, relatively."""
        noise = torch.Generator().manual_seed(1)

        def prepared(x: torch.Tensor) -> torch.Tensor:
            if not x.is_floating_point():
                return x
            if nudge:
                x = x * (1 + nudge * torch.randn(x.shape, generator=noise, dtype=x.dtype))
            return x.to(self.given).to(dtype)

        def compiled(target: Any) -> Any:
            return target if backend is None else tttc.compile(target, backend=backend)

        if self.program.loop is None:
            groups = {"init": self.init, "tokens": self.tokens, "shared": self.shared}
            groups = pytree.tree_map(prepared, groups)
            if dtype is torch.bfloat16:  # the state is kept in float32
                groups["init"] = pytree.tree_map(lambda x: x.float(), groups["init"])
            return results(compiled(self.module.program), groups, self.writer)
        values = {n: prepared(x) for n, x in self.values.items()}
        tokens = {n: prepared(x) for n, x in self.tokens.items()}
        module = self.module.Program(values)
        module.requires_grad_(wants(self.writer, "parameters"))
        target = compiled(module)
        self.model = module
        return results(
            lambda tokens: target(*tokens.values()),
            {"tokens": tokens},
            self.writer,
            module.parameters(),
        )

    @property
    def given(self) -> torch.dtype:
        """The dtype in which values are given: those of the oracle are rounded to it, too."""
        return getattr(torch, self.program.dtype)

    def form(self) -> tuple[str, str]:
        """What the compiler made of it, and why no more."""
        new = self.keys()
        programs = [p for (key, _), p in pipeline._programs.items() if key in new]
        if not programs:
            return "eager", ""
        program = programs[0]
        if program.sequential:
            return "sequential", program.reason or ""
        return ("chunkwise" if program.chunk_size else "dual"), ""

    def keys(self) -> set[str]:
        """The steps that came with it."""
        return set(_scan_op._by_key) - self.before

    def forget(self) -> None:
        """Thousands of programs go through one process: nothing of this one stays."""
        new = self.keys()
        for key in new:
            del _scan_op._by_key[key]
        for content in [c for c, k in _scan_op._by_content.items() if k in new]:
            del _scan_op._by_content[content]
        for key in [k for k in pipeline._programs if k[0] in new]:
            del pipeline._programs[key]
        sys.modules.pop(self.module.__name__, None)
        Path(str(self.module.__file__)).unlink(missing_ok=True)


def largest(found: Results) -> float:
    """The largest value; infinite where one is no number."""
    values = [x.abs().max() for xs in found.values() for x in xs if x.numel()]
    top = max((float(x) for x in values), default=0.0)
    return top if all(math.isfinite(float(x)) for x in values) else math.inf


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {LONGEST} s")


def check(program: Program) -> Outcome:
    """Run a program naively in float64, and compiled; compare results and gradients."""
    start = time.process_time()
    before = signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        outcome = _check(program)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    outcome.seconds = time.process_time() - start
    return outcome


def _check(program: Program) -> Outcome:
    if program.path in ("dynamo", "loop"):
        torch._dynamo.reset()
    instance = Instance(program)
    outcome = Outcome("same", source=instance.source)
    try:
        expected = instance.run(torch.float64)
        if largest(expected) > LARGEST:
            outcome.status = "wild"
            return outcome
        backend = "triton" if program.path == "triton" else "torch"
        # Without Dynamo, scans go the same way but for what surrounds them: many times faster.
        stance = "force_eager" if program.path in ("direct", "triton") else "default"
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                with torch.compiler.set_stance(stance):
                    got = instance.run(instance.given, backend)
        except Exception as error:  # whatever the compiler raises is what we are looking for
            outcome.status, outcome.reason = "crash", f"{type(error).__name__}: {error}"
            return outcome
        outcome.form, outcome.reason = instance.form()
        refused = [str(w.message) for w in caught if issubclass(w.category, TTTCWarning)]
        if refused:
            outcome.status, outcome.form, outcome.reason = "eager", "eager", refused[0]
        outcome.errors = errors(expected, got)
        tolerance = TOLERANCES["float32" if program.path == "triton" else program.dtype]
        if max(outcome.errors.values()) > tolerance:
            moved = errors(expected, instance.run(torch.float64, nudge=1e-3 * tolerance))
            ill = max(moved.values()) > tolerance
            # So is what PyTorch rounds likewise without the compiler: gradients of two scans are added in their dtype.
            eager = {} if ill else errors(expected, instance.run(instance.given))
            ill = ill or all(e <= max(tolerance, 1.5 * eager[k]) for k, e in outcome.errors.items())
            outcome.status = "ill" if ill else "different"
        return outcome
    finally:
        instance.forget()
