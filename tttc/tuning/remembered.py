"""Plans kept on disk, so that they are searched for once: one file for each loop, size class, device and version.

A file is written whole or not at all, and no two keys share one: processes that write at once lose nothing.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import logging
import platform
from pathlib import Path
from typing import Any

import torch

from tttc.codegen.kernel import cache_dir, warn_about, write_atomically
from tttc.codegen.loop import Loop
from tttc.tuning.plan import Plan, Setting, digest

FORMAT = 1
log = logging.getLogger("tttc.schedule")


def versions() -> dict[str, str]:
    """The versions that what was measured depends on."""
    import triton

    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "tttc": importlib.metadata.version("tttc"),
    }


def device_words(device: torch.device) -> dict[str, str]:
    """What a device is called, and what it can do."""
    if device.type != "cuda":
        return {"name": platform.machine(), "capability": device.type}
    found = torch.cuda.get_device_properties(device)
    capability = getattr(found, "gcnArchName", None) or f"sm_{found.major}{found.minor}"
    return {"name": found.name, "capability": capability}


def key_of(loop: Loop, setting: Setting) -> dict[str, Any]:
    """What a plan is remembered by."""
    return {
        "loop": digest(loop),
        "kernel": loop.name,
        "crowd": setting.crowd.name,
        "gluon": setting.gluon,
        "programs": setting.programs,
        "mini_batches": setting.mini_batches,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "products": torch.get_float32_matmul_precision(),
        "device": device_words(setting.device),
        "versions": versions(),
    }


def path_of(key: dict[str, Any]) -> Path:
    """The file of a key."""
    text = json.dumps(key, sort_keys=True)
    name = f"{key['kernel']}_{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    return cache_dir() / "schedules" / name


def remember(loop: Loop, setting: Setting, plan: Plan, seconds: float, timed: int) -> Plan:
    """Keep the fastest of ``timed`` plans; the plan as one that is read will be."""
    key = key_of(loop, setting)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    found = {"format": FORMAT, "key": key, "plan": plan.document(), "seconds": seconds, "timed": timed, "when": now}  # fmt: skip
    path = path_of(key)
    try:
        write_atomically(path, json.dumps(found, indent=1))
    except OSError as error:
        warn_about(
            path, f"could not be written ({error}): the schedule is searched for again next time"
        )
    return Plan.of(found["plan"], _origin(found))


def recall(loop: Loop, setting: Setting) -> Plan | None:
    """The plan remembered for a loop, or None; a file that says nothing sensible counts as none, with one warning."""
    key = key_of(loop, setting)
    path = path_of(key)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        warn_about(path, f"cannot be read ({error})")
        return None
    try:
        found = json.loads(text)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        if found.get("key") != key:
            raise ValueError("it is of another key")
        plan = Plan.of(found.get("plan"), _origin(found))
        if not plan.fits(loop):
            raise ValueError("it is of other kernels")
    except (ValueError, RecursionError) as error:
        warn_about(path, f"is damaged ({error}): the schedule is chosen as if it were not there")
        return None
    log.info("%s: %s", loop.name, _origin(found))
    return plan


def _origin(found: dict[str, Any]) -> str:
    seconds, timed, when = found.get("seconds"), found.get("timed"), found.get("when")
    if not isinstance(seconds, float) or not isinstance(timed, int) or not isinstance(when, str):
        raise ValueError("expected seconds, timed and when")
    device = found["key"]["device"]["name"]
    return f"measured: {seconds * 1e6:.0f} us for the loop, the fastest of {timed} timed on {device}, {when}"
