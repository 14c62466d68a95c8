"""TTT-Linear in its dual form as people write it by hand: a mini-batch at a time, its body under torch.compile.

Source: arXiv 2407.04620, appendix A, and test-time-training/ttt-lm-pytorch (``TTTLinear.ttt``): gradients by hand, the
loop over mini-batches in Python, groups of mini-batches recomputed in the backward. With GRAPHS the host launches groups
in the place of kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import timing
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tttc.nn import TTTLinear
from tttc.nn.inner import INNER_EPS
from tttc.nn.rotary import rotary

Tensor = torch.Tensor
GROUP = 16  # mini-batches that the backward recomputes together


def gradient_of_loss(z: Tensor, target: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Of ``½‖LN(z) − target‖²`` with respect to z ``[B, H, b, d]``; gain and bias ``[H, 1, d]``."""
    mean, var = z.mean(-1, keepdim=True), z.var(-1, keepdim=True, unbiased=False)
    scale = torch.rsqrt(var + INNER_EPS)
    normal = (z - mean) * scale
    g = (gain * normal + bias - target) * gain
    along = (g * normal).mean(-1, keepdim=True)
    return (g - g.mean(-1, keepdim=True) - normal * along) * scale


def mini_batch(
    W: Tensor, b: Tensor, gain: Tensor, bias: Tensor, q: Tensor, k: Tensor, v: Tensor, rates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One mini-batch: weights after it, and its outputs.

    W ``[B, H, d, d]``, b ``[B, H, 1, d]``, q, k, v ``[B, H, b, d]``; ``rates [B, H, b, b]``: how much of the gradient of token
    s is in the weights of token t.
    """
    g = gradient_of_loss(k @ W + b, v - k, gain, bias)
    z = q @ W - (rates * (q @ k.mT)) @ g + b - rates @ g
    out = q + F.layer_norm(z, z.shape[-1:], eps=INNER_EPS) * gain + bias
    last = rates[:, :, -1, :, None]
    return W - (last * k).mT @ g, b - (last * g).sum(2, keepdim=True), out


BODY = mini_batch  # what runs it: torch.compile(mini_batch), say
GRAPHS = False  # a group as one CUDA graph, and its gradients as another


def group(W: Tensor, b: Tensor, gain: Tensor, bias: Tensor, q: Tensor, k: Tensor, v: Tensor,
          rates: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Mini-batches one after another; q, k, v ``[B, H, n, b, d]``, rates ``[B, H, n, b, b]``."""
    out = []
    # A graph is captured, and a backward computed, outside of whatever autocast there was: it is a group's own.
    with torch.autocast(q.device.type, torch.bfloat16, q.dtype == torch.bfloat16, cache_enabled=False):  # fmt: skip
        for i in range(q.shape[2]):
            W, b, z = BODY(W, b, gain, bias, *(x[:, :, i] for x in (q, k, v, rates)))
            out.append(z)
    return W, b, torch.stack(out, 2)


class Graphs:
    """A group, and its gradients recomputed from its arguments, as CUDA graphs into which arguments are copied."""

    made: ClassVar[dict[Any, Graphs]] = {}

    def __init__(self, arguments: tuple[Tensor, ...]) -> None:
        self.inputs = [x.detach().clone() for x in arguments]
        with torch.no_grad():
            self.forward, self.results = timing.captured(lambda: group(*self.inputs))
        self.seeds = [torch.zeros_like(x) for x in self.results]
        self.backward: Any = None

    @classmethod
    def of(cls, arguments: tuple[Tensor, ...]) -> Graphs:
        """Those for arguments of these shapes, with their gradients where the gradient mode says so."""
        key = tuple(x.shape for x in arguments)
        found = cls.made.get(key) or cls.made.setdefault(key, cls(arguments))
        if torch.is_grad_enabled() and found.backward is None:
            leaves = [x.detach().requires_grad_() for x in found.inputs]
            # What is saved here is not for a checkpoint around the caller to recompute.
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
                found.backward, found.gradients = timing.captured(
                    lambda: torch.autograd.grad(group(*leaves), leaves, found.seeds)
                )
        return found

    @staticmethod
    def run(graph: Any, to: Sequence[Tensor], given: Sequence[Tensor], made: Sequence[Tensor]) -> tuple[Tensor, ...]:  # fmt: skip
        """Copy in, replay, copy out."""
        for x, y in zip(to, given, strict=True):
            x.copy_(y)
        graph.replay()
        return tuple(x.clone() for x in made)


class Replayed(torch.autograd.Function):
    """:func:`group` by its graphs; nothing but its arguments is kept for the backward."""

    @staticmethod
    def forward(ctx: Any, graphs: Graphs, *arguments: Tensor) -> tuple[Tensor, ...]:
        ctx.graphs = graphs
        ctx.save_for_backward(*arguments)
        return graphs.run(graphs.forward, graphs.inputs, arguments, graphs.results)

    @staticmethod
    def backward(ctx: Any, *seeds: Tensor) -> Any:
        g = ctx.graphs
        given = (*ctx.saved_tensors, *seeds)
        return None, *g.run(g.backward, [*g.inputs, *g.seeds], given, g.gradients)


def recomputed(*arguments: Tensor) -> tuple[Tensor, ...]:
    """:func:`group`, recomputed in the backward."""
    if GRAPHS:
        return Replayed.apply(Graphs.of(arguments), *arguments)
    return checkpoint(group, *arguments, use_reentrant=False) if torch.is_grad_enabled() else group(*arguments)  # fmt: skip


class HandDual(TTTLinear):
    """:class:`tttc.nn.TTTLinear` with this program in the place of the scan; T a multiple of the mini-batch.

    Products take bf16 operands where the parameters are bf16; the weights stay float32 between mini-batches.
    """

    def forward(self, x: Tensor, state: None = None, *, return_state: bool = False) -> Any:
        """y; the state is None."""
        size, length = self.mini_batch_size, x.shape[1]
        if length % size:
            raise ValueError(f"x: expected T a multiple of {size}, got {length}")
        q, k, v, rates = self.before(x)
        y = self.after(self.over_mini_batches(q, k, v, rates))
        return (y, None) if return_state else y

    def before(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v ``[B, H, n, b, d]`` and rates ``[B, H, n, b, b]``."""
        size = self.mini_batch_size
        position = torch.arange(x.shape[1], device=x.device) % size
        q, k, v = (self._split_heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotary(y, position, self.rope_theta) for y in (q, k))
        eta = self._learning_rates(x).unflatten(-1, (-1, 1, size))
        tau = self._taus(position[:size])[:, None]
        rates = torch.tril((tau * eta).to(v.dtype))
        return (*(y.unflatten(2, (-1, size)) for y in (q, k, v)), rates)

    @torch.compiler.disable
    def over_mini_batches(self, q: Tensor, k: Tensor, v: Tensor, rates: Tensor) -> Tensor:
        """The loop; outputs ``[B, H, n, b, d]``."""
        wide = torch.promote_types(q.dtype, torch.float32)
        W = self.W1.to(wide).expand(q.shape[0], *self.W1.shape).contiguous()
        b = self.b1.to(wide)[:, None].expand(q.shape[0], -1, -1, -1).contiguous()
        gain, bias = self.norm_weight.to(wide)[:, None], self.norm_bias.to(wide)[:, None]
        out = []
        for parts in zip(*(x.split(GROUP, 2) for x in (q, k, v, rates)), strict=True):
            W, b, z = recomputed(W, b, gain, bias, *(x.contiguous() for x in parts))
            out.append(z)
        return torch.cat(out, 2)

    def after(self, z: Tensor) -> Tensor:
        """What follows the scan."""
        z = z.flatten(2, 3).to(self.post_norm.weight.dtype)
        return self.o_proj(self.post_norm(z.transpose(1, 2).flatten(2)))
