"""Processes that compile kernels for searches that go on beside each other."""

from __future__ import annotations

import itertools
import json
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait

from tttc.codegen.resources import Request, ResourceError, Resources, _plain, _Worker

from tttc.tuning.compiling import Compiler, Done

LONGEST = 120.0  # seconds of a kernel


class Pool:
    """Compiling processes that stay: nothing is compiled twice, what the first of the searches asks for comes first.

    Args:
        target: ``"sm_90"``, ...
        workers: processes.
        turn: held by whoever computes; given up while a search waits.
    """

    def __init__(self, target: str, workers: int, turn: threading.Lock) -> None:
        self.target, self.turn = target, turn
        self.known: dict[str, Future[Resources | ResourceError]] = {}
        self._waiting: queue.PriorityQueue[tuple[int, int, str]] = queue.PriorityQueue()
        self._count = itertools.count()
        for _ in range(workers):
            threading.Thread(target=self._work, daemon=True).start()

    def compiler(self, place: int) -> Compiler:
        """For the search with a place among all of them."""

        def run(
            requests: Sequence[Request], seconds: float, done: Done
        ) -> list[Resources | ResourceError]:
            lines = [json.dumps({"target": self.target, "request": _plain(r)}) for r in requests]
            for line in lines:
                if line not in self.known:
                    self.known[line] = Future()
                    self._waiting.put((place, next(self._count), line))
            asked = [self.known[line] for line in lines]
            if not all(x.done() for x in asked):
                self.turn.release()
                try:
                    wait(asked, timeout=seconds)
                finally:
                    self.turn.acquire()
            for i in range(len(lines)):
                done(i)
            late = ResourceError(f"compiling took more than {seconds:g} s")
            return [x.result() if x.done() else late for x in asked]

        return run

    def _work(self) -> None:
        worker = _Worker()
        while True:
            _, _, line = self._waiting.get()
            try:
                made = worker.compile(line, LONGEST)
            except OSError as error:
                made = str(error)
            if made is None or isinstance(made, str):
                made = ResourceError(made or f"compiling took more than {LONGEST:g} s")
            self.known[line].set_result(made)
            if not worker.alive():
                worker.close()
                worker = _Worker()
