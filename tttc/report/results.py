"""What a benchmark measured: a row for each contender."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Row:
    """One way to run the model. Times in seconds; memory in bytes above what was held before."""

    name: str
    times: list[float] = field(default_factory=list)
    first_call: float | None = None  # compilation included
    peak_memory: int | None = None
    error: float | None = None  # of outputs against float64, relative to the largest value
    gradient_error: float | None = None
    at_least: float | None = None  # where it was stopped: it takes longer than this
    note: str = ""

    @property
    def median(self) -> float | None:
        """The median time of a call."""
        return statistics.median(self.times) if self.times else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """The fastest and the slowest call."""
        return (min(self.times), max(self.times)) if self.times else None


@dataclass
class BenchmarkResult:
    """What :func:`benchmark` measured; ``print`` shows a table."""

    rows: list[Row]
    inputs: list[str]
    backward: bool
    device: str
    reference: str
    threads: int
    versions: dict[str, str]
    date: str

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"row: expected one of {', '.join(r.name for r in self.rows)}, got {name!r}")

    def speed_up(self, name: str) -> tuple[float, bool] | None:
        """How many times faster than eager, and whether that is only a lower bound (eager was stopped)."""
        eager, row = self.rows[0], self[name]
        if row.median is None or eager.name != "eager":
            return None
        if eager.median is not None:
            return eager.median / row.median, False
        return None if eager.at_least is None else (eager.at_least / row.median, True)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """All of it as JSON, also written to ``path`` if given."""
        text = json.dumps(asdict(self), indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def __str__(self) -> str:
        from tttc.report.render import benchmark as shown
        from tttc.report.text import plain

        return plain(*shown(self))

    def __rich__(self) -> Any:
        from rich.console import Group

        from tttc.report.render import benchmark as shown

        return Group(*shown(self))
