"""``torch.ops.tttc.block``: a part of a model that repeats, as one operator while AOTAutograd traces the model."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

Tensor = torch.Tensor
_counter = itertools.count()


@dataclass
class Program:
    """An ATen graph that takes sizes and then tensors, and returns a tuple of tensors.

    Args:
        graph: the graph.
        labels: layers that scans in it are told they are in; each call of the block says others.
        kept: how many of the last results nobody but a backward reads. The operator returns one tensor for all of
            them, until :func:`tttc.blocks.hand_out`: AOTAutograd takes time for each tensor that it sees.
    """

    graph: fx.Graph
    labels: list[str]
    kept: int = 0
    key: str = field(default_factory=lambda: f"block#{next(_counter)}")

    def __post_init__(self) -> None:
        (results,) = self.graph.output_node().args
        self.results: list[fx.Node] = list(results)  # type: ignore[arg-type]
        self.shown = len(self.results) - self.kept
        _programs[self.key] = self


_programs: weakref.WeakValueDictionary[str, Program] = weakref.WeakValueDictionary()


@dataclass
class Block:
    """A block that was traced once: its forward, and the backward of it if gradients are needed.

    Args:
        forward: its first results are those of the block, the rest, which it keeps, is what the backward asks for.
        backward: takes the sizes, what was saved, what the forward keeps and the gradients.
        differentiable: for each result, whether its gradient is an argument of the backward.
        gradients: these gradients, as they were when the backward was traced.
        saved: of each tensor that is saved and not kept, ``(True, i)`` for tensor i among the arguments, ``(False, i)``
            for result i.
        wanted: for each tensor among the arguments, whether the backward returns its gradient.
    """

    forward: Program
    backward: Program | None = None
    differentiable: list[bool] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    saved: list[tuple[bool, int]] = field(default_factory=list)
    wanted: list[bool] = field(default_factory=list)

    def __call__(self, tensors: list[Tensor], sizes: list[Any], labels: str) -> Any:
        """The results, as a tuple."""
        if self.backward is None:
            return tuple(torch.ops.tttc.block(tensors, sizes, self.forward.key, labels))
        return _Differentiable.apply(self, sizes, labels, *tensors)[: self.forward.shown]


@torch.library.custom_op("tttc::block", mutates_args=())
def block(tensors: list[Tensor], sizes: list[int], key: str, labels: str) -> list[Tensor]:
    """Stands for the nodes of a program until these take its place again; ``labels``, one a line, are told to its scans.

    After them comes a number, that of the block: two calls that draw random numbers are not the same.
    """
    raise RuntimeError(
        "tttc: a block was not put back into the graph it was taken from; please report this"
    )


@block.register_fake
def _fake(tensors, sizes, key, labels):
    program = _programs[key]
    values = [node.meta["val"] for node in program.results[: program.shown]]
    made = [
        tensors[0].new_empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device)
        for v in values
    ]
    return [*made, tensors[0].new_empty(1, dtype=torch.uint8)] if program.kept else made


class _Differentiable(torch.autograd.Function):
    """A block whose gradients are wanted."""

    @staticmethod
    def forward(ctx, block, sizes, labels, *tensors):
        output = torch.ops.tttc.block(list(tensors), sizes, block.forward.key, labels)
        ctx.block, ctx.sizes, ctx.labels = block, sizes, labels
        ctx.mark_non_differentiable(
            *(x for x, d in zip(output, block.differentiable, strict=False) if not d),
            *output[block.forward.shown :],
        )
        saved = ((tensors if given else output)[i] for given, i in block.saved)
        ctx.save_for_backward(*saved, *output[block.forward.shown :])
        return tuple(output)

    @staticmethod
    def backward(ctx, *grads):
        block = ctx.block
        wanted = [g for g, d in zip(grads, block.differentiable, strict=False) if d]
        laid_out = [_laid_out(g, like) for g, like in zip(wanted, block.gradients, strict=True)]
        given = [*ctx.saved_tensors, *laid_out]
        made = iter(torch.ops.tttc.block(given, ctx.sizes, block.backward.key, ctx.labels))
        return (None, None, None, *(next(made) if w else None for w in block.wanted))


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with the strides of ``like``, which the backward was traced for."""
    if x.stride() == like.stride():
        return x
    return torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)
