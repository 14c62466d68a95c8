"""Give fused regions their kernels."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal

import torch
import triton
from torch import fx
from tttc.codegen.kernel import Kernel
from tttc.codegen.rowwise import emit, parts
from tttc.codegen.rowwise_ops import NotEmittableError

from tttc.ir.region import FusedRegion
from tttc.ir.row_space import value_of
from tttc.ir.structure import Structures

_lock = threading.Lock()
_kernels: dict[tuple[str, str], Kernel] = {}
_by_structure: dict[Any, Kernel | None] = {}


class Launch:
    """Runs a region's kernel on the devices it is for; imported and compiled when first run."""

    def __init__(self, kernel: Kernel, first_tensor: int) -> None:
        self.kernel = kernel
        self.first_tensor = first_tensor
        self._launch: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        """The region's outputs, or None where it has to run by torch operations."""
        device = args[self.first_tensor].device
        if device.type != "cuda":
            if device.type != "cpu" or not triton.knobs.runtime.interpret:
                return None
        elif device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._run(*args)
        return self._run(*args)

    def _run(self, *args: Any) -> Any:
        if self._launch is None:
            self._launch = self.kernel.module().launch
        return self._launch(*args)


def lower_regions(gm: fx.GraphModule, backend: Literal["torch", "triton"]) -> list[Kernel]:
    """Choose how the regions of a fused graph run, and list the distinct kernels that takes.

    With ``"torch"``, and where a region has no kernel, regions run by torch operations. Equal regions share
    one :class:`Kernel`.
    """
    kernels: dict[int, Kernel] = {}
    for region in gm.children():
        if not isinstance(region, FusedRegion):
            continue
        region.launch = None
        kernel = _kernel_of(region) if backend == "triton" else None
        if kernel is not None:
            inputs, *_ = parts(region.graph_module.graph)
            first = next(i for i, n in enumerate(inputs) if value_of(n) is not None)
            region.launch = Launch(kernel, first)
            kernels[id(kernel)] = kernel
    return list(kernels.values())


def _kernel_of(region: FusedRegion) -> Kernel | None:
    inputs, nodes, outputs = parts(region.graph_module.graph)
    order = {n: i for i, n in enumerate(inputs)}
    # Operands in the order of the nodes, arguments in the region's: both must agree for the file to be shared.
    used = tuple(order[a] for n in nodes for a in n.all_input_nodes if a in order)
    key = (Structures().key(nodes, outputs), used, len(inputs))
    with _lock:
        if key not in _by_structure:
            _by_structure[key] = _new_kernel(region)
        return _by_structure[key]


def _new_kernel(region: FusedRegion) -> Kernel | None:
    try:
        emitted = emit(region.graph_module)
    except NotEmittableError:
        return None
    return shared_kernel(emitted.name, emitted.source, dict(emitted.config))


def shared_kernel(name: str, source: str, config: dict[str, Any]) -> Kernel:
    """The kernel of this source: the same object for whoever asks."""
    return _kernels.setdefault((name, source), Kernel(name, source, config))
