"""Where a process of a run is: which device, and which of how many processes."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Place:
    """One of ``world`` processes, with a device of its own."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @classmethod
    def find(cls, device: str | None = None) -> Place:
        """This process's place; under torchrun it joins the others (NCCL on GPUs, else gloo)."""
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if "WORLD_SIZE" not in os.environ:
            return cls(torch.device(kind))
        local = int(os.environ["LOCAL_RANK"])
        found = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(found)
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        return cls(found, dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def mine(self, x: torch.Tensor) -> torch.Tensor:
        """This process's share of the rows of ``x``."""
        return x[self.rank :: self.world]

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of ``x`` over the processes."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def from_first(self, value: float) -> float:
        """A number of the first process, in all of them."""
        if self.world == 1:
            return value
        x = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(x, 0)
        return float(x)

    def wait(self) -> None:
        """Wait for the other processes."""
        if dist.is_initialized():
            dist.barrier()

    def leave(self) -> None:
        """Leave the other processes."""
        if dist.is_initialized():
            dist.destroy_process_group()
