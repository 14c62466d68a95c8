"""How the elementwise functions of the IR are written in Triton."""

from __future__ import annotations

import math
from typing import Any

FUNCTIONS: dict[str, str] = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "neg": "-{0}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "reciprocal": "reciprocal({0}, FAST)",
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "log1p": "tl.log(1.0 + {0})",
    "expm1": "tl.exp({0}) - 1.0",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "tl.rsqrt({0})",
    "sin": "tl.sin({0})",
    "cos": "tl.cos({0})",
    # exp overflows to infinity, where this is 1, as it should be.
    "tanh": "1.0 - 2.0 * reciprocal(tl.exp2({0} * 2.8853900817779268) + 1.0, FAST)",
    "sigmoid": "reciprocal(1.0 + tl.exp2({0} * -1.4426950408889634), FAST)",
    "erf": "tl.erf({0})",
    "abs": "tl.abs({0})",
    "sign": "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, {0} * 0.0))",
    "pow": "tl.exp2({1} * tl.log2({0}))",
    "maximum": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "where": "tl.where({0}, {1}, {2})",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "not": "({0} == 0)",
    "isnan": "{0} != {0}",
    "float": "({0}).to(tl.float32)",
}


# One instruction, within one unit in the last place, where Triton's division takes about eight.
RECIPROCAL = """@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


"""


def number(x: Any) -> str:
    """A Python number as Triton source."""
    if isinstance(x, bool):
        return "1" if x else "0"
    if isinstance(x, float) and not math.isfinite(x):
        return f'float("{x}")'
    return repr(float(x))
