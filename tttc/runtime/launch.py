"""Launching a scan kernel on tensors, and saying what such a launch would compile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from tttc.codegen.assembler import Miscompiled, assembled
from tttc.codegen.kernel import Kernel
from tttc.codegen.resources import Request
from tttc.codegen.triton_ready import wait_for_triton
from tttc.ir.errors import KernelTooLarge, NotLowerable
from tttc.progress import phase
from tttc.runtime.beside import Aside

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
            torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1"}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel, a tensor for each of its arguments (feature axes of size 1 squeezed away), a grid.

    ``aside``: it runs beside those that come next. ``after``: it waits for one that does.
    """

    kernel: Kernel
    tensors: Mapping[str, torch.Tensor]
    grid: tuple[int, ...]
    length: int
    heads: int
    place: int
    dtype: torch.dtype  # of the operands of matrix products
    aside: Aside | None = None
    after: Aside | None = None

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(iter(self.tensors.values())).device

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
        constants = {"DOT": dot_dtype(self.dtype), "PRECISION": precision(), "FAST": fast}
        if self.kernel.config["whole"]:  # whether the last mini-batch is
            constants["WHOLE"] = self.length % self.kernel.config["mini_batch_size"] == 0
        return constants

    def request(self, fast: bool = False) -> Request:
        """What to compile to know the launch's resources, its integers specialised as a launch does."""
        signature: dict[str, str] = {}
        constants = self.constants(fast)
        aligned: list[str] = []
        integers: dict[str, int] = {}
        for name, rank in self.kernel.config["arguments"]:
            x = self.tensors[name]
            signature[name] = POINTERS[x.dtype]
            # Tokens after the first of a row of scalars may lie anywhere; meta tensors lie at 0.
            if x.data_ptr() % 16 == 0:
                aligned.append(name)
            for i, n in enumerate(x.stride()[:rank]):
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


log = logging.getLogger("tttc.kernels")
MOST_KNOWN = 512  # layouts of a kernel's arguments that are remembered


def launch(call: Launch) -> None:
    """Run a kernel.

    Triton works out for every argument what it may compile in (a stride of 1, an address that is a multiple of 16).
    That takes longer than many a kernel runs: what it found for arguments laid out the same way is kept.

    Raises:
        KernelTooLarge: where it takes more than the device has.
        NotLowerable: where no assembler gets it right.
    """
    if call.after is not None:
        call.after.join()
    if call.aside is not None:
        call.aside.start(partial(launch, replace(call, aside=None, after=None)))
        return
    kernel = call.kernel
    if kernel.refused and kernel.instead is not None:
        launch(replace(call, kernel=kernel.instead()))
        return
    device = next(iter(call.tensors.values())).get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(call)
        return
    arguments, known = _laid_out(call)
    compiled = kernel.compiled.get(known)
    if compiled is not None:
        found, constants = compiled
        found[_grid(call)](*arguments, *constants)
        return
    _first_launch(call, arguments, known)


def prepared(call: Launch) -> tuple[Callable[..., Any], list[Any]] | None:
    """What a launch that was made before calls, on which arguments; None where that is not known."""
    kernel = call.kernel
    if kernel.refused and kernel.instead is not None:
        return prepared(replace(call, kernel=kernel.instead()))
    arguments, known = _laid_out(call)
    compiled = kernel.compiled.get(known)
    if compiled is None:
        return None
    found, constants = compiled
    return found[_grid(call)], [*arguments, *constants]


def _grid(call: Launch) -> tuple[int, ...]:
    return (*call.grid, 1, 1)[:3]


def _laid_out(call: Launch) -> tuple[list[Any], tuple[Any, ...]]:
    """The arguments of a launch, and what of their layout is compiled in."""
    device = next(iter(call.tensors.values())).get_device()
    arguments: list[Any] = []
    layout: list[Any] = [device, call.dtype, call.length, call.heads, call.place, precision()]
    for name, rank in call.kernel.config["arguments"]:
        x = call.tensors[name]
        if rank and x.ndim != rank:
            raise ValueError(f"{name}: expected {rank} axes, got shape {tuple(x.shape)}")
        strides = x.stride()[:rank]
        arguments.append(x)
        arguments += strides
        layout += (x.dtype, x.data_ptr() % 16, strides)
    arguments += call.sizes.values()
    return arguments, tuple(layout)


def _compiled(call: Launch, arguments: list[Any], constants: dict[str, Any]) -> Any:
    """Compile a kernel, on an NVIDIA GPU by the assembler that gets it right, and launch it."""
    function, options = call.kernel.function(), call.options
    if constants["FAST"]:

        def made(more: dict[str, Any]) -> Any:
            return function.warmup(*arguments, grid=call.grid, **constants, **options, **more)

        try:
            options |= assembled(made)[0]
        except Miscompiled as error:
            raise NotLowerable(f"{call.kernel.name}: {error}") from error
    return function[call.grid](*arguments, **constants, **options)


def _first_launch(call: Launch, arguments: list[Any], known: tuple[Any, ...]) -> None:
    from triton.runtime.errors import OutOfResources

    wait_for_triton()
    kernel = call.kernel
    fast = next(iter(call.tensors.values())).is_cuda and torch.version.hip is None
    constants = call.constants(fast)
    first = not kernel.compiled
    try:
        with phase("kernels", f"{kernel.name}: first launch") if first else nullcontext():
            found = _compiled(call, arguments, constants)
    except Exception as error:
        too_large = isinstance(error, OutOfResources)
        if kernel.instead is not None:
            # Gluon is young: what it does not compile runs by plain Triton, and says so.
            log.log(
                logging.INFO if too_large else logging.WARNING,
                "%s under %s: %s", kernel.name, kernel.config["schedule"], error,
            )  # fmt: skip
            kernel.refused = True
            launch(call)
            return
        if too_large:
            raise KernelTooLarge(f"{kernel.name}: {error}") from error
        raise
    if len(kernel.compiled) >= MOST_KNOWN:
        kernel.compiled.clear()
    if found is not None:  # the interpreter compiles nothing
        kernel.compiled[known] = found, tuple(constants.values())
