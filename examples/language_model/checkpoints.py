"""Checkpoints: everything a run goes on from, in one file that is whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)


def write_whole(path: Path, write: Any) -> None:
    """Call ``write(file)`` so that whoever opens ``path``, whenever, finds the old file or the new one."""
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def save(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> None:
    """Write parameters, the optimiser's state and ``progress``, the same whether sharded or not.

    All processes call this; the first writes.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    parameters, moments = get_state_dict(model, optimizer, options=options)
    if not dist.is_initialized() or dist.get_rank() == 0:
        whole = {"model": parameters, "optimizer": moments, "progress": progress}
        write_whole(path, lambda file: torch.save(whole, file))


def load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, check: Any
) -> dict[str, Any]:
    """Take up what :func:`save` wrote; returns its ``progress``, after ``check(progress)`` has not raised."""
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    check(saved["progress"])
    set_state_dict(
        model,
        optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )
    return saved["progress"]
