"""Compilations made to look at a model do not use up the user's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

MANY = 1 << 16


@contextmanager
def without_recompile_limit() -> Iterator[None]:
    """Let TorchDynamo compile one function as often as it is asked to, instead of giving up after a few times."""
    with torch._dynamo.config.patch(recompile_limit=MANY, accumulated_recompile_limit=MANY):
        yield
