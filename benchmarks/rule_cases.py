"""The rules of examples/rules at real sizes: inputs as projections leave them, ``[B, T, H, d]`` in memory."""

from __future__ import annotations

from typing import Any

import torch
from scans import Case, make_case
from torch.nn import functional as F
from torch.utils import _pytree as pytree

# The rules, and what is not as in the rule's own example; a chunk is a token of LaCT.
SIZES: dict[str, dict[str, int]] = {
    "delta_net": {},
    "gated_delta_net": {},
    "titans": {},
    "lact": {"c": 2048},
    "linear_attention": {},
    "gated_linear_attention": {},
    "miras_lp": {},
    "miras_huber": {},
    "several_steps": {},
    "deep_mlp": {},
    "swiglu": {},
    "ttt_linear_channels": {},
    "vector_weights": {},
}


# What rates are multiplied by: at those of the small examples a long sequence ends in weights that are zero, or in
# chaos, where float32 and float64 have nothing in common after a thousand tokens.
SCALES = {
    "titans": {"alpha": 0.001},
    "deep_mlp": {"eta": 0.003},
    "vector_weights": {"eta": 0.05},
}


class Normal:
    """Random float32 numbers on a device, in the place of ``_run.Normal``."""

    def __init__(self, device: str, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 0.5) -> torch.Tensor:
        return scale * torch.randn(shape, generator=self.generator, device=self.device)

    def gate(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """Numbers between ``low`` and ``high``."""
        return low + (high - low) * torch.sigmoid(2.0 * self(*shape, scale=1.0))


def rule(name: str) -> Any:
    """The module of a rule."""
    import importlib

    return importlib.import_module(name)


def rule_case(
    name: str, batch: int, length: int, heads: int, d: int, *,
    device: str = "cuda", dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: int,
) -> Case:  # fmt: skip
    """A rule on ``[batch, length, heads, d]``: tokens in ``dtype``, states and parameters in float32.

    q and k have norm 1 and matrices keep the sizes of what they multiply, so that no rule leaves the numbers that
    the others see, however long the sequence.
    """
    module, normal = rule(name), Normal(device, seed)
    sizes = {**SIZES[name], **changes}
    chunk = sizes.get("c", 1)
    made = module.example(normal, B=batch, H=heads, T=max(length // chunk, 1), d=d, **sizes)

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x / x.shape[-2] ** 0.5 if x.ndim == 3 else x

    def as_left(x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(2, 3) if chunk > 1 else x
        laid = rows.transpose(1, 2).to(dtype).contiguous().transpose(1, 2)
        return laid.unflatten(2, (-1, chunk)) if chunk > 1 else laid

    fields = made.tokens._asdict()
    fields |= {n: F.normalize(fields[n], dim=-1) for n in ("q", "k")}
    fields |= {n: by * fields[n] for n, by in SCALES.get(name, {}).items()}
    tokens = type(made.tokens)(*(as_left(x) for x in fields.values()))
    init = pytree.tree_map(scaled, made.init)
    shared = made.shared
    if name == "lact":  # its parameters are norms of the first weights
        shared = tuple(torch.vmap(module.norms)(W) for W in init)
    return Case(name, module.step, init, tokens, shared, made.mini_batch_size, {})


def any_case(name: str, batch: int, length: int, heads: int, d: int, **options: Any) -> Case:
    """A rule by its name, as ``rule_case`` has it, or one of ``make_case``."""
    make = rule_case if name in SIZES else make_case
    return make(name, batch, length, heads, d, **options)
