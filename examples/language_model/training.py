"""One run: a model, its optimiser and schedule, and the loop, which a killed run takes up where it was saved."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import tttc
from language_model import checkpoints
from language_model.place import Place
from language_model.settings import Settings
from language_model.text import Text
from tttc.models import TTTLanguageModel

LAST_RATE = 0.1  # of the learning rate at the end, of that after the warm-up
PLANNED = 0.97  # of the minutes given are planned with; the clock stops a run at all of them


def build_model(settings: Settings, place: Place) -> nn.Module:
    """The model, its blocks compiled, spread over the processes.

    Blocks are compiled one by one: equal blocks share what is compiled, whatever the depth of the model, and
    each can be recomputed in the backward, or sharded, by itself.
    """
    torch.manual_seed(settings.seed)
    model = TTTLanguageModel(settings.config(), device=place.device)
    for i, block in enumerate(model.blocks):
        if settings.backend != "eager":
            block = tttc.compile(block, backend=settings.backend, strict=True)
        if settings.checkpoint_layers:
            block = checkpoint_wrapper(block, preserve_rng_state=False)
        model.blocks[i] = block
    if settings.fsdp:
        mesh = init_device_mesh(place.device.type, (place.world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if place.world > 1:
        return DistributedDataParallel(model)
    return model


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW; the weights of projections decay, norms, biases, embeddings and initial fast weights do not."""
    decaying = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in decaying], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in decaying], "weight_decay": 0.0},
    ]  # fmt: skip
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)


def learning_rate(settings: Settings, step: int, steps: int | None) -> float:
    """Linear warm-up, then a cosine down to a tenth; ``steps`` matters after the warm-up alone."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    assert steps is not None
    done = (step - settings.warmup) / max(1, steps - settings.warmup)
    return settings.lr * (
        LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    )


@dataclass
class Progress:
    """How far a run is; what of it a checkpoint keeps, beside parameters and the optimiser's state."""

    losses: list[float] = field(default_factory=list)  # of every step, nats a byte
    speeds: list[tuple[int, float]] = field(default_factory=list)  # (step, tokens a second)
    seconds: float = 0.0
    steps: int | None = None  # planned


class Run:
    """One training run, in the folder ``out``; goes on from the checkpoint there, if there is one.

    Raises:
        ValueError: the checkpoint is of another run; settings that do not fit together.
    """

    def __init__(self, settings: Settings, place: Place, text: bytes, out: Path) -> None:
        share = place.world * settings.accumulate
        if settings.batch % share:
            raise ValueError(
                f"batch: expected a multiple of processes x accumulate = {share}, got {settings.batch}"
            )
        self.settings, self.place, self.path = settings, place, out / "checkpoint.pt"
        self.text = Text(text, settings.context, place.device)
        self.model = build_model(settings, place)
        self.optimizer = build_optimizer(self.model, settings)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.progress = Progress(steps=settings.steps if settings.minutes is None else None)
        if self.path.exists():
            saved = checkpoints.load(self.path, self.model, self.optimizer, self._check)
            self.progress = Progress(**{k: v for k, v in saved.items() if k != "settings"})

    def _check(self, saved: dict[str, Any]) -> None:
        differences = self.settings.differences(saved["settings"])
        if differences:
            raise ValueError(
                f"{self.path} is of another run ({'; '.join(differences)}): "
                "expected the same settings, another --out or --fresh"
            )

    def save(self) -> None:
        """Write the checkpoint."""
        kept = {**asdict(self.progress), "settings": asdict(self.settings)}
        checkpoints.save(self.path, self.model, self.optimizer, kept)

    def autocast(self) -> torch.autocast:
        """bfloat16 where asked for."""
        return torch.autocast(self.place.device.type, torch.bfloat16, self.settings.autocast)

    @contextlib.contextmanager
    def _gradients_stay(self, stay: bool) -> Iterator[None]:
        """Gradients are added up here, and not over the processes yet."""
        if self.settings.fsdp:
            self.model.set_requires_gradient_sync(not stay)
            yield
        elif stay and isinstance(self.model, DistributedDataParallel):
            with self.model.no_sync():
                yield
        else:
            yield

    def step(self, step: int) -> torch.Tensor:
        """One step; the loss of this process's share, on the device."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, self.progress.steps)
        total = torch.zeros((), device=self.place.device)
        parts = self.text.random_starts(settings.batch, settings.seed, step).chunk(
            settings.accumulate
        )
        for i, starts in enumerate(parts):
            ids, targets = self.text.windows(self.place.mine(starts))
            with self._gradients_stay(i + 1 < len(parts)):
                with self.autocast():
                    logits = self.model(ids)
                loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
                (loss / len(parts)).backward()
            total += loss.detach() / len(parts)
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def train(self, report: Callable[[Run], None], stepped: Callable[[Run], None]) -> Progress:
        """Steps until the planned number, or the clock; then a checkpoint.

        ``report`` is called with every known loss, ``stepped`` after every step, ahead of the device.
        """
        progress, settings = self.progress, self.settings
        before, start = progress.seconds, time.perf_counter()
        since, waiting, step = start, [], len(progress.losses)
        self.step_at = step
        while (progress.steps is None or step < progress.steps) and not self._late():
            waiting.append(self.step(step))
            step += 1
            self.step_at = step
            stepped(self)
            saving = step % settings.checkpoint_every == 0
            if step % settings.log_every and step != progress.steps and not saving:
                continue
            losses = self.place.total(torch.stack(waiting)) / self.place.world
            progress.losses += losses.tolist()  # waits for the device
            now = time.perf_counter()
            per_step = (now - since) / len(waiting)
            progress.speeds.append((step, settings.batch * settings.context / per_step))
            progress.seconds = self.place.from_first(before + now - start)
            since, waiting = now, []
            if progress.steps is None and step >= 2 * settings.log_every:
                progress.steps = self._planned(per_step)
            report(self)
            if saving and progress.steps is not None:
                self.save()
                since = time.perf_counter()
        if len(progress.losses) % settings.checkpoint_every:
            self.save()
        return progress

    def _late(self) -> bool:
        minutes = self.settings.minutes
        return minutes is not None and self.progress.seconds >= 60 * minutes

    def _planned(self, seconds: float) -> int:
        """How many steps the time left is enough for, at ``seconds`` a step."""
        done = len(self.progress.losses)
        left = PLANNED * 60 * self.settings.minutes - self.progress.seconds
        count = done + max(0, int(self.place.from_first(left / seconds)))
        return count if self.settings.steps is None else min(count, self.settings.steps)
