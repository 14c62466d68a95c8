"""AOTAutograd and its partition as backends of TorchDynamo call them, but for TorchInductor.

What PyTorch imports of it on the way is not used, and takes a tenth of the first call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import aot_module_simplified
from torch.utils.checkpoint import CheckpointPolicy

from tttc.passes.from_sizes import from_sizes, is_small
from tttc.passes.merge_equal import merge_equal


def through_autograd(
    gm: fx.GraphModule, inputs: Sequence[Any], **options: Any
) -> Callable[..., Any]:
    """A captured graph as AOTAutograd makes it callable.

    Args:
        gm: the graph.
        inputs: its arguments, fake or not.
        options: what ``aot_autograd`` takes, ``bw_compiler`` among them.
    """
    nested = any(isinstance(x, (list, tuple, dict)) for x in inputs)
    if (
        nested or os.environ.get("TORCH_COMPILE_DEBUG") == "1"
    ):  # which writes what it did into files
        return aot_autograd(**options)(gm, inputs)
    compiler = options["bw_compiler"]
    disable: Any = torch._dynamo.disable

    def backward(*args: Any, **kwargs: Any) -> Any:
        compiled = disable(compiler, reason="a compiler of backwards")(*args, **kwargs)
        return disable(compiled, reason="compiled by tttc")

    run = aot_module_simplified(gm, inputs, **{**options, "bw_compiler": backward})
    return disable(run, reason="compiled by tttc")


def cut(
    joint: fx.GraphModule, inputs: Any, **options: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A graph of a forward and its backward, cut where least has to be saved; a ``partition_fn`` of AOTAutograd.

    What follows from sizes alone is not saved: a backward has it from them as well.
    """
    left = not merge_equal(joint.graph) and torch._functorch.config.cse
    for node in from_sizes(joint.graph):
        if is_small(node):
            node.meta.setdefault("recompute", CheckpointPolicy.MUST_RECOMPUTE)
    with torch._functorch.config.patch(cse=left):
        return min_cut_rematerialization_partition(joint, inputs, **options)
