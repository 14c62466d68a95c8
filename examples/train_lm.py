"""A byte-level language model whose hidden state learns while it reads, trained on Python's standard library.

    python examples/train_lm.py --steps 300                                  # small; any device
    python examples/train_lm.py --layer mlp --size 125m --context 16384 --minutes 5
    python examples/train_lm.py --context 128 --steps 200 --compare          # eager and compiled, same seed
    torchrun --nproc-per-node 8 examples/train_lm.py --size 350m --fsdp ...  # any number of processes

The folder --out receives checkpoint.pt, log.json (settings, every loss, held-out perplexity by position) and
plots. The same command run again goes on from the checkpoint: killed at any time, a run comes to the losses
it would have had. Plots need matplotlib (the extra "plot").
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import sys
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from language_model import checkpoints, evaluation, plots
from language_model.place import Place
from language_model.settings import BACKENDS, Settings
from language_model.text import read_library
from language_model.training import Run
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tttc.models import SIZES

NAMES = {"linear": "TTT-Linear", "mlp": "TTT-MLP"}
PACKAGES = ("tttc", "torch", "triton")
console = Console()


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults are those of :class:`Settings`."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    d = Settings(steps=1)
    g = p.add_argument_group("the model")
    g.add_argument("--layer", choices=NAMES, default=d.layer, help="the inner model [%(default)s]")
    g.add_argument("--backbone", choices=("transformer", "mamba"), default=d.backbone)
    g.add_argument(
        "--size", choices=SIZES, help="a size of arXiv 2407.04620; else 4 layers, 256 wide"
    )
    for name, what in (("hidden", "width"), ("intermediate", "width inside SwiGLU"), ("layers", "blocks"), ("heads", "heads")):  # fmt: skip
        g.add_argument(f"--{name}", type=int, help=f"{what}, in the place of the size's")
    g.add_argument("--mini-batch", type=int, default=d.mini_batch, help="tokens of an inner mini-batch [%(default)s]")  # fmt: skip
    g = p.add_argument_group("the training")
    g.add_argument("--context", type=int, default=d.context, help="bytes in a sequence [%(default)s]")  # fmt: skip
    g.add_argument("--batch", type=int, default=d.batch, help="sequences in a step, over all processes [%(default)s]")  # fmt: skip
    g.add_argument("--accumulate", type=int, default=d.accumulate, help="parts a step is computed in, one by one [%(default)s]")  # fmt: skip
    g.add_argument("--steps", type=int, help="length of the schedule [300, or what --minutes are enough for]")  # fmt: skip
    g.add_argument("--minutes", type=float, help="stop by the clock; the schedule ends then")
    g.add_argument("--warmup", type=int, default=d.warmup, help="steps [%(default)s]")
    g.add_argument("--lr", type=float, default=d.lr, help="learning rate after the warm-up [%(default)s]")  # fmt: skip
    g.add_argument("--weight-decay", type=float, default=d.weight_decay, help="[%(default)s]")
    g.add_argument("--clip", type=float, default=d.clip, help="largest norm of the gradients [%(default)s]")  # fmt: skip
    g.add_argument("--seed", type=int, default=d.seed, help="of parameters and data [%(default)s]")
    g = p.add_argument_group("how it runs")
    g.add_argument("--device", choices=("cuda", "cpu"), help="[a GPU where there is one]")
    g.add_argument("--backend", choices=BACKENDS, default=d.backend, help="of tttc.compile [%(default)s]")  # fmt: skip
    g.add_argument("--eager", action="store_const", const="eager", dest="backend", help="the naive loop, not compiled")  # fmt: skip
    g.add_argument("--compare", nargs="?", const="eager", choices=BACKENDS, help="train with this backend [eager] as well, and compare the losses")  # fmt: skip
    g.add_argument("--autocast", action=argparse.BooleanOptionalAction, help="bfloat16 [on a GPU]")
    g.add_argument("--checkpoint-layers", action="store_true", help="compute each block again in the backward")  # fmt: skip
    g.add_argument("--fsdp", action="store_true", help="shard parameters over processes (FSDP2)")
    g.add_argument("--out", type=Path, help="folder for what is written [runs/LAYER]")
    g.add_argument("--fresh", action="store_true", help="start over, whatever --out holds")
    g.add_argument("--checkpoint-every", type=int, default=d.checkpoint_every, help="steps [%(default)s]")  # fmt: skip
    g.add_argument("--log-every", type=int, default=d.log_every, help="steps between looks at the loss [%(default)s]")  # fmt: skip
    g.add_argument("--windows", type=int, default=d.windows, help="sequences of the held-out measurement [%(default)s]")  # fmt: skip
    return p


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record whole."""
    text = json.dumps(record, indent=1) + "\n"
    checkpoints.write_whole(path, lambda file: file.write(text.encode()))


def about(settings: Settings, place: Place) -> dict[str, Any]:
    """Where a record comes from."""
    gpu = place.device.type == "cuda"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(place.device) if gpu else f"CPU {platform.machine()}",
        "processes": place.world,
        "versions": {**{n: metadata.version(n) for n in PACKAGES}, "python": platform.python_version()},
        "settings": asdict(settings),
    }  # fmt: skip


def train_once(
    settings: Settings, place: Place, texts: tuple[bytes, bytes], out: Path
) -> dict[str, Any]:
    """A run in ``out``, its log and its plots; returns the log."""
    name = f"{NAMES[settings.layer]}, {settings.backend}"
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place.device)
    try:
        run = Run(settings, place, texts[0], out)
    except ValueError as error:  # sizes that do not fit, the checkpoint of another run
        sys.exit(f"train_lm.py: error: {error}")
    done = len(run.progress.losses)
    if place.first:
        console.print(
            f"[bold]{name}[/bold]: {run.parameters / 1e6:.1f} M parameters, {settings.batch} x {settings.context} "
            f"bytes a step, on {place.world} x {place.device.type}"
            + (f"; goes on from step {done}" if done else "")
        )
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not place.first) as bar:
        shown = bar.add_task(
            name, total=run.progress.steps, completed=done, loss=float("nan"), speed=0.0
        )

        def stepped(run: Run) -> None:
            bar.update(shown, completed=run.step_at)

        def report(run: Run) -> None:
            p = run.progress
            bar.update(shown, total=p.steps, loss=p.losses[-1], speed=p.speeds[-1][1])
            if place.first and not console.is_terminal:
                console.print(f"  step {len(p.losses)} loss {p.losses[-1]:.4f} {p.speeds[-1][1]:,.0f} tokens/s")  # fmt: skip

        progress = run.train(report, stepped)
    held_out = evaluation.by_position(run, texts[1])
    record = {
        "name": NAMES[settings.layer],
        **about(settings, place),
        "parameters": run.parameters,
        "steps": len(progress.losses),
        "bytes_read": len(progress.losses) * settings.batch * settings.context,
        "seconds": progress.seconds,
        "losses": progress.losses,
        "tokens_per_second": progress.speeds,
        "held_out": held_out,
    }
    if place.device.type == "cuda":
        record["peak_memory_bytes"] = torch.cuda.max_memory_allocated(place.device)
    if place.first:
        write_json(out / "log.json", record)
        if plots.available():
            title = f"{NAMES[settings.layer]}, {run.parameters / 1e6:.1f} M parameters"
            plots.loss_curve(out / "loss.png", progress.losses, title)
            plots.perplexity(
                out / "perplexity.png", {record["name"]: held_out["by_position"]}, title
            )
        else:
            console.print("No plots: matplotlib is not installed (the extra 'plots').")
        console.print(
            f"Held out: perplexity {held_out['perplexity']:.3f} a byte, "
            + ", ".join(
                f"{r['perplexity']:.3g} at {r['from']}" for r in held_out["by_position"][-4:]
            )
        )
    return record


def compare(
    settings: Settings, other: str, place: Place, texts: tuple[bytes, bytes], out: Path
) -> None:
    """Two runs that differ in the backend alone; how far their losses are apart."""
    curves: dict[str, list[float]] = {}
    for backend in (other, settings.backend):
        folder = out / backend
        folder.mkdir(parents=True, exist_ok=True)
        record = train_once(replace(settings, backend=backend), place, texts, folder)
        curves[backend] = record["losses"]
    if not place.first:
        return
    first, second = curves.values()
    if len(first) != len(second):
        raise ValueError(f"compare: expected runs of the same length, got {len(first)} and {len(second)} steps (by --minutes?)")  # fmt: skip
    gaps = [abs(x - y) for x, y in zip(first, second, strict=True)]
    worst = max(range(len(gaps)), key=gaps.__getitem__)
    result = {
        **about(settings, place),
        "curves": curves,
        "largest_difference": gaps[worst],
        "at_step": worst + 1,
        "mean_difference": sum(gaps) / len(gaps),
        "fall_of_the_loss": first[0] - first[-1],
    }
    write_json(out / "compare.json", result)
    if plots.available():
        plots.comparison(out / "compare.png", curves, NAMES[settings.layer])
    console.print(
        f"{' and '.join(curves)}: losses differ by at most {gaps[worst]:.2e} (step {worst + 1}), "
        f"by {result['mean_difference']:.2e} on average, while they fell from {first[0]:.3f} to {first[-1]:.3f}"
    )


def main() -> None:
    """Train as the command line says."""
    p = parser()
    given = vars(p.parse_args())
    device, out, fresh, other = (given.pop(k) for k in ("device", "out", "fresh", "compare"))
    place = Place.find(device)
    if given["autocast"] is None:
        given["autocast"] = place.device.type == "cuda"
    if given["steps"] is None and given["minutes"] is None:
        given["steps"] = 300
    out = Path("runs") / given["layer"] if out is None else out
    try:
        settings = Settings(**given)
        settings.config()
        if settings.fsdp and not torch.distributed.is_initialized():
            raise ValueError("fsdp: expected to run under torchrun")
        if other == settings.backend:
            raise ValueError(f"compare: expected another backend than {other}")
    except (TypeError, ValueError) as error:
        p.error(str(error))
    folders = [out] if other is None else [out / other, out / settings.backend]
    if place.first:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            if fresh:
                (folder / "checkpoint.pt").unlink(missing_ok=True)
    place.wait()
    texts = read_library()
    if other is None:
        train_once(settings, place, texts, out)
    else:
        compare(settings, other, place, texts, out)
    place.leave()


if __name__ == "__main__":
    main()
