"""What of a launch is compiled into a kernel, and the kernel that Triton makes of it.

Triton compiles in whether an address is a multiple of 16 and whether an integer is 1 or a multiple of 16, beside dtypes and
constants. Launches that agree in all of that share machine code; it can be made before any of them, from stand-ins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from tttc.codegen.assembler import assembled
from tttc.codegen.beside_others import alone, together
from tttc.codegen.kernel import Kernel
from tttc.codegen.triton_ready import begin_triton, wait_for_triton

SMALL = 1 << 31  # bytes: AMD's compiler reads and writes smaller tensors by shorter addresses
Argument = tuple[torch.dtype, bool, bool] | tuple[bool, bool, bool]


def argument(x: torch.Tensor | int) -> Argument:
    """Of a tensor its dtype, whether it is aligned and whether it is small; of an integer whether it is 1, a multiple of
    16, and of 32 bits.

    Example:
        >>> argument(torch.empty(4)), argument(48)
        ((torch.float32, True, True), (False, True, True))
    """
    if isinstance(x, torch.Tensor):
        small = torch.version.hip is None or x.untyped_storage().nbytes() < SMALL
        return x.dtype, x.data_ptr() % 16 == 0, small
    return x == 1, x % 16 == 0, -(2**31) <= x < 2**31


class _Pointer:
    """A tensor as Triton looks at it when it compiles."""

    def __init__(self, dtype: torch.dtype, aligned: bool, small: bool) -> None:
        self.dtype, self._aligned, self._small = dtype, aligned, small

    def data_ptr(self) -> int:
        return 0 if self._aligned else 1

    def ptr_range(self) -> int:
        return 0 if self._small else SMALL

    def stride(self) -> tuple[int, ...]:
        return (1,)


def _stand_in(x: Argument) -> Any:
    first, second, third = x
    if isinstance(first, torch.dtype):
        return _Pointer(first, second, third)
    if first:
        return 1
    return (16 if second else 17) + (0 if third else 1 << 40)


@dataclass(frozen=True)
class Specialised:
    """A function of a kernel for launches that share machine code.

    Attributes:
        kernel: that it is of.
        name: tells it apart within the kernel.
        arguments: those before the constants, each as :func:`argument` says it.
        constants: values that are compiled in, by name, in the order of the function.
        options: what Triton is told beside.
        function: gives the ``triton.jit`` function.
    """

    kernel: Kernel
    name: str
    arguments: tuple[Argument, ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]
    function: Callable[[], Any] = field(compare=False, repr=False)

    def digest(self, *more: Any) -> str:
        """Told apart by what decides on machine code, and whatever else is given."""
        parts = (self.kernel.source, self.name, self.arguments, self.constants, self.options, more)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def compiled(self) -> Any:
        """What Triton makes of it, by an assembler that gets it right.

        Raises:
            Miscompiled: where there is none.
        """
        begin_triton()
        wait_for_triton()
        function, given = self.function(), [_stand_in(x) for x in self.arguments]
        said = dict(self.constants) | dict(self.options)

        def made(more: dict[str, Any]) -> Any:
            with nullcontext() if more else together():  # more: of one that compiles alone
                return function.warmup(*given, grid=(1,), **said, **more)

        return assembled(made, alone)[1]

    def all_arguments(self, passed: Iterable[int], which: Iterable[int]) -> list[Any]:
        """The arguments of a launch, constants too, from those that are passed on and their places."""
        known = dict(zip(which, passed, strict=True))
        given = [
            known.get(i, 1) for i in range(len(self.arguments))
        ]  # an integer of 1 is compiled in
        return [*given, *(value for _, value in self.constants)]
