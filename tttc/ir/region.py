"""A fused region: a piece of the model graph that passes over memory once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx


class FusedRegion(torch.nn.Module):
    """Memory-bound operations outlined into one call.

    ``graph_module`` holds them as a graph of its own and runs them by torch operations. A code generator may
    set ``launch``, which takes the same arguments and returns the same values, or None where these arguments
    are not for it.
    """

    launch: Callable[..., Any] | None

    def __init__(
        self, graph_module: fx.GraphModule, bytes_before: sympy.Expr, bytes_after: sympy.Expr
    ) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.bytes_before = bytes_before
        self.bytes_after = bytes_after
        self.launch = None

    def forward(self, *args: Any) -> Any:
        """The region's outputs: a tensor, or a tuple of several."""
        if self.launch is not None:
            out = self.launch(*args)
            if out is not None:
                return out
        return self.graph_module(*args)
