"""Replaying what was compiled as CUDA graphs: ``mode="reduce-overhead"``.

PyTorch's own trees of CUDA graphs (``torch._inductor.cudagraph_trees``) record and replay; they keep the memory of all
graphs of a device in one pool, and know which forwards still wait for their backward.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import fx
from torch._dynamo.backends.cudagraphs import (
    check_for_skip,
    find_input_mutations,
    get_device_index,
    get_stack_traces,
)
from torch._inductor.cudagraph_utils import get_placeholder_info
from torch._inductor.utils import count_tangents

from tttc._scan_op import interned
from tttc.codegen.loop import constant_tensors
from tttc.pipeline import build_program
from tttc.runtime.fused_scan_backward import scan_arguments

Direction = Literal["forward", "backward", "inference"]
Run = Callable[[list[Any]], Any]
log = logging.getLogger("tttc.graphs")


class CudaGraphs:
    """The CUDA graphs of a model's graph and of its backward."""

    def __init__(self) -> None:
        self.device: int | None = None  # of the forward that is replayed, None for none
        self.lock = threading.Lock()

    def replayed(self, run: Run, gm: fx.GraphModule, direction: Direction) -> Run:
        """``run`` recorded at its second call with arguments of a size, replayed from the third on.

        Args:
            run: takes the arguments of ``gm`` as one list, which it may empty.
            gm: the ATen graph it computes, as AOTAutograd hands it over.

        What can't be recorded (tensors on a CPU, an operator that waits for the device) runs as it is; the log
        ``tttc.graphs`` says why.
        """
        backward = direction == "backward"
        if backward and self.device is None:
            return run
        static = _static_inputs(gm, backward)
        reason = "no tensor on a GPU" if not _on_gpu(gm) else check_for_skip(gm, len(static))
        if reason is not None:
            log.info("%s runs without CUDA graphs: %s", direction, reason)
            return self._between_graphs(run) if backward else run
        self.device = get_device_index(gm)
        _bring_constants(gm, torch.device("cuda", self.device))
        recorded: list[Run] = []

        def emptying(inputs: list[Any]) -> Any:
            """The trees ask for it: what the graph does not hold is free then."""
            given = inputs.copy()
            inputs.clear()
            return run(given)

        kwargs = {
            "device_index": self.device,
            "is_backward": backward,
            "is_inference": direction == "inference",
            "stack_traces": get_stack_traces(gm),
            "placeholders": get_placeholder_info(gm.graph),
            "mutated_input_idxs": find_input_mutations(gm.graph),
        }

        def replay(inputs: list[Any]) -> Any:
            if not recorded:
                with self.lock:
                    if not recorded:  # sizes that are symbols in the graph are known only now
                        from torch._inductor.cudagraph_trees import cudagraphify_impl

                        recorded.append(cudagraphify_impl(emptying, inputs, static, **kwargs))
            return recorded[0](inputs)

        return _boxed(replay)

    def _between_graphs(self, run: Run) -> Run:
        """A backward that is not recorded, of a forward that was: the trees are told that it runs."""

        def told(inputs: list[Any]) -> Any:
            from torch._inductor.cudagraph_trees import get_manager

            assert self.device is not None
            manager = get_manager(self.device, create_if_none_exists=False)
            if manager is not None:
                manager.set_to_running_backward()
            return run(inputs)

        return _boxed(told)


def _boxed(run: Run) -> Run:
    """Marked for AOTAutograd as one that takes its arguments as one list."""
    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _on_gpu(gm: fx.GraphModule) -> bool:
    values = (node.meta.get("val") for node in gm.graph.nodes)
    return any(isinstance(x, torch.Tensor) and x.is_cuda for x in values)


def _static_inputs(gm: fx.GraphModule, backward: bool) -> list[int]:
    """The arguments that lie where they lay at the last call, which need not be copied: parameters, and in a backward
    what the forward saved."""
    if backward:
        return list(range(count_tangents(gm)))
    context = torch._guards.TracingContext.try_get()
    metadata = None if context is None else context.fw_metadata
    return list(getattr(metadata, "static_input_indices", None) or ())


def _bring_constants(gm: fx.GraphModule, device: torch.device) -> None:
    """The constants of a graph's scans, on the device before anything is recorded: they outlive the graph's memory."""
    for node in gm.graph.nodes:
        places = scan_arguments(node)
        if places is not None:
            key, size = (node.args[places[name]] for name in ("key", "mini_batch_size"))
            constant_tensors(build_program(interned(key), size), device)
