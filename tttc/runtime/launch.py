"""Launching a scan kernel on tensors, and saying what such a launch would compile."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tttc.codegen.kernel import Kernel
from tttc.codegen.resources import Request
from tttc.ir.errors import KernelTooLarge
from tttc.progress import phase

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
            torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1"}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel, a tensor for each of its arguments (feature axes of size 1 squeezed away), a grid."""

    kernel: Kernel
    tensors: Mapping[str, torch.Tensor]
    grid: tuple[int, ...]
    length: int
    heads: int
    place: int
    dtype: torch.dtype  # of the operands of matrix products

    @property
    def options(self) -> dict[str, Any]:
        """What Triton is told beside the arguments."""
        schedule = self.kernel.config["schedule"]
        options: dict[str, Any] = {
            "num_warps": schedule.num_warps,
            "num_stages": schedule.num_stages,
        }
        if schedule.maxnreg is not None:
            options["maxnreg"] = schedule.maxnreg
        return options

    @property
    def sizes(self) -> dict[str, int]:
        """The integer arguments after the tensors."""
        extra = {"place": self.place} if self.kernel.config["place"] else {}
        return {"T": self.length, "H": self.heads, **extra}

    def constants(self, fast: bool) -> dict[str, Any]:
        """The arguments that are compiled in; ``fast``: NVIDIA's own instructions where there are such."""
        return {"DOT": dot_dtype(self.dtype), "PRECISION": precision(), "FAST": fast}

    def request(self, fast: bool = False) -> Request:
        """What to compile to know the launch's resources, its integers specialised as a launch does."""
        signature: dict[str, str] = {}
        constants = self.constants(fast)
        aligned: list[str] = []
        integers: dict[str, int] = {}
        for name, rank in self.kernel.config["arguments"]:
            signature[name] = POINTERS[self.tensors[name].dtype]
            aligned.append(name)
            for i, n in enumerate(self.tensors[name].stride()[:rank]):
                integers[f"{name}_s{i}"] = n
                signature[f"{name}_s{i}"] = "i32"
        for name, n in self.sizes.items():
            integers[name] = n
            signature[name] = "i32"
        for name, n in integers.items():
            if n == 1:
                constants[name] = 1
                del signature[name]
            elif n % 16 == 0:
                aligned.append(name)
        return Request.of(
            self.kernel, signature, constexprs=constants, options=self.options, aligned=aligned
        )


def precision() -> str:
    """How float32 products are made, by torch's own setting (``torch.set_float32_matmul_precision``)."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def dot_dtype(dtype: torch.dtype) -> Any:
    """The dtype of the operands of matrix products, for tokens of a dtype."""
    import triton.language as tl

    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)


_launched: set[tuple[int, torch.dtype]] = set()


def launch(call: Launch) -> None:
    """Run a kernel.

    Raises:
        KernelTooLarge: where it takes more than the device has.
    """
    from triton.runtime.errors import OutOfResources

    arguments: list[Any] = []
    for name, rank in call.kernel.config["arguments"]:
        x = call.tensors[name]
        if rank and x.ndim != rank:
            raise ValueError(f"{name}: expected {rank} axes, got shape {tuple(x.shape)}")
        arguments += [x, *x.stride()[:rank]]
    arguments += call.sizes.values()
    fast = next(iter(call.tensors.values())).is_cuda and torch.version.hip is None
    first = (id(call.kernel), call.dtype) not in _launched  # kernels live as long as their program
    _launched.add((id(call.kernel), call.dtype))
    try:
        with phase("kernels", f"{call.kernel.name}: first launch") if first else nullcontext():
            call.kernel.function()[call.grid](*arguments, **call.constants(fast), **call.options)
    except OutOfResources as error:
        raise KernelTooLarge(f"{call.kernel.name}: {error}") from error
