"""``tttc demo``: two byte-level language models read the source of Python's standard library."""

from __future__ import annotations

import copy
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils import _pytree as pytree

from tttc.compiler import compile
from tttc.models import TTTConfig, TTTLanguageModel
from tttc.progress import doing
from tttc.report.benchmark import benchmark
from tttc.report.explain import explain
from tttc.report.limits import without_recompile_limit
from tttc.report.text import console, count, error, seconds

TOLERANCE = 1e-9  # of the torch backend in float64 against the naive loop
LOW_PRECISION = 1e-2  # of bfloat16, relative
CHECKED = (
    200  # tokens; no multiple of the mini-batch size, so that the last mini-batch is a partial one
)


def library_text(length: int) -> bytes:
    """The first bytes of the source of Python's standard library, files in order of their names.

    Raises:
        FileNotFoundError: this Python came without its source.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    text = b""
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= length:
            return text[:length]
    raise FileNotFoundError(
        f"expected {length} bytes of Python source in {folder}, found {len(text)}"
    )


def demo(
    layers: Sequence[str], device: torch.device, tokens: int | None = None, show: bool = True
) -> dict[str, Any]:
    """Compile, explain, check and time, and ``show`` it; what was found, ``["passed"]`` the checks above all."""
    start = time.perf_counter()
    gpu = device.type == "cuda"
    batch, length = (8, tokens or 2048) if gpu else (2, tokens or 256)
    text = torch.frombuffer(bytearray(library_text(batch * length)), dtype=torch.uint8)
    ids = text.view(batch, length).to(device, torch.int64)
    out = console()
    out.quiet = not show
    out.print(
        f"Reading {batch} x {length} bytes of {sysconfig.get_path('stdlib')} on {device}, "
        f"{torch.get_num_threads()} threads."
    )
    with without_recompile_limit():
        found = [_one(layer, ids, gpu, out) for layer in layers]
    passed, spent = all(x["passed"] for x in found), time.perf_counter() - start
    out.print(f"\n{'All checks passed' if passed else 'CHECKS FAILED'} in {spent:.0f} s.")
    return {"passed": passed, "seconds": spent, "layers": found}


def _config(layer: str, gpu: bool) -> TTTConfig:
    size = (512, 1376, 4, 8) if gpu else (128, 344, 2, 4)
    names = ("hidden_size", "intermediate_size", "num_layers", "num_heads")
    return TTTConfig(vocab_size=256, layer=layer, **dict(zip(names, size, strict=True)))  # type: ignore[arg-type]


def _one(layer: str, ids: torch.Tensor, gpu: bool, out: Console) -> dict[str, Any]:
    torch.manual_seed(0)
    config = _config(layer, gpu)
    model = TTTLanguageModel(config, device=ids.device)
    parameters = sum(p.numel() for p in model.parameters())
    name = {"linear": "TTT-Linear", "mlp": "TTT-MLP"}[layer]
    out.rule(f"{name}, {config.num_layers} layers, {count(parameters)} parameters", align="left")
    working = copy.deepcopy(model).to(torch.bfloat16) if gpu else model
    with doing(f"{name}: compiling and explaining"):
        out.print(explain(working, ids, check_tokens=128))
    with doing(f"{name}: checking {CHECKED} tokens against the naive loop in float64") as step:
        errors, agrees = _check(model, ids[:, :CHECKED], out)
        if gpu:
            step(f"{name}: checking bfloat16")
            errors["bfloat16, relative"] = low = _check_low(working, ids[:, :CHECKED], out)
            agrees &= low <= LOW_PRECISION
    out.print(f"\nSpeed, {'bfloat16' if gpu else 'float32'}:", style="bold")
    timed = benchmark(working, ids, repeats=20 if gpu else 3, budget=4.0)
    out.print(timed)
    return {
        "layer": layer,
        "parameters": parameters,
        "errors": errors,
        "passed": agrees,
        "benchmark": asdict(timed),
    }


def _check(
    model: TTTLanguageModel, ids: torch.Tensor, out: Console
) -> tuple[dict[str, float], bool]:
    """Logits and final states of the torch backend against the naive loop, both in float64."""
    exact = copy.deepcopy(model).to(torch.float64)
    compiled = compile(exact, backend="torch")
    with torch.no_grad():
        start = time.perf_counter()
        logits, states = exact(ids, return_state=True)
        middle = time.perf_counter()
        got_logits, got_states = compiled(ids, return_state=True)
    pairs = zip(_floating(got_states), _floating(states), strict=True)
    errors = {
        "logits": float((got_logits - logits).abs().max()),
        "final states": max(float((x - y).abs().max()) for x, y in pairs),
    }
    agrees = max(errors.values()) <= TOLERANCE
    shown = ", ".join(f"{k} {error(v)}" for k, v in errors.items())
    out.print(
        f"\nAgainst the naive loop in float64, largest difference: {shown} "
        f"(at most {error(TOLERANCE)} allowed): {'ok' if agrees else 'FAILED'}. "
        f"The naive loop took {seconds(middle - start)} for {ids.shape[1]} tokens."
    )
    return errors, agrees


def _check_low(model: TTTLanguageModel, ids: torch.Tensor, out: Console) -> float:
    """Logits of the kernels in bfloat16 against the naive loop in float64 with the same weights."""
    with torch.no_grad():
        got = compile(model)(ids).to(torch.float64)
        expected = copy.deepcopy(model).to(torch.float64)(ids)
    found = float((got - expected).norm() / expected.norm())
    agrees = found <= LOW_PRECISION
    out.print(
        f"Kernels in bfloat16 against the same, relative: {error(found)} "
        f"(at most {error(LOW_PRECISION)} allowed): {'ok' if agrees else 'FAILED'}."
    )
    return found


def _floating(tree: object) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(tree)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]
