"""The model and the inputs a command names."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import traceback
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tttc import _tracing

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "int64": torch.int64,
}
MODEL_HELP = "package.module:name of a model, of a class, or of a function without arguments that returns one"


class UsageError(Exception):
    """What the user asked for can't be done; the message says what was expected."""


def device_of(name: str | None) -> torch.device:
    """The device a user names; the GPU where there is one if none is named.

    Raises:
        UsageError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device: {name}: {str(error).splitlines()[0]}") from None
    return device


def prepare(options: argparse.Namespace) -> tuple[Any, torch.device, torch.dtype | None]:
    """The model, its device, and the dtype asked for."""
    torch.manual_seed(options.seed)
    device = device_of(options.device)
    dtype = None
    if options.dtype is not None:
        dtype = DTYPES.get(options.dtype)
        if dtype is None or not dtype.is_floating_point:
            raise UsageError(f"--dtype: expected a floating dtype, got {options.dtype!r}")
    model = load(options.model)
    if isinstance(model, nn.Module):
        model = model.to(device=device, dtype=dtype)
    return model, device, dtype


def load(name: str) -> Any:
    """The model behind ``package.module:name``.

    Raises:
        UsageError: there is no such module or name, it can't be imported, or it is no model.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"model: expected package.module:name, got {name!r}")
    found = _imported(module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"model: {module_name} has no {attribute!r}{_nearest(found, part)}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise UsageError(f"model: expected {MODEL_HELP}; {name} is a {type(found).__name__}")
    try:
        made = found()
    except TypeError as error:
        raise UsageError(f"model: {name} can't be called without arguments: {error}") from None
    if not callable(made):
        raise UsageError(
            f"model: {name} returned a {type(made).__name__}, expected an nn.Module or a function"
        )
    return made


def _imported(module_name: str) -> Any:
    if module_name.endswith(".py") or os.sep in module_name:
        dotted = module_name.removesuffix(".py").strip("./").replace(os.sep, ".")
        raise UsageError(
            f"model: expected the name of a module, {dotted!r}, got a path, {module_name!r}"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UsageError(
                f"model: {module_name} needs {error.name!r}, which is not installed"
            ) from error
        raise UsageError(f"model: there is no module {error.name!r} (from {os.getcwd()})") from None
    except Exception as error:
        if isinstance(error, SyntaxError):
            where = f"{error.filename}:{error.lineno}"
        else:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{frame.filename}:{frame.lineno}"
        raise UsageError(
            f"model: {module_name} can't be imported: {type(error).__name__}: {error} ({where})"
        ) from error


class _Reached(Exception):
    """A naive loop came to its first token."""


def fail_plainly(model: Any, inputs: list[torch.Tensor]) -> None:
    """Raise what the model itself raises on these inputs, if it does so before the first token of a scan.

    TorchDynamo's own account of such an error is a page with stack traces.
    """

    def reached() -> None:
        raise _Reached

    try:
        with torch.no_grad(), _tracing.before_each_token(reached):
            model(*inputs)
    except _Reached:
        pass


def _nearest(found: Any, part: str) -> str:
    import difflib

    near = difflib.get_close_matches(part, [n for n in dir(found) if not n.startswith("_")], 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def make_inputs(
    texts: list[str],
    model: Any,
    device: torch.device,
    dtype: torch.dtype | None,
    sizes: Mapping[str, int] | None = None,
) -> list[torch.Tensor]:
    """The inputs that ``--input`` describes, once for each."""
    return [make_input(text, model, device, dtype, sizes) for text in texts]


def make_input(
    text: str,
    model: Any,
    device: torch.device,
    dtype: torch.dtype | None,
    sizes: Mapping[str, int] | None = None,
) -> torch.Tensor:
    """A random tensor as ``--input`` describes it; ``sizes`` are the values of the letters in its shape.

    Raises:
        UsageError: the text is no such description.
    """
    shape_text, _, kind = text.partition(":")
    if not re.fullmatch(r"(\d+|[A-Z])(x(\d+|[A-Z]))*", shape_text):
        raise UsageError(f"--input: expected a shape like 4x2048, got {text!r}")
    shape = []
    for part in shape_text.split("x"):
        if part.isalpha() and part not in (sizes or {}):
            raise UsageError(f"--input: {part} has no value: give it sizes, --sweep {part}=256,512")
        shape.append(int(part) if part.isdigit() else (sizes or {})[part])
    if ids := re.fullmatch(r"ids=([1-9]\d*)", kind):
        return torch.randint(int(ids[1]), shape, device=device)
    if kind and kind not in DTYPES:
        raise UsageError(f"--input: expected ids=N or one of {', '.join(DTYPES)}, got {kind!r}")
    if not kind and len(shape) <= 2 and isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                return torch.randint(module.num_embeddings, shape, device=device)
    wanted = DTYPES[kind] if kind else dtype or torch.get_default_dtype()
    if not wanted.is_floating_point:
        raise UsageError(f"--input: integers need a bound: {shape_text}:ids=N")
    return torch.randn(shape, device=device).to(wanted)


def parse_sweep(texts: list[str], inputs: list[str]) -> dict[str, list[int]]:
    """The sizes that ``--sweep NAME=1,2,4`` asks for, once for each name.

    Raises:
        UsageError: a text is no such description, or names a letter that no ``--input`` has.
    """
    sweep: dict[str, list[int]] = {}
    letters = set(re.findall(r"[A-Z]", " ".join(x.partition(":")[0] for x in inputs)))
    for text in texts:
        name, _, values = text.partition("=")
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", values):
            raise UsageError(f"--sweep: expected NAME=256,512,1024, got {text!r}")
        if name != "mini-batch-size" and name not in letters:
            raise UsageError(
                f"--sweep: expected mini-batch-size or a letter in the shape of an --input (4xTx64, say), got {name!r}"
            )
        sweep[name.replace("-", "_")] = [int(v) for v in values.split(",")]
    return sweep
