"""Capture of a step for one token, as an ATen graph without batch dimensions."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._decomp import _core_aten_decompositions_post_autograd, get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tttc._checks import run_one_token
from tttc._tracing import describe
from tttc.capture.constants import fold_constants
from tttc.ir.body import is_users
from tttc.passes.decompositions import ACTIVATIONS

aten = torch.ops.aten

_FURTHER = [
    aten.native_layer_norm,
    aten.native_layer_norm_backward,
    aten.gelu,
    aten.gelu_backward,
    aten.silu,
    aten.silu_backward,
    aten.sigmoid_backward,
    aten.tanh_backward,
    aten.huber_loss,
    aten.huber_loss_backward,
    aten.smooth_l1_loss,
    aten.smooth_l1_loss_backward,
    aten.mse_loss,
    aten.mse_loss_backward,
    aten.l1_loss,
    aten.threshold_backward,
    aten.leaky_relu,
    aten.leaky_relu_backward,
    aten.elu,
    aten.elu_backward,
    aten.hardtanh,
    aten.hardtanh_backward,
    aten.addmv,
    aten.addmm,
    aten.addr,
    aten.addcmul,
    aten.addcdiv,
    aten.linalg_vector_norm,
    aten.norm,
    aten.var,
    aten.var_mean,
    aten._softmax,
    aten._softmax_backward_data,
    aten._log_softmax,
    aten._log_softmax_backward_data,
    aten.rsub,
    aten.slice_backward,
    aten.select_backward,
    aten.clamp_min,
    aten.clamp_max,
    aten.masked_fill,
    aten.log_sigmoid_forward,
    aten.log_sigmoid_backward,
    aten.native_dropout,
    aten.triu,
    aten.tril,
    aten.pow,
]


_scattered = get_decompositions([aten.select_backward])[aten.select_backward.default]


def _select(x: torch.Tensor, dim: int, index: int) -> Any:
    """The only entry of an axis is the tensor without that axis."""
    return x.squeeze(dim) if x.shape[dim] == 1 else NotImplemented


def _select_backward(grad: torch.Tensor, sizes: Sequence[int], dim: int, index: int) -> Any:
    return grad.unsqueeze(dim) if sizes[dim] == 1 else _scattered(grad, sizes, dim, index)


def _broadcast_in_dim(x: torch.Tensor, shape: Sequence[int], dims: Sequence[int]) -> Any:
    """In ATen's operators: a program traced before is functionalised, which refuses views that are not ATen's."""
    for i in range(len(shape)):
        if i not in dims:
            x = x.unsqueeze(i)
    return x.expand(shape)


@functools.cache
def decomposition_table() -> dict[Any, Callable[..., Any]]:
    """What is taken apart while user code is traced.

    Of PyTorch's table the part that tracing asks for: operators that are others by definition never come to it, and
    to list them takes long.
    """
    return {
        **_core_aten_decompositions_post_autograd(),
        **get_decompositions(_FURTHER),
        **ACTIVATIONS,
        aten.select.int: _select,
        aten.select_backward.default: _select_backward,
        torch.ops.prims.broadcast_in_dim.default: _broadcast_in_dim,
    }


class WithLines(torch.fx.Interpreter):
    """Runs a graph such that what is traced from it keeps its source lines."""

    def run_node(self, n: torch.fx.Node) -> Any:
        torch.fx.traceback.set_stack_trace([n.meta.get("stack_trace") or ""])
        return super().run_node(n)


class SourceLines(TorchDispatchMode):
    """Leaves on every captured node which line of the step it comes from; make_fx looks at modules only."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        frame = sys._getframe(1)
        while frame is not None and not is_users(frame.f_code.co_filename):
            if frame.f_code is WithLines.run_node.__code__:
                return func(*args, **(kwargs or {}))  # of a graph, whose nodes say their lines
            frame = frame.f_back
        if frame is not None:
            line = f'File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}'
            torch.fx.traceback.set_stack_trace([line])
        return func(*args, **(kwargs or {}))


def capture_step(
    step: Callable[..., Any],
    trees: Callable[..., Any],
    shapes: Sequence[Sequence[tuple[int, ...]]],
    dtypes: Sequence[Sequence[torch.dtype]],
) -> torch.fx.GraphModule:
    """Trace ``step`` for one token with :func:`make_fx`, which sees through ``torch.func.grad``.

    Args:
        step: the user's function.
        trees: maps flat lists (anchor, carry, tokens, shared) to the trees the step takes.
        shapes: of one token, of the leaves of anchor, tokens and shared.
        dtypes: likewise, as the step sees them: numbers may depend on them (PyTorch rounds some to the dtype they meet).

    Returns:
        An ATen graph; its flat arguments are those of anchor, carry, tokens and shared
        (``meta["counts"]`` says how many of each), its results those of the new carry, then of the output
        (``meta["returned"]`` says its tree, and shapes and dtypes of its leaves).
    """
    state, tokens, shared = (
        [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes_of, dtypes_of, strict=True)]
        for shapes_of, dtypes_of in zip(shapes, dtypes, strict=True)
    )
    counts = (len(state), len(state), len(tokens), len(shared))
    returned: list[Any] = []

    def flat(*leaves):
        it = iter(leaves)
        groups = [[next(it) for _ in range(n)] for n in counts]
        with SourceLines():
            new, z = run_one_token(step, *trees(*groups))
        outputs = pytree.tree_leaves(z)
        returned[:] = describe(z), tuple((tuple(x.shape), x.dtype) for x in outputs)
        return (*pytree.tree_leaves(new), *outputs)

    # Floating casts say nothing to the compiler: the dtype computed in is the caller's.
    table = decomposition_table()
    # Inside a capture of TorchDynamo, make_fx would take up its symbolic sizes: features have none.
    plain = torch._guards.tracing(None)
    lines = torch.fx.traceback.preserve_node_meta()
    with plain, lines, torch.autocast("cpu", enabled=False), torch.no_grad():
        gm = make_fx(
            torch.func.functionalize(flat, remove="mutations"),
            decomposition_table=table,
            tracing_mode="fake",
            _allow_non_fake_inputs=True,  # tensors the step closes over keep their values
        )(*state, *(torch.zeros_like(x) for x in state), *tokens, *shared)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    fold_constants(gm)
    gm.meta |= {"counts": counts, "returned": tuple(returned)}
    return gm
