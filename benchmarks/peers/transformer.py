"""A Llama-style Transformer of the sizes of a TTT model: rotary embedding, causal attention, SwiGLU, RMS norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tttc.models import TTTConfig
from tttc.models.language_model import INIT_STD, SwiGLU

Angles = tuple[torch.Tensor, torch.Tensor]


def angles(length: int, head_dim: int, theta: float, like: torch.Tensor) -> Angles:
    """Cosines and sines ``[T, d]`` of the rotary embedding, in the dtype of ``like``."""
    options: dict[str, Any] = {"device": like.device, "dtype": torch.float32}
    rates = theta ** (torch.arange(head_dim // 2, **options) / (-head_dim // 2))
    turned = torch.arange(length, **options)[:, None] * rates
    turned = torch.cat([turned, turned], -1)
    return turned.cos().to(like.dtype), turned.sin().to(like.dtype)


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The rotary embedding of ``[B, H, T, d]``."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Block(nn.Module):
    """``x + attention(norm x)``, then ``x + SwiGLU(norm x)``; x ``[B, T, hidden_size]``."""

    def __init__(self, config: TTTConfig, **options: Any) -> None:
        super().__init__()
        width, self.num_heads = config.hidden_size, config.num_heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            projection = nn.Linear(width, width, bias=False, **options)
            nn.init.normal_(projection.weight, std=INIT_STD)
            setattr(self, name, projection)
        self.attention_norm = nn.RMSNorm(width, eps=config.norm_eps, **options)
        self.mlp_norm = nn.RMSNorm(width, eps=config.norm_eps, **options)
        self.mlp = SwiGLU(width, config.intermediate_size, **options)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        normed = self.attention_norm(x)
        q, k, v = (
            p(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(z.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """ids ``[B, T]`` to logits ``[B, T, vocab_size]``; head and embedding are tied.

    Source: arXiv 2302.13971, with as many heads for keys as for queries.
    """

    def __init__(self, config: TTTConfig, **options: Any) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size, **options)
        self.blocks = nn.ModuleList(Block(config, **options) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps, **options)
        nn.init.normal_(self.embedding.weight, std=INIT_STD)

    @property
    def head(self) -> torch.Tensor:
        """The embedding."""
        return self.embedding.weight

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """What the head sees ``[B, T, hidden_size]``."""
        config = self.config
        x = self.embedding(ids)
        cos, sin = angles(
            ids.shape[1], config.hidden_size // config.num_heads, config.rope_theta, x
        )
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.linear(self.hidden(ids), self.head)
