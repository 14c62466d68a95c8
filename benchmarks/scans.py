"""The scans that are measured: inputs as projections leave them, ``[B, T, H, d]`` in memory, bf16."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tttc import _tracing
from tttc._checks import check_scan_inputs
from tttc._scan_op import interned
from tttc.ir.program import Program
from tttc.nn.inner import (
    Carry,
    LinearWeights,
    MLPWeights,
    Norm,
    Token,
    linear_step,
    mlp_step,
)
from tttc.pipeline import build_program
from tttc.scan import _flatten

SHAPES = {
    "B16 T2048": (16, 2048),
    "B1 T2048": (1, 2048),
    "B1 T32768": (1, 32768),
    "B8 T8192": (8, 8192),
}


sys.path.append(str(Path(__file__).parents[1] / "examples" / "rules"))
chunk_rule = importlib.import_module("ttt_mlp_chunk")


@dataclass
class Case:
    """One scan with its inputs, and the program the compiler makes of it."""

    name: str
    step: Callable[..., Any]
    init: Any
    tokens: Any
    shared: Any
    mini_batch_size: int
    raw: dict[str, torch.Tensor]  # q, k, v, eta, gain, bias, weights as a peer takes them

    def flat(self) -> Any:
        """The call as operators take it."""
        anchor, _, tokens, info = check_scan_inputs(
            self.step, self.init, None, 0, self.tokens, self.mini_batch_size, self.shared
        )
        structure = _tracing.describe((self.init, None, self.tokens, self.shared))
        return _flatten(self.step, anchor, None, tokens, self.shared, structure, info)

    def program(self) -> Program:
        """What the compiler makes of the scan."""
        return build_program(interned(self.flat().key), self.mini_batch_size)


def make_case(
    name: str, batch: int, length: int, heads: int = 32, d: int = 64, *,
    device: str = "cuda", dtype: torch.dtype = torch.bfloat16, seed: int = 0,
) -> Case:  # fmt: skip
    """``name``: "ttt_linear_b16", "ttt_mlp_b16", "ttt_mlp_chunk64" (b may be any number)."""
    g = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, to: torch.dtype = dtype) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=g, device=device)).to(to)

    rule, _, size = name.rpartition("_")
    b = int("".join(c for c in size if c.isdigit()))
    q, k, v = (normal(batch, length, heads, d) for _ in range(3))
    q, k = (torch.nn.functional.normalize(x.float(), dim=-1).to(dtype) for x in (q, k))
    eta = (
        torch.rand(batch, length, heads, generator=g, device=device)
        * (0.1 if "mlp" in name else 1.0)
        / d
    ).to(dtype)
    gain, bias = (
        1 + normal(heads, d, scale=0.1, to=torch.float32),
        normal(heads, d, scale=0.1, to=torch.float32),
    )
    m = 4 * d if "mlp" in name else d
    W1, b1 = (
        normal(heads, d, m, scale=0.1, to=torch.float32),
        normal(heads, m, scale=0.1, to=torch.float32),
    )
    W2, b2 = (
        normal(heads, m, d, scale=0.05, to=torch.float32),
        normal(heads, d, scale=0.1, to=torch.float32),
    )
    raw = {"q": q, "k": k, "v": v, "eta": eta, "gain": gain, "bias": bias, "W1": W1, "b1": b1}
    norm = Norm(gain, bias)
    bthd = [x.transpose(1, 2) for x in (q, k, v)]
    if "chunk" in size:
        tiles = [x.unflatten(2, (length // b, b)) for x in bthd]
        tokens = chunk_rule.Chunk(*tiles, eta.transpose(1, 2).unflatten(2, (length // b, b)))
        init = chunk_rule.Weights(W1, b1, W2, b2)
        return Case(name, chunk_rule.step, init, tokens, (gain, bias), 1, raw)
    place = torch.arange(length, device=device) % b
    tau = (1.0 / (1 + place)).to(dtype).expand(batch, heads, length)
    tokens = Token(*bthd, eta.transpose(1, 2), tau)
    linear = "linear" in rule
    weights = LinearWeights(W1, b1) if linear else MLPWeights(W1, b1, W2, b2)
    sums = type(weights)(*(torch.zeros_like(w) for w in weights))
    step = linear_step if linear else mlp_step
    return Case(name, step, Carry(weights, sums), tokens, norm, b, raw)
