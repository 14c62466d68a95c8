"""Python's standard library as bytes, and windows of it that follow from a seed and a step alone."""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path

import torch

HELD_OUT = 16  # one file in so many is held out
INSTALLED = {"site-packages", "dist-packages"}  # what is not the standard library's


def is_held_out(name: str) -> bool:
    """Whether the file of this name (relative, with slashes) is held out; the same on every machine."""
    return zlib.crc32(name.encode()) % HELD_OUT == 0


def read_library(folder: Path | None = None) -> tuple[bytes, bytes]:
    """The source files under ``folder`` (default: of the standard library), to train on and held out.

    Files come in the order of their names, a zero byte after each.

    Raises:
        FileNotFoundError: one of the two has no files.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    texts: tuple[list[bytes], list[bytes]] = ([], [])
    for name in names:
        if not INSTALLED.intersection(name.split("/")):
            texts[is_held_out(name)].append((folder / name).read_bytes() + b"\0")
    if not all(texts):
        raise FileNotFoundError(f"expected files *.py to train on and held out under {folder}")
    return b"".join(texts[0]), b"".join(texts[1])


class Text:
    """Bytes on a device, cut into windows of ``context`` bytes and the byte after each of them.

    Raises:
        ValueError: there are fewer bytes than a window takes.
    """

    def __init__(self, text: bytes, context: int, device: torch.device) -> None:
        if len(text) <= context:
            raise ValueError(
                f"context: expected fewer than the {len(text)} bytes there are, got {context}"
            )
        self.size, self.context, self.device = len(text), context, device
        self._bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
        self._offsets = torch.arange(context + 1, device=device)

    def random_starts(self, count: int, seed: int, step: int) -> torch.Tensor:
        """Where the windows of a step start, ``[count]`` on the CPU: no state to save, any step at once."""
        generator = torch.Generator().manual_seed((seed << 32) + step)
        return torch.randint(self.size - self.context, (count,), generator=generator)

    def even_starts(self, count: int) -> torch.Tensor:
        """``count`` starts from the first to the last possible, evenly spaced."""
        return torch.linspace(0, self.size - self.context - 1, count, dtype=torch.float64).long()

    def windows(self, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets ``[B, context]``, gathered on the device; the host does not wait."""
        if self.device.type == "cuda":
            starts = starts.pin_memory()
        starts = starts.to(self.device, non_blocking=True)
        both = self._bytes[starts[:, None] + self._offsets].long()
        return both[:, :-1], both[:, 1:]
