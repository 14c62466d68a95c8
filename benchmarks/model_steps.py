"""Whole language models, one a contender: how each is built and compiled, its forward and its training step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peers import hand_dual
from peers.mamba import Mamba
from peers.transformer import Transformer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F

import tttc
from tttc.models import TTTConfig, TTTLanguageModel

DIRECTIONS = ("forward", "training")
# On a CPU all there is to see is that they run.
ON_GPU = torch.cuda.is_available()
inductor = functools.partial(
    torch.compile, dynamic=False, backend="inductor" if ON_GPU else "eager"
)


@dataclass(frozen=True)
class Size:
    """A size of all contenders, and how it is measured."""

    config: TTTConfig
    contexts: tuple[int, ...] = (2048, 8192, 32768)
    tokens: int = 32768  # of a step
    recompute: bool = False  # blocks in the backward, as one card needs it

    def batch(self, context: int) -> int:
        """Sequences of a step."""
        return max(1, self.tokens // context)


SIZES = {
    "125m": Size(TTTConfig.named("125m")),
    "1.3b": Size(TTTConfig.named("1.3b"), recompute=True),
    "tiny": Size(TTTConfig(64, 32, 64, 2, 2, mini_batch_size=4), (32, 64), 64, recompute=True),
}


def ttt(layer: Any) -> Callable[..., nn.Module]:
    """Our models, their blocks compiled one by one as examples/train_lm.py does it."""

    def build(config: TTTConfig, **options: Any) -> nn.Module:
        model = TTTLanguageModel(TTTConfig(**{**vars(config), "layer": layer}), **options)
        for i, block in enumerate(model.blocks):
            model.blocks[i] = tttc.compile(block, strict=True)
        return model

    return build


def transformer(config: TTTConfig, **options: Any) -> nn.Module:
    """Each block under torch.compile."""
    model = Transformer(config, **options)
    for block in model.blocks:
        block.compile(dynamic=False, backend="inductor" if ON_GPU else "eager")
    return model


def hand_dual_model(config: TTTConfig, **options: Any) -> nn.Module:
    """Our model with the dual form by hand; blocks and the body of a mini-batch under torch.compile."""
    model = TTTLanguageModel(config, **options)
    hand_dual.BODY = inductor(hand_dual.mini_batch)
    for block in model.blocks:
        block.ttt.__class__ = hand_dual.HandDual
        block.compile(dynamic=False, backend="inductor" if ON_GPU else "eager")
    return model


MODELS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "ttt_linear": (ttt("linear"), "tttc.compile, each block"),
    "ttt_mlp": (ttt("mlp"), "tttc.compile, each block"),
    "transformer": (transformer, "scaled_dot_product_attention; torch.compile, each block"),
    "mamba": (Mamba, "mamba-ssm's fused block and CUDA scan, as it comes"),
    "hand_dual": (hand_dual_model, "TTT-Linear by hand; torch.compile, each block and mini-batch"),
}


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss, in float32; under torch.compile no float32 logits are made."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Steps:
    """A contender's model and what is timed of it; the same seed, ids and optimiser for all."""

    def __init__(self, name: str, size: Size, layers: int | None = None) -> None:
        device = "cuda" if ON_GPU else "cpu"
        config = size.config
        if layers is not None:
            config = TTTConfig(**{**vars(config), "num_layers": layers})
        torch.manual_seed(0)
        self.size, self.device = size, device
        self.model = MODELS[name][0](
            config, device=device, dtype=torch.bfloat16 if ON_GPU else torch.float32
        )
        if size.recompute:
            blocks = self.model.blocks
            for i, block in enumerate(blocks):
                blocks[i] = checkpoint_wrapper(block, preserve_rng_state=False)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.loss = inductor(cross_entropy)

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Made by the first training step."""
        return torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True, capturable=ON_GPU)

    def ids(self, context: int) -> torch.Tensor:
        """Random tokens ``[B, T + 1]``."""
        g = torch.Generator(self.device).manual_seed(0)
        shape = (self.size.batch(context), context + 1)
        return torch.randint(self.size.config.vocab_size, shape, generator=g, device=self.device)

    def step(self, context: int, direction: str) -> Callable[[], torch.Tensor]:
        """A forward without gradients, returning logits; or a training step, returning its loss."""
        ids = self.ids(context)
        inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

        @torch.no_grad()
        def forward() -> torch.Tensor:
            return self.model(inputs)

        def train() -> torch.Tensor:
            loss = self.loss(self.model(inputs), targets)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return forward if direction == "forward" else train

    def first_loss(self, context: int) -> float:
        """Before any training step: the same for the same function of the same parameters."""
        with torch.no_grad():
            ids = self.ids(context)
            return float(cross_entropy(self.model(ids[:, :-1].contiguous()), ids[:, 1:]))
