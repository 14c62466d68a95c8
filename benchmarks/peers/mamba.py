"""Mamba as mamba-ssm has it: its fused block and CUDA scan, twice as many layers as a model with SwiGLU in each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tttc.models import TTTConfig


class Mamba(nn.Module):
    """ids ``[B, T]`` to logits ``[B, T, vocab_size]``; raises ImportError where mamba-ssm is not installed.

    A layer of Mamba has half the parameters of a block of attention and SwiGLU; the sizes are those of
    state-spaces/mamba-130m and mamba-1.4b. Source: arXiv 2312.00752.
    """

    def __init__(self, config: TTTConfig, **options: Any) -> None:
        super().__init__()
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

        made = MambaConfig(
            d_model=config.hidden_size,
            n_layer=2 * config.num_layers,
            vocab_size=config.vocab_size,
            rms_norm=True,
            residual_in_fp32=True,
            fused_add_norm=True,
            tie_embeddings=True,
        )
        self.model = MambaLMHeadModel(made, **options)

    @property
    def blocks(self) -> nn.ModuleList:
        """Its layers."""
        return self.model.backbone.layers

    @property
    def head(self) -> torch.Tensor:
        """The embedding."""
        return self.model.lm_head.weight

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """What the head sees ``[B, T, hidden_size]``."""
        return self.model.backbone(ids)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids).logits
