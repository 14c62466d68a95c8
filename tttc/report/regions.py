"""The kernels of fused regions: what a launch of each compiles, and how many regions share it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from tttc.codegen.kernel import Kernel
from tttc.codegen.resources import Request
from tttc.ir.region import FusedRegion
from tttc.report.records import RegionReport
from tttc.runtime.launch import POINTERS

Launched = tuple[list[Any], dict[str, Any]]  # the arguments of a Triton kernel, and its options


def regions_of(gm: fx.GraphModule) -> dict[str, list[FusedRegion]]:
    """The regions of a fused graph that run by kernels, by the file of the kernel they share."""
    found: dict[str, list[FusedRegion]] = {}
    for node in gm.graph.nodes:
        region = getattr(gm, str(node.target), None) if node.op == "call_module" else None
        if isinstance(region, FusedRegion) and region.launch is not None:
            found.setdefault(str(region.launch.kernel.path), []).append(region)  # type: ignore[attr-defined]
    return found


def region_report(regions: list[FusedRegion], sizes: Mapping[sympy.Expr, int]) -> RegionReport:
    """What the regions that share a kernel are, and the bytes one of them saves."""
    first = regions[0]
    operators = [n for n in first.graph_module.graph.nodes if n.op == "call_function"]
    names = [getattr(n.target, "__name__", str(n.target)).partition(".")[0] for n in operators]
    before, after = (float(x.subs(sizes)) for x in (first.bytes_before, first.bytes_after))
    return RegionReport(len(regions), names, before, after)


def region_request(region: FusedRegion, sizes: Mapping[sympy.Expr, int]) -> Request | None:
    """What to compile to know the resources of a region's kernel at these sizes; None where it can't be launched."""
    kernel: Kernel = region.launch.kernel  # type: ignore[union-attr]
    inputs = [n for n in region.graph_module.graph.nodes if n.op == "placeholder"]
    try:
        launched = _launched(kernel, [_abstract(n.meta["val"], sizes) for n in inputs])
    except (TypeError, KeyError):  # a size that only values decide
        return None
    return None if launched is None else _request(kernel, *launched)


def _abstract(value: Any, sizes: Mapping[sympy.Expr, int]) -> Any:
    """An argument without values, its symbolic sizes replaced."""

    def number(n: Any) -> int:
        return int(n.node.expr.subs(sizes)) if isinstance(n, torch.SymInt) else int(n)

    if not isinstance(value, torch.Tensor):
        return number(value) if isinstance(value, (int, torch.SymInt)) else value
    shape, stride = ([*map(number, x)] for x in (value.shape, value.stride()))
    return torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")


def _launched(kernel: Kernel, arguments: list[Any]) -> Launched | None:
    """What the kernel's own ``launch`` would hand to Triton."""
    calls: list[Launched] = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *given, **options: calls.append((list(given), options))

    launch = kernel.module().launch
    starts = [
        k for k, p in inspect.signature(launch).parameters.items() if p.default is not p.empty
    ]
    launch(*arguments, **dict.fromkeys(starts, Recorder()))
    return calls[0] if calls else None  # a second one adds up what programs added up


def _request(kernel: Kernel, given: list[Any], options: dict[str, Any]) -> Request | None:
    signature: dict[str, str] = {}
    constants = {k: options.pop(k) for k in ("ROWS", "COLS")}
    aligned: list[str] = []
    for name, value in zip(kernel.function().arg_names, given, strict=False):
        if isinstance(value, torch.Tensor):
            if value.dtype not in POINTERS:
                return None
            signature[name] = POINTERS[value.dtype]
            aligned.append(name)
        elif value == 1:
            constants[name] = 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            aligned += [name] * (value % 16 == 0)
    return Request.of(kernel, signature, constexprs=constants, options=options, aligned=aligned)
