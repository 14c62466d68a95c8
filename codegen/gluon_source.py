"""Source of Gluon, made of what the renderer of plain Triton writes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tttc.codegen.words import WORDS

START_COPY = """

@gluon.jit
def start_copy(target, address):
    if address.dtype.element_ty == target.dtype:
        async_copy.async_copy_global_to_shared(target, address)
    else:
        target.store(gl.load(address).to(target.dtype))

"""


def in_gluon(
    header: Sequence[str], body: Sequence[str], imports: Sequence[str], definitions: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Header and body of a kernel in Gluon: its imports, definitions before the kernel, its names for Triton's."""
    start = header.index("import triton")
    made = [
        *header[:start],
        "from triton.experimental import gluon",
        "from triton.experimental.gluon import language as gl",
        *imports,
        "",
        *definitions,
        *header[start + 2 :],
    ]
    return [_named(line) for line in made], [_named(line) for line in body]


def for_warps(
    header: Sequence[str], body: Sequence[str], before: Sequence[str], after: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """The same for products of single warps, numbers copied by words; definitions before those of copies and after."""
    return in_gluon(
        header,
        body,
        ["from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2"],
        [*before, *START_COPY.splitlines(), *WORDS.splitlines(), *after],
    )


def _named(line: str) -> str:
    line = line.replace("@triton.jit", "@gluon.jit").replace("tl.range(", "range(")
    return re.sub(r"\btl\.", "gl.", line)
