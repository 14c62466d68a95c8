"""What is done to one mini-batch, for all of them: ``torch.vmap`` where sizes are not known yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._decomp.decompositions import matmul
from torch.overrides import TorchFunctionMode


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    y = matmul(x, weight.transpose(-1, -2) if weight.ndim > 1 else weight)
    return y if bias is None else y + bias


_PRODUCTS: dict[Any, Callable[..., Any]] = {
    torch.matmul: matmul,
    torch.Tensor.matmul: matmul,
    torch.Tensor.__matmul__: matmul,
    F.linear: _linear,
}


class _Products(TorchFunctionMode):
    """Takes products apart in Python: for ``vmap`` ATen does it, which asks for sizes as numbers.

    Of ``linear`` with a bias PyTorch 2.13 does so still, of all of them 2.11.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _PRODUCTS.get(func, func)(*args, **(kwargs or {}))


def for_all(f: Callable[..., Any], *xs: torch.Tensor) -> Any:
    """``f`` for each of the first dimension of its arguments, results stacked along theirs."""
    with _Products():
        return torch.vmap(f)(*xs)
