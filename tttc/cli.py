"""The command line: ``tttc explain``, ``bench``, ``demo``, ``doctor``, ``cache``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from tttc import logs
from tttc.codegen.kernel import KINDS
from tttc.commands.model import (
    DTYPES,
    MODEL_HELP,
    UsageError,
    device_of,
    fail_plainly,
    make_inputs,
    parse_sweep,
    prepare,
)
from tttc.options import BACKENDS
from tttc.progress import doing
from tttc.report.text import console

INPUT_HELP = (
    "shape of an argument, 4x2048x64; once for each. With a dtype: 4x2048x64:bfloat16. Integer ids below n: "
    "4x2048:ids=256; a plain 4x2048 means ids where the model has an embedding"
)
EXIT_CODES = """exit codes:
  0    done
  1    a check failed, or the model did
  2    a mistake in what was asked for; the message says what was expected
  130  interrupted
"""
ENVIRONMENT = """environment:
  TTTC_LOGS       what to log, in the manner of TORCH_LOGS: TTTC_LOGS="+passes,schedule,kernels"
  TTTC_CACHE_DIR  where kernels, schedules and programs are kept (default ~/.cache/tttc)
  TTTC_WARM       0: compile in every process, use no program kept by another
  TTTC_TUNE       1: search for schedules on the GPU at hand; TTTC_TUNE_SECONDS: for how long at most (default 11)
  TTTC_PROGRESS   0: show no progress on a terminal
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 a mistake in what was asked for."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        try:
            logs.configure()
        except ValueError as error:
            raise UsageError(str(error)) from None
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


# -- what may be asked for ----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tttc",
        description="A compiler for test-time-training layers.",
        epilog="tttc COMMAND --help has the options of a command, and examples.\n\n"
        f"{EXIT_CODES}\n{ENVIRONMENT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tttc {metadata.version('tttc')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_explain(commands)
    _add_bench(commands)
    _add_demo(commands)
    _add_doctor(commands)
    _add_cache(commands)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], what: str, examples: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog="examples:\n"
        + "".join(f"  {line}\n" for line in examples.splitlines())
        + f"\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
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
    parser.add_argument(
        "--backend",
        default="auto",
        choices=BACKENDS,
        metavar="NAME",
        help="auto, triton or torch (default auto)",
    )
    parser.add_argument(
        "--mini-batch-size",
        type=_positive,
        metavar="B",
        help="run every scan with mini-batches of that size",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default 0)")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        if (value := float(text)) > 0:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")


# -- tttc explain -------------------------------------------------------------------------------------------


def _add_explain(commands: Any) -> None:
    parser = _command(
        commands,
        "explain",
        _explain,
        "say what the compiler does to a model",
        "tttc explain mymodels.lm:build --input 4x2048\n"
        "tttc explain mymodels.lm:build --input 4x2048 --html report.html\n"
        "tttc explain mymodels.layer:layer --input 2x512x256:bfloat16 --target sm_100 --no-backward\n"
        "tttc explain mymodels.lm:build --input 4x2048 --strict --json > report.json",
    )
    _model_options(parser)
    parser.add_argument("--html", metavar="FILE", help="also write a report to look at, one file")
    parser.add_argument(
        "--target", help="GPU the kernels' resources are given for: sm_90, gfx942, ..."
    )
    parser.add_argument(
        "--check-tokens",
        type=int,
        default=256,
        metavar="N",
        help="tokens of each scan that are compared with the naive loop (default 256)",
    )
    parser.add_argument(
        "--backward",
        action=argparse.BooleanOptionalAction,
        help="the backward of each scan too (default: where a parameter requires a gradient)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 where a scan runs as the naive loop"
    )


def _explain(options: argparse.Namespace) -> int:
    model, device, dtype = prepare(options)
    inputs = make_inputs(options.input, model, device, dtype)
    from torch._dynamo.exc import TorchDynamoException

    from tttc.codegen.resources import measure
    from tttc.report.explain import explain

    if options.target:
        try:
            measure([], options.target)
        except ValueError as error:
            raise UsageError(f"--{error}") from None
    with doing(f"explaining {options.model}"):
        try:
            found = explain(
                model,
                *inputs,
                backend=options.backend,
                mini_batch_size=options.mini_batch_size,
                backward=options.backward,
                check_tokens=options.check_tokens,
                target=options.target,
            )
        except TorchDynamoException:
            if not options.debug:
                fail_plainly(model, inputs)
            raise
    if options.html:
        _written(found.to_html, options.html)
    if options.json:
        print(found.to_json())
    else:
        console().print(found)
    eager = [s for s in found.scans if s.form == "eager"]
    if options.strict and eager:
        for scan in eager:
            print(f"tttc: {scan.step} runs as the naive loop: {scan.reason}", file=sys.stderr)
        return 1
    return 0


def _written(write: Callable[[str], Any], path: str) -> None:
    """Write a file the user named."""
    try:
        write(path)
    except OSError as error:
        raise UsageError(f"{path}: can't be written: {error.strerror or error}") from None
    except ImportError as error:
        raise UsageError(str(error)) from None
    print(f"tttc: wrote {path}", file=sys.stderr)


# -- tttc bench ---------------------------------------------------------------------------------------------


def _add_bench(commands: Any) -> None:
    parser = _command(
        commands,
        "bench",
        _bench,
        "time a model run eagerly, by torch.compile, by tttc and by its peers",
        "tttc bench mymodels.lm:build --input 4x2048\n"
        "tttc bench mymodels.lm:build --input 4x2048 --backward --save result.json\n"
        "tttc bench mymodels.lm:build --input 4xT --sweep T=512,1024,2048 --plot length.png\n"
        "tttc bench mymodels.lm:build --input 4x2048 --sweep mini-batch-size=16,32,64 --only tttc",
    )
    _model_options(parser)
    parser.add_argument("--backward", action="store_true", help="gradients too")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="NAME=N,N,...",
        help="measure at several sizes: of a letter in --input, or mini-batch-size",
    )
    parser.add_argument(
        "--only",
        metavar="NAMES",
        help="eager, torch.compile, tttc, attention, flash-linear-attention",
    )
    parser.add_argument(
        "--repeats", type=_positive, default=10, metavar="N", help="samples (default 10)"
    )
    parser.add_argument(
        "--budget",
        type=_seconds,
        default=20.0,
        metavar="S",
        help="seconds for each contender (default 20)",
    )
    parser.add_argument("--save", metavar="FILE", help="also write the result there, as JSON")
    parser.add_argument(
        "--plot", metavar="FILE", help="also draw a sweep there, as .png, .svg or .pdf"
    )


def _bench(options: argparse.Namespace) -> int:
    from tttc.report.benchmark import EVERYONE, benchmark, tokens_of
    from tttc.report.sweep import AXES, MINI_BATCH, run_sweep

    sweep = parse_sweep(options.sweep, options.input)
    if options.plot and not sweep:
        raise UsageError("--plot: expected a --sweep to draw")
    only = options.only.split(",") if options.only else None
    if unknown := [n for n in only or () if n not in EVERYONE]:
        raise UsageError(f"--only: expected some of {', '.join(EVERYONE)}, got {unknown[0]!r}")
    model, device, dtype = prepare(options)

    def measure(sizes: dict[str, int]) -> tuple[int, Any]:
        inputs = make_inputs(options.input, model, device, dtype, sizes)
        letters = options.input[0].partition(":")[0].split("x")
        axes = {n: letters.index(n) if n in letters else i for n, i in AXES.items()}
        found = benchmark(
            model,
            *inputs,
            backward=options.backward,
            backend=options.backend,
            mini_batch_size=sizes.get(MINI_BATCH, options.mini_batch_size),
            contenders=only,
            repeats=options.repeats,
            budget=options.budget,
        )
        return tokens_of(inputs, axes), found

    result: Any = run_sweep(sweep, measure) if sweep else measure({})[1]
    if options.save:
        _written(result.to_json, options.save)
    if options.plot:
        _written(result.to_png, options.plot)
    if options.json:
        print(result.to_json())
    else:
        console().print(result)
    return 0


# -- tttc demo ----------------------------------------------------------------------------------------------


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        _demo,
        "compile two language models, show what the compiler did, check and time them",
        "tttc demo\ntttc demo --layer mlp --tokens 1024",
    )
    parser.add_argument("--layer", choices=("linear", "mlp"), help="only this layer (default both)")
    parser.add_argument("--tokens", type=_positive, metavar="T", help="length of the text read")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")


def _demo(options: argparse.Namespace) -> int:
    from tttc.report.demo import demo

    layers = (options.layer,) if options.layer else ("linear", "mlp")
    found = demo(layers, device_of(options.device), options.tokens, show=not options.json)
    if options.json:
        print(json.dumps(found, indent=1))
    return 0 if found["passed"] else 1


# -- tttc doctor --------------------------------------------------------------------------------------------


def _add_doctor(commands: Any) -> None:
    parser = _command(
        commands,
        "doctor",
        _doctor,
        "say what is here, what will and won't work, and how to mend it",
        "tttc doctor\ntttc doctor --json",
    )
    parser.add_argument("--no-trial", action="store_true", help="only look, compile nothing")


def _doctor(options: argparse.Namespace) -> int:
    from tttc.commands import doctor

    with doing("looking"):
        findings = doctor.examine(trial=not options.no_trial)
    if options.json:
        lines = doctor.verdict(findings)
        print(json.dumps({"findings": [vars(f) for f in findings], "verdict": lines}, indent=1))
    else:
        for part in doctor.shown(findings):
            console().print(part)
    return 1 if any(f.state == doctor.BAD for f in findings) else 0


# -- tttc cache ---------------------------------------------------------------------------------------------


def _add_cache(commands: Any) -> None:
    parser = _command(
        commands,
        "cache",
        _cache,
        "show or clear what is kept on disk: emitted kernels, schedules found by measuring, compiled programs",
        "tttc cache\ntttc cache show --entries\ntttc cache clear --older-than 30\ntttc cache clear --kind schedules",
    )
    parser.add_argument("action", nargs="?", choices=("show", "clear"), default="show")
    parser.add_argument("--kind", choices=KINDS, help="only these (default: all)")
    parser.add_argument("--entries", action="store_true", help="show: list every entry")
    parser.add_argument(
        "--older-than",
        type=float,
        default=0.0,
        metavar="DAYS",
        help="clear: only what was not written to for so long",
    )


def _cache(options: argparse.Namespace) -> int:
    from tttc.commands import cache
    from tttc.report.text import byte_count

    if options.action == "show":
        found = cache.contents(options.kind)
        if options.json:
            print(json.dumps(found, indent=1))
        else:
            for part in cache.shown(found, options.entries):
                console().print(part)
        return 0
    try:
        found = cache.clear(options.older_than, options.kind)
    except OSError as error:
        raise UsageError(f"{error.filename}: can't be deleted: {error.strerror}") from None
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print(
            f"{found['folder']}: deleted {found['deleted']} entries, {byte_count(found['bytes'])}"
        )
    return 0
