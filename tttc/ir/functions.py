"""The elementwise functions of the IR, each as a torch function of tensors or numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Function(NamedTuple):
    """An elementwise function: what runs it, and whether it is linear in all, one or none of its operands."""

    torch: Callable[..., Any]
    linear: str = (
        ""  # "sum": linear in all together; "product": in each alone; "first": in the first
    )


def _binary(f: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Any, y: Any) -> Any:
        if not isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            x = torch.full((), x, dtype=y.dtype, device=y.device)
        elif not isinstance(y, torch.Tensor) and isinstance(x, torch.Tensor):
            y = torch.full((), y, dtype=x.dtype, device=x.device)
        return f(x, y)

    return run


def _where(condition: Any, x: Any, y: Any) -> Any:
    like = next((v for v in (x, y) if isinstance(v, torch.Tensor)), None)
    if like is None:
        like = torch.zeros((), dtype=torch.get_default_dtype(), device=condition.device)
    x, y = (
        v
        if isinstance(v, torch.Tensor)
        else torch.full((), v, dtype=like.dtype, device=like.device)
        for v in (x, y)
    )
    return torch.where(condition, x, y)


FUNCTIONS: dict[str, Function] = {
    "add": Function(lambda x, y: x + y, "sum"),
    "sub": Function(lambda x, y: x - y, "sum"),
    "neg": Function(lambda x: -x, "sum"),
    "mul": Function(lambda x, y: x * y, "product"),
    "div": Function(lambda x, y: x / y, "first"),
    "reciprocal": Function(lambda x: 1.0 / x),
    "exp": Function(torch.exp),
    "log": Function(torch.log),
    "log1p": Function(torch.log1p),
    "expm1": Function(torch.expm1),
    "sqrt": Function(torch.sqrt),
    "rsqrt": Function(torch.rsqrt),
    "sin": Function(torch.sin),
    "cos": Function(torch.cos),
    "tanh": Function(torch.tanh),
    "sigmoid": Function(torch.sigmoid),
    "erf": Function(torch.erf),
    "abs": Function(torch.abs),
    "sign": Function(torch.sign),
    "pow": Function(lambda x, y: x**y),
    "maximum": Function(_binary(torch.maximum)),
    "minimum": Function(_binary(torch.minimum)),
    "where": Function(_where),
    "gt": Function(lambda x, y: x > y),
    "ge": Function(lambda x, y: x >= y),
    "lt": Function(lambda x, y: x < y),
    "le": Function(lambda x, y: x <= y),
    "eq": Function(lambda x, y: x == y),
    "ne": Function(lambda x, y: x != y),
    "and": Function(lambda x, y: x & y),
    "or": Function(lambda x, y: x | y),
    "not": Function(lambda x: ~x),
    "isnan": Function(torch.isnan),
    "float": Function(lambda x, like: x.to(like.dtype)),
}
