"""``tttc doctor``: what is here, what will and won't work, and how to mend it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tttc.codegen.kernel import cache_dir
from tttc.report.kernels import default_target

OK, NOTE, BAD = "ok", "note", "bad"
NEEDED = (
    "tttc",
    "torch",
    "triton",
    "networkx",
    "sympy",
    "opt_einsum",
    "rich",
    "pygments",
    "jinja2",
)
OPTIONAL = {
    "matplotlib": ("pictures of benchmarks", "pip install matplotlib"),
    "flash-linear-attention": (
        "its kernels beside ours in benchmarks, on a GPU",
        "pip install flash-linear-attention",
    ),
}
LEAST_SPACE = 100 << 20


@dataclass
class Finding:
    """One thing looked at: "ok", "note" (something won't work, or slower) or "bad" (tttc does not work)."""

    name: str
    state: str
    found: str
    mend: str = ""


def examine(trial: bool = True) -> list[Finding]:
    """Everything ``tttc doctor`` looks at; ``trial``: compile a small layer too, and compare it."""
    findings = [*_versions(), *_devices(), *_compilers(), _cache(), *_optional()]
    if trial:
        findings += [_guarded("torch operations", _try_torch), _guarded("kernels", _try_kernels)]
    return findings


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return Finding(
            name,
            BAD,
            f"{type(error).__name__}: {first}",
            "TTTC_LOGS=all tttc doctor --debug says more",
        )


def _versions() -> Iterator[Finding]:
    yield Finding("python", OK, f"{platform.python_version()} on {platform.platform(terse=True)}")
    for name in NEEDED:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, BAD, "not installed", f"pip install {name}")
            continue
        built = ""
        if name == "torch":
            kind = torch.version.cuda or torch.version.hip
            label = "CUDA" if torch.version.cuda else "ROCm"
            built = f", built for {label} {kind}" if kind else ", built for the CPU alone"
        yield Finding(name, OK, found + built)


def _devices() -> Iterator[Finding]:
    yield Finding(
        "cpu", OK, f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    )
    if not torch.cuda.is_available():
        mend = "kernels need an NVIDIA (sm_80 or later) or AMD GPU"
        if not (torch.version.cuda or torch.version.hip):
            mend += "; with one, install a torch built for it (https://pytorch.org/get-started)"
        elif shutil.which("nvidia-smi"):
            mend = "torch finds none though nvidia-smi is there: compare its driver with torch.version.cuda"
        yield Finding("gpu", NOTE, "none: compiled models run by torch operations", mend)
        return
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        text = f"{properties.name}, {free >> 30} of {total >> 30} GiB free"
        if torch.version.hip is None:
            text += f", sm_{properties.major}{properties.minor}"
            if properties.major < 8:
                yield Finding(
                    f"cuda:{i}", NOTE, text, "bfloat16 kernels are for sm_80 and later: use float32"
                )
                continue
        yield Finding(f"cuda:{i}", OK, text)


def _compilers() -> Iterator[Finding]:
    gpu = torch.cuda.is_available()
    names = [os.environ.get("CC"), "gcc", "clang", "cc"]
    c = next((p for n in names if n and (p := shutil.which(n))), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    problem = "no C compiler" if c is None else "" if header.exists() else f"no {header}"
    if problem:
        mend = "Triton builds its launcher with it: apt install gcc python3-dev, or the like"
        yield Finding("C compiler", BAD if gpu else NOTE, problem, mend)
    else:
        yield Finding("C compiler", OK, f"{c}, Python's headers")
    from tttc.report.measurement import has_compiler

    if has_compiler():
        yield Finding("C++ compiler", OK, "for torch.compile on the CPU, in benchmarks")
    else:
        mend = "apt install g++, or the like; tttc itself needs none"
        yield Finding(
            "C++ compiler", NOTE, "none: torch.compile on the CPU fails in benchmarks", mend
        )


def _cache() -> Finding:
    folder = cache_dir()
    mend = "name a folder that can be written: TTTC_CACHE_DIR=/some/folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("cache", BAD, f"{folder} can't be written: {error.strerror or error}", mend)
    if free < LEAST_SPACE:
        return Finding("cache", BAD, f"{folder} has {free >> 20} MiB left", mend)
    return Finding("cache", OK, f"{folder}, {free >> 30} GiB free")


def _optional() -> Iterator[Finding]:
    for name, (what, mend) in OPTIONAL.items():
        try:
            yield Finding(name, OK, f"{importlib.metadata.version(name)}: {what}")
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, NOTE, f"not installed ({what})", mend)


def _step(anchor: Any, W: Any, token: Any, shared: Any) -> Any:
    """One token of a linear model trained on its squared error."""
    q, k, v = token
    gradient = torch.func.grad(lambda w: 0.5 * (torch.tanh(k @ w) - v).square().sum())(anchor)
    W = W - 0.1 * gradient
    return W, q @ W


def _layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from tttc.scan import scan

    init = torch.zeros(q.shape[1], 16, 16, dtype=q.dtype, device=q.device)
    return scan(_step, init, (q, k, v), 16)[1]


def _tokens() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(3, 1, 2, 36, 16, generator=generator, dtype=torch.float64).unbind())


def _compared(name: str, got: torch.Tensor, tolerance: float) -> Finding:
    expected = _layer(*_tokens())
    error = float((got.cpu().double() - expected).abs().max() / expected.abs().max())
    state = OK if error <= tolerance else BAD
    dtype = str(got.dtype).removeprefix("torch.")
    found = f"a small scan in {dtype}, {error:.0e} from the naive loop"
    return Finding(name, state, found, "" if state == OK else "please report it")


def _try_torch() -> Finding:
    import tttc

    return _compared(
        "torch operations", tttc.compile(_layer, backend="torch", strict=True)(*_tokens()), 1e-9
    )


def _try_kernels() -> Finding:
    """Run one on a GPU; without one, compile one for one."""
    import tttc

    if torch.cuda.is_available():
        inputs = [x.cuda().float() for x in _tokens()]
        got = tttc.compile(_layer, backend="triton", strict=True)(*inputs)
        return _compared("kernels", got, 1e-2)  # products of float32 may be made in tf32
    found = tttc.explain(_layer, *(x.float() for x in _tokens()), backend="torch", check_tokens=0)
    if not any((k.resources or {}).get("registers") for k in found.kernels):
        mend = (
            "explanations come without registers and shared memory; is ptxas in the triton wheel?"
        )
        return Finding("kernels", NOTE, f"none compiles for {default_target()}", mend)
    return Finding("kernels", OK, f"compile for {default_target()}, none runs here")


def verdict(findings: list[Finding]) -> list[str]:
    """What will and won't work, in sentences."""
    state = {f.name: f.state for f in findings}
    gpu = torch.cuda.is_available()
    bad = [f.name for f in findings if f.state == BAD]
    lines = []
    if bad:
        lines.append(f"To mend first: {', '.join(bad)}.")
    else:
        by = (
            "kernels on the GPU, torch operations for float64"
            if gpu
            else "torch operations on the CPU"
        )
        lines.append(f"tttc.compile works: {by}.")
    if not gpu:
        lines.append(
            "backend='triton' won't run here, except in Triton's interpreter (TRITON_INTERPRET=1), slowly."
        )
        if state.get("kernels") == OK:
            lines.append(
                "tttc.explain works, with the registers and shared memory kernels will take on a GPU."
            )
    if state.get("matplotlib") == NOTE:
        lines.append("tttc bench --plot won't work.")
    return lines


def shown(findings: list[Finding]) -> Iterator[Any]:
    """The table of ``tttc doctor``."""
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    styles = {OK: "green", NOTE: "yellow", BAD: "bold red"}
    for f in findings:
        text = escape(f.found) + (f"\n→ {escape(f.mend)}" if f.mend else "")
        table.add_row(Text(f.state, style=styles[f.state]), f.name, text)
    yield table
    yield Text("\n" + "\n".join(verdict(findings)))
