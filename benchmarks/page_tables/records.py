"""Records of measurements as pages read them: the newest of each kind, and how to link to one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DIRECTIONS = {"us": "forward", "training_us": "forward and backward"}


class Record:
    """A record of one kind: its file, as pages link to it, and what it holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))

    def link(self, page: str) -> str:
        """A link to it from a page."""
        up = "../" * page.count("/")
        return f"[{self.path.name}]({up}benchmarks/results/{self.path.name})"

    @property
    def device(self) -> str:
        """The card, as people call it."""
        return re.sub(r" (80|141)GB.*| PCIe.*", "", str(self.data["device"]))

    @property
    def times(self) -> dict[tuple[str, str, str], float]:
        """Microseconds by case, shape and direction ("us" or "training_us")."""
        rows = [r for k in ("forward", "peers", "training") for r in self.data.get(k, ())]
        plain = {
            (r["case"], r["shape"], direction): r[direction]
            for r in rows
            for direction in DIRECTIONS
            if direction in r
        }
        replayed = {
            (f"{r['case']} replayed", r["shape"], "training_us"): r["training_replayed_us"]
            for r in rows
            if "training_replayed_us" in r
        }
        return plain | replayed


def records(kind: str, folder: Path = RESULTS) -> list[Record]:
    """The records of a kind, the newest first."""
    found = [Record(p) for p in folder.glob(f"*-{kind}.json")]
    return sorted(found, key=lambda r: (str(r.data.get("date", "")), r.path.name), reverse=True)


def heading(record: Record) -> str:
    """What was measured, on what, by what."""
    versions = record.data["versions"]
    said = ", ".join(
        f"{n} {str(versions[n]).partition('+')[0]}"
        for n in ("torch", "triton", "flash-linear-attention", "mamba-ssm")
        if n in versions
    )
    command = str(record.data.get("command", "")).split(" benchmarks/results")[0]
    return f"One {record.device}, {record.data['date']}, {said}; `{command} OUT.json`"
