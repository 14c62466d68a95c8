"""The command line: ``tttc explain``, ``tttc bench``, ``tttc demo``."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "int64": torch.int64,
}
MODEL_HELP = "package.module:name of a model, of a class, or of a function without arguments that returns one"
INPUT_HELP = (
    "shape of an argument, 4x2048x64; once for each. With a dtype: 4x2048x64:bfloat16. Integer ids below n: "
    "4x2048:ids=256; a plain 4x2048 means ids where the model has an embedding"
)


class UsageError(Exception):
    """What the user asked for can't be done; the message says what was expected."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 a mistake in what was asked for."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader went away; nothing more may be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        if isinstance(error, UsageError):
            print(f"tttc: {error}", file=sys.stderr)
            return 2
        print(f"tttc: {type(error).__name__}: {error}", file=sys.stderr)
        if not options.debug:
            print("tttc: --debug shows where", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tttc", description="A compiler for test-time-training layers."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    explain = _command(
        commands,
        "explain",
        _explain,
        "say what the compiler does to a model",
        "tttc explain mymodels.lm:build --input 4x2048\n"
        "tttc explain mymodels.layer:layer --input 2x512x256:bfloat16 --target sm_100",
    )
    _model_options(explain)
    explain.add_argument(
        "--target", help="GPU the kernels' resources are given for: sm_90, gfx942, ..."
    )
    explain.add_argument(
        "--check-tokens", type=int, default=256, metavar="N",
        help="tokens of each scan that are compared with the naive loop (default 256)",
    )  # fmt: skip

    bench = _command(
        commands,
        "bench",
        _bench,
        "time a model run eagerly, by torch.compile and by tttc",
        "tttc bench mymodels.lm:build --input 4x2048\n"
        "tttc bench mymodels.lm:build --input 4x2048 --backward --json result.json",
    )
    _model_options(bench)
    bench.add_argument("--backward", action="store_true", help="gradients too")
    bench.add_argument("--repeats", type=int, default=10, metavar="N", help="samples (default 10)")
    bench.add_argument(
        "--budget",
        type=float,
        default=20.0,
        metavar="S",
        help="seconds for each contender (default 20)",
    )
    bench.add_argument("--json", metavar="FILE", help="also write the result there")

    demo = _command(
        commands,
        "demo",
        _demo,
        "compile two language models, show what the compiler did, check and time them",
        "tttc demo\ntttc demo --layer mlp --tokens 1024",
    )
    demo.add_argument("--layer", choices=("linear", "mlp"), help="only this layer (default both)")
    demo.add_argument("--tokens", type=int, metavar="T", help="length of the text read")
    demo.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], what: str, examples: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog="examples:\n" + "".join(f"  {line}\n" for line in examples.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--debug", action="store_true", help="show stack traces")
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--input", action="append", required=True, metavar="SHAPE", help=INPUT_HELP)
    parser.add_argument(
        "--dtype", help=f"of the parameters and floating inputs: {', '.join(DTYPES)}"
    )
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)"
    )
    parser.add_argument("--backend", default="auto", help="auto, triton or torch (default auto)")
    parser.add_argument(
        "--mini-batch-size",
        type=int,
        metavar="B",
        help="run every scan with mini-batches of that size",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default 0)")


# -- commands -------------------------------------------------------------------------------------------


def _explain(options: argparse.Namespace) -> int:
    model, inputs = _prepare(options)
    from tttc.report.explain import explain
    from tttc.report.text import console

    with progress(f"compiling {options.model}"):
        found = explain(
            model,
            *inputs,
            backend=options.backend,
            mini_batch_size=options.mini_batch_size,
            check_tokens=options.check_tokens,
            target=options.target,
        )
    console().print(found)
    return 0


def _bench(options: argparse.Namespace) -> int:
    model, inputs = _prepare(options)
    from tttc.report.benchmark import benchmark
    from tttc.report.text import console

    result = benchmark(
        model,
        *inputs,
        backward=options.backward,
        backend=options.backend,
        mini_batch_size=options.mini_batch_size,
        repeats=options.repeats,
        budget=options.budget,
    )
    console().print(result)
    if options.json:
        result.to_json(options.json)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from tttc.report.demo import demo

    layers = (options.layer,) if options.layer else ("linear", "mlp")
    return 0 if demo(layers, _device(options.device), options.tokens) else 1


# -- what was asked for -----------------------------------------------------------------------------------


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device: {name}: {str(error).splitlines()[0]}") from None
    return device


def _prepare(options: argparse.Namespace) -> tuple[Any, list[torch.Tensor]]:
    torch.manual_seed(options.seed)
    device = _device(options.device)
    model = load(options.model)
    dtype = None
    if options.dtype is not None:
        dtype = DTYPES.get(options.dtype)
        if dtype is None or not dtype.is_floating_point:
            raise UsageError(f"--dtype: expected a floating dtype, got {options.dtype!r}")
    if isinstance(model, nn.Module):
        model = model.to(device=device, dtype=dtype)
    inputs = [make_input(text, model, device, dtype) for text in options.input]
    return model, inputs


def load(name: str) -> Any:
    """The model behind ``package.module:name``.

    Raises:
        UsageError: there is no such module or name, or it is no model.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"model: expected package.module:name, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # An import that fails inside the module is the module's own error.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UsageError(f"model: there is no module {error.name!r} (from {os.getcwd()})") from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"model: {module_name} has no {attribute!r}")
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
        raise UsageError(f"model: {name} returned a {type(made).__name__}, expected a model")
    return made


def make_input(
    text: str, model: Any, device: torch.device, dtype: torch.dtype | None
) -> torch.Tensor:
    """A random tensor as ``--input`` describes it.

    Raises:
        UsageError: the text is no such description.
    """
    shape_text, _, kind = text.partition(":")
    if not re.fullmatch(r"\d+(x\d+)*", shape_text):
        raise UsageError(f"--input: expected a shape like 4x2048, got {text!r}")
    shape = [int(n) for n in shape_text.split("x")]
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
