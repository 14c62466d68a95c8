"""A TTT language model, in the Transformer-style and the Mamba-style backbone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from tttc.capture import regions
from tttc.models.config import TTTConfig
from tttc.nn import TTTMLP, CausalConv, TTTLayer, TTTLinear, TTTState
from tttc.nn.layers import INIT_STD


class BlockState(NamedTuple):
    """Where a block stands in a sequence; ``conv`` is None in the Transformer-style backbone."""

    ttt: TTTState
    conv: torch.Tensor | None


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` over ``[..., hidden_size]``. Source: arXiv 2002.05202."""

    def __init__(self, hidden_size: int, intermediate_size: int, **options: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False, **options)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False, **options)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices normal with standard deviation 0.02."""
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(projection.weight, std=INIT_STD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TTTBlock(nn.Module):
    """``x + TTT(norm x)``, then ``x + SwiGLU(norm x)``; in the Mamba style ``x + conv(norm x)`` first.

    x and y ``[B, T, hidden_size]``; norms are RMS norms. With ``return_state`` the pair ``(y, BlockState)``.
    """

    def __init__(self, config: TTTConfig, **options: Any) -> None:
        super().__init__()
        mamba = config.backbone == "mamba"
        width, eps = config.hidden_size, config.norm_eps
        layer: type[TTTLayer] = {"linear": TTTLinear, "mlp": TTTMLP}[config.layer]
        self.conv_norm = nn.RMSNorm(width, eps=eps, **options) if mamba else None
        self.conv = CausalConv(width, config.conv_kernel, **options) if mamba else None
        self.ttt_norm = nn.RMSNorm(width, eps=eps, **options)
        self.ttt = layer(
            width,
            config.num_heads,
            config.mini_batch_size,
            gate=mamba,
            share_qk=mamba,
            conv_kernel=config.conv_kernel,
            rope_theta=config.rope_theta,
            eps=eps,
            **options,
        )
        self.mlp_norm = nn.RMSNorm(width, eps=eps, **options)
        self.mlp = SwiGLU(width, config.intermediate_size, **options)

    def forward(
        self, x: torch.Tensor, state: BlockState | None = None, *, return_state: bool = False
    ) -> Any:
        """y, read on from ``state`` if given; with ``return_state`` also where the block stands."""
        last = None
        if self.conv is not None and self.conv_norm is not None:
            y, last = self.conv(self.conv_norm(x), None if state is None else state.conv)
            x = x + y
        y, ttt = self.ttt(self.ttt_norm(x), None if state is None else state.ttt, return_state=True)
        x = x + y
        y = x + self.mlp(self.mlp_norm(x))
        return (y, BlockState(ttt, last)) if return_state else y


class TTTLanguageModel(nn.Module):
    """A causal language model whose sequence layers are TTT-Linear or TTT-MLP; head and embedding are tied.

    Args:
        config: see :class:`~tttc.models.TTTConfig`.
        device, dtype: of the parameters.

    Shapes:
        ids ``[B, T]``, integer; logits ``[B, T, vocab_size]`` in the dtype of the parameters.

    Raises:
        TypeError: ids not an integer tensor, ``state`` not what the model returned.
        ValueError: ids of another rank, a state of another number of blocks.

    Example:
        >>> import torch
        >>> from tttc.models import TTTConfig, TTTLanguageModel
        >>> config = TTTConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4)
        >>> model = TTTLanguageModel(config)
        >>> ids = torch.randint(256, (2, 10))
        >>> logits, state = model(ids, return_state=True)
        >>> model(ids, state).shape                      # reads on
        torch.Size([2, 10, 256])

    Source: arXiv 2407.04620, section 3.
    """

    def __init__(
        self,
        config: TTTConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size, **options)
        self.blocks = nn.ModuleList(TTTBlock(config, **options) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps, **options)
        nn.init.normal_(self.embedding.weight, std=INIT_STD)

    def forward(
        self,
        ids: torch.Tensor,
        state: tuple[BlockState, ...] | None = None,
        *,
        return_state: bool = False,
    ) -> Any:
        """Logits of the token after each of ``ids``; with ``return_state`` also where each block stands."""
        self._check(ids, state)
        x = self.embedding(ids)
        states = []
        whole = regions.wanted and state is None and not return_state and len(self.blocks) > 1
        for i, block in enumerate(self.blocks):
            if whole and type(block) is TTTBlock:
                x = regions.run(block, x)
                continue
            x = block(x, None if state is None else state[i], return_state=return_state)
            if return_state:
                x, new = x
                states.append(new)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return (logits, tuple(states)) if return_state else logits

    def _check(self, ids: torch.Tensor, state: tuple[BlockState, ...] | None) -> None:
        if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int32, torch.int64):
            got = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise TypeError(f"ids: expected an int32 or int64 tensor [B, T], got {got}")
        if ids.ndim != 2:
            raise ValueError(f"ids: expected shape [B, T], got {tuple(ids.shape)}")
        if state is None:
            return
        if not isinstance(state, tuple):
            raise TypeError(f"state: expected a tuple of BlockState, got {type(state).__name__}")
        if len(state) != len(self.blocks):
            raise ValueError(
                f"state: expected one BlockState for each of {len(self.blocks)} blocks, got {len(state)}"
            )
