"""Give fused regions their kernels."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import triton
from torch import fx
from tttc.codegen.executable import begin, executable
from tttc.codegen.kernel import Kernel
from tttc.codegen.rowwise import emit, parts
from tttc.codegen.rowwise_ops import NotEmittableError
from tttc.codegen.specialised import Specialised, argument

from tttc.ir.node_values import value_of
from tttc.ir.region import FusedRegion
from tttc.ir.structure import Structures

_lock = threading.Lock()
_kernels: dict[tuple[str, str], Kernel] = {}
_by_structure: dict[Any, Kernel | None] = {}


MOST_KNOWN = 512  # layouts of a kernel's arguments that are remembered


class Start:
    """A Triton function, launched by what was found for arguments laid out the same way.

    To work out for each argument what may be compiled in takes the host longer than many a kernel takes the GPU.
    """

    def __init__(self, kernel: Kernel, name: str, function: Any) -> None:
        self.kernel, self.name, self.function = kernel, name, function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """The kernel over a grid."""
        return functools.partial(self._start, grid)

    def _start(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        device = arguments[0].get_device()
        layout: list[Any] = [self.name, device]
        passed: list[int] = []
        for x in arguments:
            if type(x) is int:
                layout.append((x == 1, x % 16 == 0, -(2**31) <= x < 2**31))
                passed.append(x)
            else:
                address = x.data_ptr()
                layout.append((x.dtype, address % 16 == 0))
                passed.append(address)
        key = tuple(layout)
        found = self.kernel.compiled.get(key)
        if found is None:
            if triton.knobs.runtime.interpret:  # which compiles nothing
                self.function[grid](*arguments, **constants)
                return
            found = executable(self.specialised(arguments, constants), device)
            if torch.version.hip is None:  # AMD's compiler also asks for the size of a tensor
                if len(self.kernel.compiled) >= MOST_KNOWN:
                    self.kernel.compiled.clear()
                self.kernel.compiled[key] = found
        x, y, z = (*grid, 1, 1)[:3]
        found.start((x, y, z), found.passed(passed))

    def specialised(self, arguments: Sequence[Any], constants: dict[str, Any]) -> Specialised:
        """What of a launch is compiled in; ``constants``: options of the launch too, after those of the function."""
        names = self.function.arg_names
        return Specialised(
            self.kernel,
            self.name,
            tuple(argument(x) for x in arguments),
            tuple((k, v) for k, v in constants.items() if k in names),
            tuple((k, v) for k, v in constants.items() if k not in names),
            lambda: self.function,
        )


class _Ahead:
    """Stands in for :class:`Start`: the kernel is compiled in another thread, for a device, and not launched."""

    def __init__(self, start: Start, device: torch.device) -> None:
        self.start, self.device = start, device

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._begin

    def _begin(self, *arguments: Any, **constants: Any) -> None:
        begin(self.start.specialised(arguments, constants), self.device.index or 0)


class Launch:
    """Runs a region's kernel on the devices it is for; imported and compiled when first run."""

    def __init__(self, kernel: Kernel, first_tensor: int) -> None:
        self.kernel = kernel
        self.first_tensor = first_tensor
        self._launch: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        """The region's outputs, or None where it has to run by torch operations."""
        first = args[self.first_tensor]
        if not first.is_cuda:
            if first.device.type != "cpu" or not triton.knobs.runtime.interpret:
                return None
        elif first.get_device() != torch.cuda.current_device():
            with torch.cuda.device(first.get_device()):
                return self._run(*args)
        return self._run(*args)

    def compile_ahead(self, args: Sequence[Any], device: torch.device) -> None:
        """Begin to compile the kernel for a device in another thread; ``args`` as of a call, on tensors without values."""
        starts = {k: _Ahead(x, device) for k, x in self._starts().items()}
        self.kernel.module().launch(*args, **starts)

    def _starts(self) -> dict[str, Start]:
        parameters = inspect.signature(self.kernel.module().launch).parameters
        return {
            k: Start(self.kernel, k, p.default)
            for k, p in parameters.items()
            if p.default is not p.empty
        }

    def _run(self, *args: Any) -> Any:
        if self._launch is None:
            self._launch = functools.partial(self.kernel.module().launch, **self._starts())
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
