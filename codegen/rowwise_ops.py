"""How a pointwise ATen operator is written in Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tttc.ir.row_operators import CASTS
from tttc.ir.row_steps import Step

aten = torch.ops.aten


class NotEmittableError(Exception):
    """A region that has no Triton kernel; it runs by torch operations."""


NAMES = {
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bool: "tl.int1",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
    torch.int16: "tl.int16",
    torch.int32: "tl.int32",
    torch.int64: "tl.int64",
}


def computed_as(dtype: torch.dtype) -> torch.dtype:
    """The type in which values of a dtype are held on chip: halves in float32, all others as they are."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def literal(number: Any, dtype: torch.dtype) -> str:
    """A Python number as a Triton constant for values computed in ``dtype``."""
    if dtype.is_floating_point:
        number = float(number)
        plain = number == number and abs(number) != float("inf")
        text = repr(number) if plain else f'float("{number}")'
        # A bare constant is rounded to float32 first.
        return f"tl.full((), {text}, tl.float64)" if dtype == torch.float64 else text
    return str(bool(number) if dtype == torch.bool else int(number))


# Written into the kernels that use them.
HELPERS = {
    "tanh": '''
@triton.jit
def tanh(x):
    """Without overflow, and without cancellation near zero."""
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    s = x * x
    near = x * (1 - s * (1 / 3 - s * (2 / 15 - s * (17 / 315))))
    return tl.where(tl.abs(x) < 0.1, near, tl.where(x < 0, -far, far))
''',
    "log1p": '''
@triton.jit
def log1p(x):
    """The rounding error of 1 + x divided out."""
    u = 1 + x
    exact = tl.log(u) * (x / (u - 1))
    return tl.where(u == 1, x, tl.where(u == float("inf"), u, exact))
''',
    "nan_max": """
@triton.jit
def nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
""",
    "nan_min": """
@triton.jit
def nan_min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
""",
}


def _table(overload: str, **forms: str) -> dict[Any, str]:
    return {getattr(getattr(aten, name), overload): form for name, form in forms.items()}


_ARITHMETIC = {
    **_table("Tensor", mul="{0} * {1}", div="{0} / {1}", true_divide="{0} / {1}"),
    **_table("Scalar", mul="{0} * {1}", div="{0} / {1}"),
    **_table(
        "default",
        abs="tl.abs({0})",
        maximum="nan_max({0}, {1})",
        minimum="nan_min({0}, {1})",
        neg="-{0}",
        # Written so that a NaN falls through the comparison.
        relu="tl.where({0} < 0, 0, {0})",
        square="{0} * {0}",
    ),
}
_SUMS = {*_table("Tensor", add="", sub=""), *_table("Scalar", add="", sub="", rsub="")}
_FLOAT_ONLY = _table(
    "default",
    ceil="tl.ceil({0})",
    cos="tl.cos({0})",
    erf="tl.erf({0})",
    exp="tl.exp({0})",
    exp2="tl.exp2({0})",
    floor="tl.floor({0})",
    log="tl.log({0})",
    log1p="log1p({0})",
    log2="tl.log2({0})",
    reciprocal="1 / {0}",
    rsqrt="tl.rsqrt({0})",
    sigmoid="tl.sigmoid({0})",
    sign="({0} > 0).to({dtype}) - ({0} < 0).to({dtype})",
    sin="tl.sin({0})",
    sqrt="tl.sqrt({0})",
    tanh="tanh({0})",
)
_COMPARISONS = {
    key: form
    for overload in ("Tensor", "Scalar")
    for key, form in _table(
        overload,
        eq="{0} == {1}",
        ne="{0} != {1}",
        lt="{0} < {1}",
        le="{0} <= {1}",
        gt="{0} > {1}",
        ge="{0} >= {1}",
    ).items()
} | _table("default", isnan="{0} != {0}", isinf='tl.abs({0}) == float("inf")')
_LOGICAL = _table("default", logical_and="{0} & {1}", logical_or="{0} | {1}", logical_not="~{0}")
_BITWISE = {
    **_table("Tensor", bitwise_and="{0} & {1}", bitwise_or="{0} | {1}"),
    **_table("default", bitwise_not="~{0}"),
}
FORMS = {**_ARITHMETIC, **_FLOAT_ONLY, **_COMPARISONS, **_LOGICAL, **_BITWISE}

# Takes an operand's place among the arguments and the type it is wanted in.
Operand = Callable[[int, torch.dtype], str]


def _sum(step: Step, x: Operand, dtype: torch.dtype) -> str:
    """``a + alpha*b``, ``a - alpha*b``, and rsub's ``b - alpha*a``."""
    first, second = (1, 0) if step.node.target is aten.rsub.Scalar else (0, 1)
    sign = "+" if step.node.target in (aten.add.Tensor, aten.add.Scalar) else "-"
    alpha = step.args[2] if len(step.args) > 2 else 1
    factor = "" if alpha == 1 else f"{literal(alpha, dtype)} * "
    return f"{x(first, dtype)} {sign} {factor}{x(second, dtype)}"


def _clamp(step: Step, x: Operand, dtype: torch.dtype) -> str:
    low, high = step.args[1] if len(step.args) > 1 else None, None
    if step.node.target is aten.clamp.default:
        high = step.args[2] if len(step.args) > 2 else None
    elif step.node.target is aten.clamp_max.default:
        low, high = None, low
    # Comparisons that are false for NaN, and the upper bound last, as in torch.
    value = x(0, dtype)
    if low is not None:
        value = f"tl.where({value} < {x(1, dtype)}, {x(1, dtype)}, {value})"
    if high is not None:
        bound = literal(high, dtype)
        value = f"tl.where({value} > {bound}, {bound}, {value})"
    return value


def _power(step: Step, x: Operand, dtype: torch.dtype) -> str:
    base, exponent = x(0, dtype), step.args[1]
    if not isinstance(exponent, (int, float)):
        raise NotEmittableError("a power that is a size")
    if exponent == int(exponent) and 1 <= exponent <= 8:
        return " * ".join([base] * int(exponent))
    if not dtype.is_floating_point:
        raise NotEmittableError("a power of integers")
    if exponent == int(exponent) and -8 <= exponent <= -1:
        return f"1 / ({' * '.join([base] * -int(exponent))})"
    if exponent in (0.5, -0.5):
        return f"{'tl.sqrt' if exponent > 0 else 'tl.rsqrt'}({base})"
    if exponent == 0:
        return f"tl.where({base} == {base}, {literal(1, dtype)}, {literal(1, dtype)})"
    return f"tl.exp2({literal(exponent, dtype)} * tl.log2({base}))"


def _remainder(step: Step, x: Operand, dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        raise NotEmittableError("a remainder of floats")
    a, b = x(0, dtype), x(1, dtype)
    return f"(({a} % {b}) + {b}) % {b}"  # the sign of the divisor, as in torch; % is C's


def cast(value: str, source: torch.dtype, target: torch.dtype) -> str:
    """A value held as ``source`` turned into one held as ``target``."""
    if source == target:
        return value
    if target == torch.bool:
        return f"({value} != 0)"
    return f"{value}.to({NAMES[target]})"


def pointwise(step: Step, x: Operand, operand_dtypes: list[torch.dtype]) -> str:
    """The Triton expression of a pointwise step."""
    target, dtype = step.node.target, computed_as(step.dtype)
    if target in CASTS:
        value = x(0, dtype)
        # The cast is where torch rounds to the half type.
        return value if dtype == step.dtype else f"{value}.to({NAMES[step.dtype]}).to(tl.float32)"
    if target is aten.where.self:
        return f"tl.where({x(0, torch.bool)}, {x(1, dtype)}, {x(2, dtype)})"
    if target in _COMPARISONS:
        values: list[Any] = [
            a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in step.node.args
        ]
        common = torch.result_type(values[0], values[1]) if len(values) == 2 else operand_dtypes[0]
        dtype = computed_as(common)
    elif target in _LOGICAL:
        dtype = torch.bool
    elif target not in _BITWISE and dtype == torch.bool:
        raise NotEmittableError(f"arithmetic of booleans in {step.node.target}")
    if (target in _FLOAT_ONLY or target is aten.isinf.default) and not dtype.is_floating_point:
        raise NotEmittableError(f"{step.node.target} of integers")
    if target in FORMS:
        return FORMS[target].format(
            *(x(i, dtype) for i in range(len(step.args))), dtype=NAMES[dtype]
        )
    if target in _SUMS:
        return _sum(step, x, dtype)
    if target is aten.pow.Tensor_Scalar:
        return _power(step, x, dtype)
    if target in (aten.remainder.Tensor, aten.remainder.Scalar):
        return _remainder(step, x, dtype)
    if target in (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default):
        return _clamp(step, x, dtype)
    raise NotEmittableError(f"no Triton form of {target}")
