"""Launching a scan kernel on tensors, and saying what such a launch would compile."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from tttc.codegen.assembler import Miscompiled
from tttc.codegen.executable import Executable, Grid, begin, executable
from tttc.codegen.kernel import Kernel
from tttc.codegen.resources import Request
from tttc.codegen.specialised import Specialised, argument
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

    To work out for every argument what is compiled in (a stride of 1, an address that is a multiple of 16) takes longer than
    many a kernel runs: what was found for arguments laid out the same way is kept.

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
    pointers, known = _laid_out(call)
    found = kernel.compiled.get(known)
    if found is None:
        _first_launch(call, pointers, known)
    else:
        found.start(_grid(call), found.passed(pointers))


def prepared(call: Launch) -> tuple[Executable, Grid, list[Any]] | None:
    """What a launch that was made before starts, over which grid, on which tensors and integers; None where that is not
    known.
    """
    kernel = call.kernel
    if kernel.refused and kernel.instead is not None:
        return prepared(replace(call, kernel=kernel.instead()))
    found = kernel.compiled.get(_laid_out(call)[1])
    return None if found is None else (found, _grid(call), found.passed(_arguments(call)))


def compile_ahead(call: Launch, device: torch.device) -> None:
    """Begin to compile a kernel for a GPU in another thread; ``call`` may be on tensors without values."""
    kernel = call.kernel
    try:
        if kernel.refused and kernel.instead is not None:
            kernel = kernel.instead()
        begin(_specialised(replace(call, kernel=kernel), fast()), device.index or 0)
    except Exception as error:  # it is compiled when it is launched, and says what is wrong then
        log.info("%s is not compiled ahead: %s", kernel.name, error)


def fast() -> bool:
    """Whether kernels for the GPU at hand use NVIDIA's own instructions."""
    return torch.version.hip is None


def _grid(call: Launch) -> Grid:
    x, y, z = (*call.grid, 1, 1)[:3]
    return x, y, z


def _arguments(call: Launch) -> list[Any]:
    """The arguments of a launch before those that are compiled in."""
    arguments: list[Any] = []
    for name, rank in call.kernel.config["arguments"]:
        x = call.tensors[name]
        arguments += (x, *x.stride()[:rank])
    return [*arguments, *call.sizes.values()]


def _laid_out(call: Launch) -> tuple[list[int], tuple[Any, ...]]:
    """The arguments of a launch, addresses for tensors, and what of their layout is compiled in."""
    device = next(iter(call.tensors.values())).get_device()
    arguments: list[int] = []
    layout: list[Any] = [device, call.dtype, call.length, call.heads, call.place, precision()]
    for name, rank in call.kernel.config["arguments"]:
        x = call.tensors[name]
        if rank and x.ndim != rank:
            raise ValueError(f"{name}: expected {rank} axes, got shape {tuple(x.shape)}")
        strides, address = x.stride()[:rank], x.data_ptr()
        arguments += (address, *strides)
        layout += (x.dtype, address % 16, strides)
    arguments += call.sizes.values()
    return arguments, tuple(layout)


def _specialised(call: Launch, fast: bool) -> Specialised:
    kernel = call.kernel
    return Specialised(
        kernel,
        kernel.name,
        tuple(argument(x) for x in _arguments(call)),
        tuple(call.constants(fast).items()),
        tuple(call.options.items()),
        kernel.function,
    )


def _first_launch(call: Launch, pointers: list[int], known: tuple[Any, ...]) -> None:
    from triton.runtime.errors import OutOfResources

    kernel = call.kernel
    first = not kernel.compiled
    try:
        with phase("kernels", f"{kernel.name}: first launch") if first else nullcontext():
            found = _started(call, pointers)
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
        if isinstance(error, Miscompiled):
            raise NotLowerable(f"{kernel.name}: {error}") from error
        raise
    if found is not None:
        if len(kernel.compiled) >= MOST_KNOWN:
            kernel.compiled.clear()
        kernel.compiled[known] = found


def _started(call: Launch, pointers: list[int]) -> Executable | None:
    """What was compiled and started; None of the interpreter, which compiles nothing."""
    from triton import knobs

    if knobs.runtime.interpret:
        constants = call.constants(fast=False)
        call.kernel.function()[call.grid](*_arguments(call), **constants, **call.options)
        return None
    device = next(iter(call.tensors.values())).get_device()
    found = executable(_specialised(call, fast()), device)
    found.start(_grid(call), found.passed(pointers))
    return found
