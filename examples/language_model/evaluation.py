"""Held-out perplexity by token position: how much a longer context helps."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch.nn import functional as F

from language_model.text import Text
from language_model.training import Run


def buckets(context: int) -> list[tuple[int, int]]:
    """Positions from 0, each bucket twice as long as the one before: (0, 1), (1, 2), (2, 4), ..."""
    edges = [0, 1]
    while edges[-1] < context:
        edges.append(min(2 * edges[-1], context))
    return list(itertools.pairwise(edges))


@torch.no_grad()
def by_position(run: Run, held_out: bytes) -> dict[str, Any]:
    """Nats and perplexity a byte for buckets of positions, over evenly spaced windows of the held-out text.

    Windows are cut anywhere, so that every position reads the same kind of text and what differs between
    positions is the context before them.
    """
    settings, place = run.settings, run.place
    text = Text(held_out, settings.context, place.device)
    share = max(1, settings.batch // settings.accumulate)
    count = math.ceil(settings.windows / place.world) * place.world  # as many in each process
    total = torch.zeros(settings.context, dtype=torch.float64, device=place.device)
    run.model.eval()
    for starts in place.mine(text.even_starts(count)).split(max(1, share // place.world)):
        ids, targets = text.windows(starts)
        with run.autocast():
            logits = run.model(ids)
        total += F.cross_entropy(logits.float().mT, targets, reduction="none").double().sum(0)
    run.model.train()
    nats = (place.total(total) / count).cpu()
    rows = []
    for start, end in buckets(settings.context):
        mean = float(nats[start:end].mean())
        rows.append({"from": start, "to": end, "nats": mean, "perplexity": math.exp(mean)})
    mean = float(nats.mean())
    return {
        "windows": count,
        "context": settings.context,
        "nats": mean,
        "perplexity": math.exp(mean),
        "bits_per_byte": mean / math.log(2),
        "by_position": rows,
    }
