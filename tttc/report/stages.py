"""What the stages of a scan are called, and what the passes say about themselves."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Sequence

TITLES = {
    "capture": "the step in ATen",
    "normalise": "named dimensions",
    "simplify_step": "one token, simplified",
    "batch": "primal mini-batch",
    "at_anchor": "from its anchor",
    "at_carry": "anchor is carry",
    "dualise": "dual form",
    "simplify": "simplified",
    "sums": "sums made sooner, runs",
    "continued": "from its middle",
    "chunkwise": "solved for a chunk",
    "update_at_anchor": "an approximation",
    "backward": "vector-Jacobian product",
    "simplify_backward": "simplified, runs",
}
MODULES = {
    "capture": "tttc.capture.step",
    "simplify_step": "tttc.passes.simplify",
    "at_carry": "tttc.passes.at_anchor",
    "continued": "tttc.passes.dualise",
    "simplify_backward": "tttc.passes.simplify",
}
COMES_FROM = {"continued": "batch"}  # where that is not the stage before


def about(name: str, earlier: Sequence[str]) -> tuple[str, str, str | None]:
    """A stage's title, the documentation of its pass, and the stage it was made from."""
    before = COMES_FROM.get(name) if COMES_FROM.get(name) in earlier else None
    return TITLES.get(name, ""), _documentation(name), before or (earlier[-1] if earlier else None)


def _documentation(name: str) -> str:
    module = MODULES.get(name, f"tttc.passes.{name}")
    if importlib.util.find_spec(module) is None:
        return ""
    return inspect.cleandoc(importlib.import_module(module).__doc__ or "")
