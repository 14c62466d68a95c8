"""The schedules that rules give, against the times of a record."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import held

RECORD = Path(held.__file__).parent / "results" / "2026-11-28-h200-picked.json"
FAR = 1.1


@pytest.fixture(scope="module")
def ratios():
    return held.ratios(json.loads(RECORD.read_text()))


def test_rules_are_near_the_fastest(ratios):
    far = {shape: x for shape, x in ratios.items() if x is not None and x > FAR}
    assert not far
    assert sum(x is not None for x in ratios.values()) > len(ratios) / 4, "rules of another time"
