"""Processes beside each other, of which one at a time has the machine to itself while it measures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

WIDTH = max(1, min(14, (os.cpu_count() or 2) - 2))  # processes at a time
ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "2"}  # of each


def measuring(result: Path) -> None:
    """To be called by a job's process when all it measures is compiled: returns when no other job runs."""
    result.with_suffix(".ready").touch()
    sys.stdin.readline()


@dataclass
class Job:
    """One process: ``script --job NAME --result FILE``, which writes JSON to the file.

    Attributes:
        after: jobs that must have ended before it starts.
        seconds: it took, from when it started.
        made: what it wrote; the end of what it printed where it failed.
    """

    name: str
    after: tuple[str, ...] = ()
    seconds: float | None = None
    made: Any = None
    error: str | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    began: float = 0.0
    folder: Path = field(default_factory=Path)

    @property
    def result(self) -> Path:
        return self.folder / f"{self.name.replace(':', '_').replace(' ', '_')}.json"

    @property
    def ready(self) -> bool:
        return self.result.with_suffix(".ready").exists()

    def start(self, script: str, rest: Sequence[str], folder: Path) -> None:
        """In a process group of its own, which can be stopped as a whole."""
        self.folder, self.began = folder, time.monotonic()
        command = [sys.executable, script, "-", "--job", self.name, "--result", str(self.result)]
        with self.result.with_suffix(".log").open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *rest], stdin=subprocess.PIPE, stdout=log, stderr=log,
                env=os.environ | ENVIRONMENT, start_new_session=True,
            )  # fmt: skip

    def signal(self, which: int) -> None:
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, which)

    def go(self) -> None:
        """It may measure now."""
        assert self.process is not None and self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(b"go\n")
            self.process.stdin.flush()

    def end(self, why: str | None = None) -> None:
        """Keep what has come of it; ``why`` it is ended before its time."""
        assert self.process is not None
        if why is not None:
            self.signal(signal.SIGKILL)
        code = self.process.wait()
        self.seconds = round(time.monotonic() - self.began, 1)
        if why is None and code == 0 and self.result.exists():
            self.made = json.loads(self.result.read_text())
        else:
            text = self.result.with_suffix(".log").read_text(errors="replace")
            self.error = f"{why or f'ended with {code}'}: {text[-1500:]}"


def run_all(
    jobs: Sequence[Job], script: str, rest: Sequence[str], end: float, done: Callable[[Job], None]
) -> None:
    """Run jobs, those in front first, until ``end`` (of ``time.monotonic``); ``done`` is told of each as it ends.

    While a job measures (:func:`measuring`) all others are stopped.
    """
    folder, waiting, running = Path(mkdtemp()), list(jobs), []
    ended: set[str] = set()

    def close(job: Job, why: str | None = None) -> None:
        job.end(why)
        running.remove(job)
        ended.add(job.name)
        done(job)

    while waiting or running:
        late = time.monotonic() > end
        for job in [j for j in waiting if ended.issuperset(j.after)]:
            if len(running) < WIDTH and not late:
                waiting.remove(job)
                running.append(job)
                job.start(script, rest, folder)
        for job in list(running):
            if job.process.poll() is not None:
                close(job)
            elif late:
                close(job, "took too long")
            elif job.ready:
                others = [j for j in running if j is not job]
                for other in others:
                    other.signal(signal.SIGSTOP)
                job.go()
                with suppress(subprocess.TimeoutExpired):
                    job.process.wait(max(end - time.monotonic(), 1.0))
                for other in others:
                    other.signal(signal.SIGCONT)
                close(job, None if job.process.poll() is not None else "took too long")
        if late and not running:
            break
        time.sleep(0.05)
