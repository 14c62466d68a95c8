"""Resource figures without a GPU, also where this process runs Triton's interpreter."""

from __future__ import annotations

import pytest
import triton.language as tl
from tttc.codegen.kernel import Kernel
from tttc.codegen.resources import TARGETS, Request, ResourceError, measure

SOURCE = """
import triton
import triton.language as tl


@triton.jit
def product(x, y, n, N: tl.constexpr, DTYPE: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    a = tl.load(x + at, at < n, other=0.0)
    tl.store(y + at, tl.dot(a, a).to(DTYPE))
"""
SIGNATURE = {"x": "*bf16", "y": "*bf16", "n": "i32"}


def request(**changes):
    rest = {
        "constexprs": {"N": 64, "DTYPE": tl.bfloat16},
        "options": {"num_warps": 4},
        "aligned": ["x", "y"],
        **changes,
    }
    return Request.of(Kernel("product", SOURCE), SIGNATURE, **rest)


@pytest.mark.parametrize("target", TARGETS)
def test_figures_of_a_small_kernel(target):
    (got,) = measure([request()], target)
    assert 16 <= got.registers <= 256
    assert got.spill_bytes == 0
    assert 64 * 64 * 2 <= got.shared_bytes <= 64 * 1024
    assert "registers" in str(got)


def test_spills_are_seen_and_several_kernels_share_a_process():
    tight = request(
        constexprs={"N": 128, "DTYPE": tl.bfloat16}, options={"num_warps": 4, "maxnreg": 32}
    )
    one, other = measure([tight, request()], "sm_80")
    assert one.spill_bytes > 0 and one.registers <= 32
    assert other.spill_bytes == 0


def test_errors_name_kernel_and_target():
    with pytest.raises(ResourceError, match=r"product for sm_90: .*no value for N"):
        measure([request(constexprs={"DTYPE": tl.bfloat16})], "sm_90")
    with pytest.raises(ValueError, match="target: expected a name like sm_90"):
        measure([request()], "hopper")
    with pytest.raises(TypeError, match="constexprs"):
        measure([request(constexprs={"N": [64], "DTYPE": tl.bfloat16})])
    assert measure([]) == []
