"""Launching a scan kernel on tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tttc.codegen.kernel import Kernel


def precision() -> str:
    """How float32 products are made, by torch's own setting (``torch.set_float32_matmul_precision``)."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def dot_dtype(dtype: torch.dtype) -> Any:
    """The dtype of the operands of matrix products, for tokens of a dtype."""
    import triton.language as tl

    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)


def launch(
    kernel: Kernel,
    tensors: Mapping[str, torch.Tensor],
    grid: tuple[int, ...],
    length: int,
    heads: int,
    place: int,
    dtype: torch.dtype,
) -> None:
    """Run a kernel; ``tensors`` has one for each of its arguments, feature axes of size 1 squeezed away."""
    schedule = kernel.config["schedule"]
    arguments: list[Any] = []
    for name, rank in kernel.config["arguments"]:
        x = tensors[name]
        if x.ndim != rank:
            raise ValueError(f"{name}: expected {rank} axes, got shape {tuple(x.shape)}")
        arguments += [x, *x.stride()]
    arguments += [length, heads]
    if kernel.config["place"]:
        arguments.append(place)
    options: dict[str, Any] = {"num_warps": schedule.num_warps}
    if schedule.maxnreg is not None:
        options["maxnreg"] = schedule.maxnreg
    kernel.function()[grid](*arguments, DOT=dot_dtype(dtype), PRECISION=precision(), **options)
