"""What a TTT language model is made of, and the sizes of arXiv 2407.04620."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from tttc._checks import check_mini_batch_size, check_positive

Layer = Literal["linear", "mlp"]
Backbone = Literal["transformer", "mamba"]

SIZES: dict[str, dict[str, int]] = {
    name: dict(
        zip(("hidden_size", "intermediate_size", "num_layers", "num_heads"), size, strict=True)
    )
    for name, size in {
        "125m": (768, 2048, 12, 12),
        "350m": (1024, 2736, 24, 16),
        "760m": (1536, 4096, 24, 16),
        "1.3b": (2048, 5504, 24, 32),
    }.items()
}


@dataclass(frozen=True)
class TTTConfig:
    """Sizes and kinds of a :class:`~tttc.models.TTTLanguageModel`.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        intermediate_size: width inside SwiGLU.
        num_layers: number of blocks.
        num_heads: heads of each TTT layer.
        mini_batch_size: tokens in a mini-batch of the inner model.
        layer: the inner model, ``"linear"`` or ``"mlp"``.
        backbone: ``"transformer"``, or ``"mamba"``: q and k share a projection, the gate is on, and a
            convolution precedes each block.
        conv_kernel: width of the convolutions of the Mamba-style backbone.
        rope_theta: base of the rotary embedding.
        norm_eps: of every norm outside the inner model.

    Raises:
        ValueError, TypeError: naming the field, what was expected and what came.

    Example:
        >>> from tttc.models import TTTConfig
        >>> TTTConfig.named("125m", layer="mlp").num_heads
        12
    """

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_layers: int = 12
    num_heads: int = 12
    mini_batch_size: int = 16
    layer: Layer = "linear"
    backbone: Backbone = "transformer"
    conv_kernel: int = 4
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "conv_kernel",
        ):
            check_positive(getattr(self, name), name)
        check_mini_batch_size(self.mini_batch_size)
        for name, kinds in (("layer", get_args(Layer)), ("backbone", get_args(Backbone))):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name}: expected one of {kinds}, got {getattr(self, name)!r}")

    @classmethod
    def named(cls, size: str, **changes: Any) -> TTTConfig:
        """The config of size ``"125m"``, ``"350m"``, ``"760m"`` or ``"1.3b"``, fields changed as given."""
        if size not in SIZES:
            raise ValueError(f"size: expected one of {tuple(SIZES)}, got {size!r}")
        return cls(**{**SIZES[size], **changes})
