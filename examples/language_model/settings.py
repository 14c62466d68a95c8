"""What a run is made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tttc.models import TTTConfig

BACKENDS = ("auto", "triton", "torch", "eager")
# Settings that do not change the losses of a run, and so may differ when it goes on.
FREE = ("minutes", "checkpoint_every", "log_every", "windows")


@dataclass(frozen=True)
class Settings:
    """What a run is made of; the command line of examples/train_lm.py says what each means."""

    layer: str = "linear"
    backbone: str = "transformer"
    size: str | None = None
    hidden: int | None = None
    intermediate: int | None = None
    layers: int | None = None
    heads: int | None = None
    mini_batch: int = 16
    context: int = 512
    batch: int = 8
    accumulate: int = 1
    steps: int | None = None
    minutes: float | None = None
    warmup: int = 50
    lr: float = 2e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    backend: str = "auto"
    autocast: bool = False
    checkpoint_layers: bool = False
    fsdp: bool = False
    checkpoint_every: int = 100
    log_every: int = 10
    windows: int = 64

    def __post_init__(self) -> None:
        for name in ("context", "batch", "accumulate", "checkpoint_every", "log_every", "windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.steps is None and self.minutes is None:
            raise ValueError("steps: expected a number of steps, or minutes, got neither")
        if self.checkpoint_layers and self.backend == "eager":
            raise ValueError(
                "checkpoint_layers: expected a compiled model, got backend eager: torch.func.grad, which the "
                "naive loop calls, does not run under torch.utils.checkpoint"
            )
        if self.minutes is not None and self.warmup < 2 * self.log_every:
            # The number of steps is planned from the speed of the first few, before the schedule must know it.
            raise ValueError(
                f"warmup: expected at least {2 * self.log_every} with --minutes (2 x log-every), got {self.warmup}"
            )

    def config(self) -> TTTConfig:
        """Of the model: a named size, or a small one, with what was asked for in its place."""
        base: dict[str, Any] = {"vocab_size": 256, "mini_batch_size": self.mini_batch}
        base |= {"layer": self.layer, "backbone": self.backbone}
        hidden = self.hidden or 256
        small = {
            "hidden_size": hidden,
            "intermediate_size": 8 * round(hidden * 8 / 3 / 8),
            "num_layers": 4,
            "num_heads": max(1, hidden // 64),
        }
        asked = {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_layers": self.layers,
            "num_heads": self.heads,
        }
        base |= {k: v for k, v in asked.items() if v is not None}
        return TTTConfig.named(self.size, **base) if self.size else TTTConfig(**(small | base))

    def differences(self, other: dict[str, Any]) -> list[str]:
        """The settings in which a saved run is another run than this."""
        mine = asdict(self)
        return [
            f"{k} was {other.get(k)}, now {v}"
            for k, v in mine.items()
            if k not in FREE and other.get(k) != v
        ]
