"""A causal depthwise convolution whose state can be carried from call to call."""

from __future__ import annotations

import math

import torch
from torch import nn

from tttc._checks import check_positive


class CausalConv(nn.Module):
    """Every channel convolved over time with its own few weights, looking backwards only.

    ``y[t] = bias + sum_j weight[:, j] * x[t - kernel + 1 + j]``, with zeros before the sequence.

    Args:
        channels: number of channels.
        kernel: width of the convolution.
        device, dtype: of the parameters.

    Shapes:
        x ``[B, T, channels]``, floating; the state ``[B, kernel - 1, channels]``; y as x, in x's dtype.
        Products are summed in float32 at least.

    Raises:
        ValueError: ``kernel`` or ``channels`` below 1; a state of another shape.

    Example:
        >>> import torch, tttc
        >>> conv = tttc.nn.CausalConv(8, kernel=4)
        >>> x = torch.randn(2, 10, 8)
        >>> y, state = conv(x[:, :6])
        >>> more, state = conv(x[:, 6:], state)
        >>> torch.allclose(torch.cat([y, more], 1), conv(x)[0], atol=1e-6), state.shape
        (True, torch.Size([2, 3, 8]))

    Source: the convolutions of Mamba (arXiv 2312.00752) and of its use in arXiv 2407.04620.
    """

    def __init__(
        self,
        channels: int,
        kernel: int = 4,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = check_positive(channels, "channels")
        self.kernel = check_positive(kernel, "kernel")
        self.weight = nn.Parameter(torch.empty(channels, kernel, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights uniform within 1/sqrt(kernel), as torch's own convolutions; bias zero."""
        bound = 1 / math.sqrt(self.kernel)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(
        self, x: torch.Tensor, state: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(y, state)``: the convolved x, and the last ``kernel - 1`` inputs to continue from."""
        length = x.shape[1]
        if state is None:
            state = x.new_zeros(x.shape[0], self.kernel - 1, self.channels)
        elif state.shape != (x.shape[0], self.kernel - 1, self.channels):
            raise ValueError(
                f"state: expected the last inputs of the convolution, shape [B, {self.kernel - 1}, "
                f"{self.channels}] with B = {x.shape[0]}, got {tuple(state.shape)}"
            )
        padded = torch.cat([state.to(x.dtype), x], 1)
        # Shifted sums rather than conv1d: they stay elementwise, so they fuse, and T = 0 works.
        wide = torch.promote_types(x.dtype, torch.float32)
        y = self.bias.to(wide)
        for j in range(self.kernel):
            y = y + padded[:, j : j + length].to(wide) * self.weight[:, j].to(wide)
        return y.to(x.dtype), padded[:, length:]

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel={self.kernel}"
