"""The operators that are evaluated row by row, by what they take: an element, a row, all rows, or a choice of two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tttc.ir.index_maps import COPIES, VIEWS
from tttc.ir.total import total

aten = torch.ops.aten
prims = torch.ops.prims

CASTS = frozenset([aten._to_copy.default, prims.convert_element_type.default])


def _overloads(overload: str, names: str) -> list[Any]:
    return [getattr(getattr(aten, name), overload) for name in names.split()]


POINTWISE = CASTS | frozenset(
    [
        *_overloads("Tensor", "add sub mul div remainder bitwise_and bitwise_or eq ne lt le gt ge"),
        *_overloads("Scalar", "add sub mul div remainder rsub eq ne lt le gt ge"),
        *_overloads(
            "default", "abs ceil cos erf exp exp2 floor log log1p log2 neg reciprocal relu"
        ),
        *_overloads("default", "rsqrt sigmoid sign sin sqrt square tanh isinf isnan"),
        *_overloads("default", "logical_and logical_not logical_or bitwise_not"),
        *_overloads("default", "maximum minimum clamp clamp_min clamp_max"),
        aten.true_divide.Tensor,
        aten.pow.Tensor_Scalar,
        aten.where.self,
    ]
)
# Many instructions, with a branch for large arguments: computed once rather than wherever they are broadcast to.
SLOW = frozenset([aten.cos.default, aten.sin.default])
REDUCTIONS = frozenset([aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default])
CHOICES = frozenset(
    [
        aten.cat.default,
        aten.slice_scatter.default,
        aten.select_scatter.default,
        aten.constant_pad_nd.default,
    ]
)
# Values that need no memory: made again wherever they are used.
CONSTANTS: dict[Any, Callable[[fx.Node], Any]] = {
    aten.full.default: lambda node: node.args[1],
    aten.full_like.default: lambda node: node.args[1],
    aten.scalar_tensor.default: lambda node: node.args[0],
    aten.zeros.default: lambda node: 0,
    aten.zeros_like.default: lambda node: 0,
    aten.ones.default: lambda node: 1,
    aten.ones_like.default: lambda node: 1,
}
RANGES: dict[Any, Callable[[fx.Node], tuple[Any, Any]]] = {
    aten.arange.default: lambda node: (0, 1),
    aten.arange.start: lambda node: (node.args[0], 1),
    aten.arange.start_step: lambda node: (node.args[0], (*node.args, 1)[2]),
    prims.iota.default: lambda node: (node.kwargs["start"], node.kwargs["step"]),
}
# Nothing to compute and nothing to keep: copied into every region that reads through them.
FREE = frozenset([*VIEWS, *CONSTANTS, *RANGES])
TOTALS = frozenset([total])
# Reads at places that a tensor of integers says; known where these follow from the position.
LOOKUPS = frozenset([aten.index.Tensor])
COMPUTE = frozenset([*POINTWISE, *REDUCTIONS, *TOTALS, *CHOICES, *COPIES, *LOOKUPS])
DTYPES = frozenset(
    [
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
    ]
)
