"""Kernels that ptxas 12.8 gets wrong are assembled by a newer one.

A matrix product of warpgroups finds an operand in shared memory by a descriptor of 64 bits. Where rows of the operand
are 64 bytes or fewer (32 tokens of bf16, say) the highest bit is set, and the descriptors of one operand are sums of
its address and numbers that are negative::

    cvt.u64.u32  %rd215, %r579;                             address / 16
    or.b64       %rd234, %rd215, -9223371899415822336;      the first part of the operand
    add.s64      %rd235, %rd215, -9223371899415822272;      the next, 1024 bytes on
    add.s64      %rd242, %rd215, -9223371899415822334;      32 bytes on

Where there are many, ptxas 12.8 (Triton 3.6 and 3.7 assemble for sm_90 by it) adds to uniform registers that hold
something else, at every level of optimisation::

    UIADD3 UR25, UP0, UR25, 0x2, URZ ;                      UR25: never written
    UIADD3.X UR7, UR7, -0x7fffffe0, URZ, UP0, !UPT ;        UR7: a stride

Of the 110 descriptors in the backward of LaCT's chunks 60 were wrong: gradients were wrong by orders of magnitude, the same
each time, or there was an illegal memory access. The interpreter and emulations of the PTX show nothing of it. ptxas
12.9 and 13.1, which Triton 3.6 and 3.7 bring along for sm_100, make what the PTX says, as does 12.8 of sums of the first
descriptor and small numbers.

Compiling processes run this file by itself: nothing of ours is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

RIGHT_FROM = (12, 9)
# What ptxas does without being told: Triton's caches tell kernels apart by options, not by assemblers.
LEVEL = "--opt-level 3"
_SUM = re.compile(r"add\.s64\s+%rd\d+, %rd\d+, -\d{17,};")


class Miscompiled(RuntimeError):
    """There is no assembler that gets a kernel right."""


def assembled(
    compiled: Callable[[dict[str, Any]], Any],
    alone: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[dict[str, Any], Any]:
    """A kernel by the assembler that Triton takes, or by a newer one where that gets it wrong.

    Args:
        compiled: compiles it under some more of Triton's options.
        alone: within it nothing else is compiled, which would be assembled by the newer one as well.

    Returns:
        The options, and what Triton made.

    Raises:
        Miscompiled: where there is no newer one.
    """
    kernel = compiled({})
    if not misread(kernel.asm.get("ptx", "")):
        return {}, kernel
    from triton import knobs

    tool = knobs.nvidia.ptxas
    if _version(tool) >= RIGHT_FROM:
        return {}, kernel
    newer = knobs.nvidia.ptxas_blackwell
    if _version(newer) < RIGHT_FROM:
        raise Miscompiled(f"ptxas {tool.version} gets descriptors of operands wrong")
    with alone(), knobs.nvidia.scope():
        knobs.nvidia.ptxas = newer.path
        options = {"ptx_options": " ".join(filter(None, (knobs.nvidia.ptxas_options, LEVEL)))}
        return options, compiled(options)


def misread(ptx: str) -> bool:
    """Whether descriptors of matrix products are sums that ptxas 12.8 gets wrong.

    Example:
        >>> misread("wgmma.mma_async ... add.s64 %rd2, %rd1, -9223371899415822272;")
        True
        >>> misread("wgmma.mma_async ... add.s64 %rd2, %rd1, 4611686293305294912;")
        False
    """
    return "wgmma" in ptx and _SUM.search(ptx) is not None


def _version(tool: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in tool.version.split("."))
