"""Whole language models, one a contender: how each is built and compiled, its forward and its training step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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
BACKEND = "inductor" if ON_GPU else "eager"
Shape = tuple[int, int]  # sequences, and tokens of each


@dataclass(frozen=True)
class Size:
    """A size of all contenders, and how it is measured."""

    config: TTTConfig
    contexts: tuple[int, ...] = (2048, 8192, 32768)
    tokens: int = 32768  # of a step
    sequences: int = 8  # at least, of a step that gives every multiprocessor something to do
    recompute: bool = False  # blocks in the backward, as one card needs it

    def shapes(self, contexts: Sequence[int], sequences: int | None = None) -> list[Shape]:
        """Those of as many tokens at every context, then those of at least so many sequences."""
        least = self.sequences if sequences is None else sequences
        found = [(max(n, self.tokens // context), context) for n in (1, least) for context in contexts]  # fmt: skip
        return list(dict.fromkeys(found))


SIZES = {
    "125m": Size(TTTConfig.named("125m")),
    "1.3b": Size(TTTConfig.named("1.3b"), sequences=4, recompute=True),
    "tiny": Size(TTTConfig(64, 32, 64, 2, 2, mini_batch_size=4), (32, 64), 64, 2, recompute=True),
}


class Ours(TTTLanguageModel):
    """With what the head sees as a method."""

    @property
    def head(self) -> torch.Tensor:
        """The embedding."""
        return self.embedding.weight

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """``[B, T, hidden_size]``."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def ttt(layer: Any) -> Callable[..., nn.Module]:
    """Our models, their blocks compiled one by one as examples/train_lm.py does it."""

    def build(config: TTTConfig, **options: Any) -> nn.Module:
        model = Ours(TTTConfig(**{**vars(config), "layer": layer}), **options)
        for i, block in enumerate(model.blocks):
            model.blocks[i] = tttc.compile(block, strict=True)
        return model

    return build


def transformer(config: TTTConfig, **options: Any) -> nn.Module:
    """Each block under torch.compile."""
    model = Transformer(config, **options)
    for block in model.blocks:
        block.compile(dynamic=False, backend=BACKEND)
    return model


def by_hand(graphs: bool) -> Callable[..., nn.Module]:
    """Our model with the dual form by hand; blocks and the body of a mini-batch under torch.compile."""

    def build(config: TTTConfig, **options: Any) -> nn.Module:
        model = Ours(config, **options)
        # Compiled anew for other sizes once, then for any: there are many shapes, and each is compiled for long.
        hand_dual.BODY = torch.compile(hand_dual.mini_batch, backend=BACKEND)
        hand_dual.GRAPHS = graphs and ON_GPU
        for block in model.blocks:
            block.ttt.__class__ = hand_dual.HandDual
            block.compile(backend=BACKEND)
        return model

    return build


MODELS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "ttt_linear": (ttt("linear"), "tttc.compile, each block"),
    "ttt_mlp": (ttt("mlp"), "tttc.compile, each block"),
    "transformer": (transformer, "scaled_dot_product_attention; torch.compile, each block"),
    "mamba": (Mamba, "mamba-ssm's fused block and CUDA scan, as it comes"),
    "hand_dual_graphs": (
        by_hand(graphs=True),
        f"TTT-Linear by hand; torch.compile, each block and mini-batch; {hand_dual.GROUP} mini-batches a CUDA graph",
    ),
    "hand_dual": (
        by_hand(graphs=False),
        "TTT-Linear by hand; torch.compile, each block and mini-batch",
    ),
}


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed over tokens, in float32; under torch.compile no float32 logits are made."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


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
        self.loss = torch.compile(cross_entropy, dynamic=False, backend=BACKEND)

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Made by the first training step."""
        return torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True, capturable=ON_GPU)

    def ids(self, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        """Random tokens, and those after them."""
        g = torch.Generator(self.device).manual_seed(0)
        size = self.size.config.vocab_size
        ids = torch.randint(size, (shape[0], shape[1] + 1), generator=g, device=self.device)
        return ids[:, :-1].contiguous(), ids[:, 1:].flatten()

    def step(self, shape: Shape, direction: str, head: bool = True) -> Callable[[], torch.Tensor]:
        """A forward without gradients, returning logits (what the head sees, without ``head``); or a training step.

        A training step returns its loss. Head and loss go over ``size.tokens`` tokens at a time, so that no more logits
        than theirs are there.
        """
        inputs, targets = self.ids(shape)

        @torch.no_grad()
        def forward() -> torch.Tensor:
            return self.model(inputs) if head else self.model.hidden(inputs)

        def train() -> torch.Tensor:
            hidden = self.model.hidden(inputs)
            loss, gradients = torch.zeros((), device=self.device), []
            parts = (x.split(self.size.tokens) for x in (hidden.detach().flatten(0, 1), targets))
            for rows, wanted in zip(*parts, strict=True):
                rows.requires_grad_()
                part = self.loss(F.linear(rows, self.model.head), wanted) / targets.numel()
                part.backward()
                loss += part.detach()
                gradients.append(rows.grad)
            hidden.backward(torch.cat(gradients).view_as(hidden))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return loss

        return forward if direction == "forward" else train

    def first_loss(self, shape: Shape) -> float:
        """Before any training step: the same for the same function of the same parameters."""
        inputs, targets = self.ids(shape)
        with torch.no_grad():
            logits = self.model(inputs).flatten(0, 1)
            return float(cross_entropy(logits, targets) / targets.numel())
