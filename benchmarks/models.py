"""Whole language models beside peers of their size: tokens a second against context, forward and training step.

    python benchmarks/models.py benchmarks/results/OUT.json [--sizes 125m 1.3b] [--budget 1500] [--quick]

TTT-Linear and TTT-MLP by tttc, a Llama-style Transformer (peers/transformer.py), Mamba (peers/mamba.py, where mamba-ssm is
installed) and TTT-Linear with its dual form by hand under torch.compile (peers/hand_dual.py). bf16 parameters, random
tokens, as many tokens a step at every context; a training step is forward, loss, backward and a fused AdamW. At 1.3b every
contender's blocks are recomputed in the backward.

Each contender of each size is a process of its own. All compile beside each other, on models of one block, within half of
the budget; then contenders are timed in turn, a burst each, so that whatever the machine does meets all of them. A process
that takes too long or fails loses its own rows; what is done is saved after every row. ``--quick`` runs a tiny size, on a
CPU too.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from model_steps import DIRECTIONS, MODELS, ON_GPU, SIZES, Size, Steps
from timing import once, record

BURST = 0.15  # seconds of steps between two contenders, about
ROUNDS = 15
REPLAYS = 5
SLOWEST = 40.0  # seconds of the slowest step worth waiting for, and what comes with it
SLOW = 0.5  # seconds of a step that bursts need not repeat
ENOUGH = 3  # of such a step
LONGEST_CAPTURED = 0.5  # seconds of a step that is captured as a CUDA graph too
SHOWN = 30  # kernels of a profile
RECOMPILE_LIMIT = 64  # contexts times directions, for each of what is compiled


# -- in a contender's process ------------------------------------------------------------------------------


def captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


class Contender:
    """What the process of a contender answers."""

    def __init__(self, name: str, size: Size) -> None:
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        self.name, self.size = name, size
        self.made: Steps | None = None

    def prepare(self, contexts: Sequence[int], directions: Sequence[str]) -> dict[str, Any]:
        """Compile, by steps of a model of one block, which shares what is compiled with the whole model."""
        start = time.perf_counter()
        small = Steps(self.name, self.size, layers=1)
        for context in contexts:
            for direction in directions:
                small.step(context, direction)()
        del small
        self._free()
        return {"seconds": round(time.perf_counter() - start, 1)}

    def build(self, context: int) -> dict[str, Any]:
        """The whole model, and its loss before any training."""
        self.made = Steps(self.name, self.size)
        loss = self.made.first_loss(context)
        self._free()
        return {"parameters": self.made.parameters, "first_loss": loss}

    def time(self, context: int, direction: str, calls: int) -> dict[str, Any]:
        """Microseconds of a step, over ``calls`` in a row after one; peak memory. A slow step is taken once."""
        assert self.made is not None
        run, out = self.made.step(context, direction), []
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        first = once(lambda: out.append(run()))
        peak = torch.cuda.max_memory_allocated() if ON_GPU else None
        finite = bool(out.pop().isfinite().all())
        seconds = first if first > SLOW else once(run, calls)
        self._free()
        return {"us": 1e6 * seconds, "peak_bytes": peak, "finite": finite}

    def replay(self, context: int, direction: str, calls: int) -> dict[str, Any]:
        """Microseconds of a step replayed as one CUDA graph: what the device takes, without the Python that launches it."""
        assert self.made is not None
        graph = captured(self.made.step(context, direction))
        graph.replay()
        us = statistics.median(1e6 * once(graph.replay, calls) for _ in range(REPLAYS))
        del graph
        self._free()
        return {"graph_us": us}

    def profile(self, context: int, direction: str) -> dict[str, Any]:
        """Kernels of one step, the longest first, and what the device was busy in all."""
        assert self.made is not None
        run = self.made.step(context, direction)
        run()
        device = torch.profiler.ProfilerActivity.CUDA if ON_GPU else None
        with torch.profiler.profile(
            activities=[device or torch.profiler.ProfilerActivity.CPU]
        ) as found:
            run()
            if ON_GPU:
                torch.cuda.synchronize()
        rows = [
            {"name": e.key[:120], "calls": e.count, "us": e.self_device_time_total}
            for e in found.key_averages()
            if e.self_device_time_total > 0
        ]
        rows.sort(key=lambda r: -r["us"])
        del run
        self._free()
        busy = sum(r["us"] for r in rows)
        return {"busy_us": busy, "kernels": len(rows), "longest": rows[:SHOWN]}

    def _free(self) -> None:
        if ON_GPU:
            torch.cuda.empty_cache()


def serve(pipe: Connection, name: str, size: Size) -> None:
    """Answer until the other side is gone: ``(None, what)``, or ``(why not, {})``."""
    contender = Contender(name, size)
    while True:
        try:
            what, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, getattr(contender, what)(*arguments)))
        except Exception as error:
            contender._free()
            said = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"
            pipe.send((said, {}))


# -- in the process that asks ---------------------------------------------------------------------------------


class Refused(Exception):
    """A contender can't, or took too long."""


class Worker:
    """A contender's process, as seen from outside."""

    def __init__(self, name: str, size: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.name, self.size, self.alive = name, size, True
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, name, SIZES[size]), daemon=True)
        self.process.start()
        other.close()

    def ask(self, *what: Any) -> None:
        """Ask, and go on."""
        self.pipe.send(what)

    def answer(self, seconds: float) -> dict[str, Any]:
        """What it says within that time; raises Refused, and ends a process that says nothing."""
        try:
            if not self.pipe.poll(max(seconds, 0.0)):
                self.end()
                raise Refused(f"nothing within {seconds:.0f} s")
            why, found = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.end()
            raise Refused("its process died") from None
        if why is not None:
            raise Refused(why)
        return found

    def asked(self, seconds: float, *what: Any) -> dict[str, Any]:
        """Ask and wait."""
        self.ask(*what)
        return self.answer(seconds)

    def end(self) -> None:
        """End the process."""
        self.alive = False
        self.process.kill()
        self.process.join()


class Comparison:
    """The record, and the workers it is made with."""

    def __init__(self, out: Path, budget: float) -> None:
        self.out, self.until = out, time.time() + budget
        self.made: dict[str, Any] = record()
        self.made |= {"dtype": "bf16" if ON_GPU else "float32", "models": {}, "rows": [], "profiles": [], "failed": []}  # fmt: skip

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.until - time.time()

    def save(self) -> None:
        """Write what there is."""
        self.out.write_text(json.dumps(self.made, indent=1) + "\n")

    def fail(self, worker: Worker, what: str, why: Exception) -> None:
        """Note what there is no row of."""
        print(f"{worker.size} {worker.name} {what} FAILED: {str(why)[:600]}", flush=True)
        failed = {"size": worker.size, "model": worker.name, "what": what, "why": str(why)[-1500:]}
        self.made["failed"].append(failed)
        self.save()

    def prepared(
        self, workers: Sequence[Worker], contexts: dict[str, list[int]], directions: list[str]
    ) -> list[Worker]:
        """Those that compiled in time."""
        until = time.time() + 0.5 * self.left
        for w in workers:
            w.ask("prepare", contexts[w.size], directions)
        ready = []
        for w in workers:
            try:
                found = w.answer(until - time.time())
            except Refused as why:
                self.fail(w, "compile", why)
                w.alive and w.end()
                continue
            described = {"how": MODELS[w.name][1], "compile_seconds": found["seconds"]}
            self.made["models"].setdefault(w.size, {})[w.name] = described
            ready.append(w)
            print(f"{w.size} {w.name}: compiled in {found['seconds']} s", flush=True)
        self.save()
        return ready

    def built(self, workers: Sequence[Worker], context: int) -> list[Worker]:
        """Those whose whole model is there, one after another."""
        ready = []
        for w in workers:
            try:
                found = w.asked(min(SLOWEST, self.left), "build", context)
            except Refused as why:
                self.fail(w, "build", why)
                w.alive and w.end()
                continue
            self.made["models"][w.size][w.name] |= found
            ready.append(w)
            print(f"{w.size} {w.name}: {found}", flush=True)
        self.save()
        return ready

    def timed(self, workers: Sequence[Worker], context: int, direction: str, seconds: float) -> None:  # fmt: skip
        """A row for each worker, all measured in turn for about ``seconds`` in all."""
        workers = [w for w in workers if w.alive]
        calls = dict.fromkeys(workers, 1)
        samples: dict[Worker, list[dict[str, Any]]] = {w: [] for w in workers}
        start, rounds = time.time(), 0
        while rounds < 4 or (time.time() - start < seconds and rounds < ROUNDS):
            for w, n in list(calls.items()):
                slow = samples[w] and samples[w][-1]["us"] > 1e6 * SLOW
                if slow and len(samples[w]) == ENOUGH:
                    continue
                try:
                    found = w.asked(min(SLOWEST, self.left), "time", context, direction, n)
                except Refused as why:
                    self.fail(w, f"{direction} at {context}", why)
                    del calls[w]
                    continue
                if rounds or found["us"] > 1e6 * SLOW:  # the first says how many calls make a burst
                    samples[w].append(found)
                calls[w] = max(1, min(20, round(1e6 * BURST / found["us"])))
            rounds += 1
        for w, n in calls.items():
            row = self.row(w, context, direction, samples[w]) | {"calls": n}
            self.made["rows"].append(row)
            print(shown(row), flush=True)
        self.save()

    def replayed(self, workers: Sequence[Worker]) -> None:
        """Rows as CUDA graphs too; last, since a capture that fails may take the process with it."""
        by_name = {w.name: w for w in workers if w.alive}
        for row in self.made["rows"]:
            w = by_name.get(row["model"])
            if (
                w is None
                or not w.alive
                or row["size"] != w.size
                or row["us"] > 1e6 * LONGEST_CAPTURED
            ):
                continue  # fmt: skip
            try:
                row |= w.asked(min(SLOWEST, self.left), "replay", row["context"], row["direction"], row["calls"])  # fmt: skip
            except Refused as why:
                self.fail(w, f"graph of {row['direction']} at {row['context']}", why)
            else:
                print(shown(row), flush=True)
        self.save()

    def row(self, worker: Worker, context: int, direction: str, samples: list[dict[str, Any]]) -> dict[str, Any]:  # fmt: skip
        """What is recorded of samples."""
        size = SIZES[worker.size]
        low, middle, high = statistics.quantiles((s["us"] for s in samples), n=4)
        return {
            "size": worker.size, "model": worker.name, "context": context, "batch": size.batch(context),
            "direction": direction, "tokens_per_second": size.batch(context) * context / middle * 1e6,
            "us": middle, "q25": low, "q75": high, "rounds": len(samples),
            "peak_bytes": max((s["peak_bytes"] or 0) for s in samples) or None, "finite": all(s["finite"] for s in samples),
        }  # fmt: skip

    def profiled(self, workers: Sequence[Worker], context: int, direction: str) -> None:
        """Where the time of a step goes."""
        for w in (w for w in workers if w.alive and w.name != "hand_dual"):
            try:
                found = w.asked(min(SLOWEST, self.left), "profile", context, direction)
            except Refused as why:
                self.fail(w, f"profile of {direction} at {context}", why)
                continue
            said = {"size": w.size, "model": w.name, "context": context, "direction": direction}
            self.made["profiles"].append(said | found)
        self.save()


def shown(row: dict[str, Any]) -> str:
    """A row in words."""
    text = f"{row['size']} T{row['context']} {row['direction']} {row['model']}: {row['tokens_per_second']:,.0f} tokens a second ({row['us'] / 1e3:.1f} ms"
    if "graph_us" in row:
        text += f", as a graph {row['graph_us'] / 1e3:.1f}"
    if row["peak_bytes"] is not None:
        text += f", {row['peak_bytes'] / 2**30:.1f} GiB"
    return text + ")"


def main() -> None:
    """Compile, measure, print, record."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("out", type=Path)
    p.add_argument("--sizes", nargs="+", default=["125m", "1.3b"], choices=list(SIZES))
    p.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    p.add_argument("--contexts", type=int, nargs="+", help="default: those of the size")
    p.add_argument("--directions", nargs="+", default=list(DIRECTIONS), choices=DIRECTIONS)
    p.add_argument("--seconds", type=float, default=5, help="of timing a context and direction")
    p.add_argument("--budget", type=float, default=1500, help="seconds for all of it")
    p.add_argument("--quick", action="store_true")
    given = p.parse_args()
    sizes = ["tiny"] if given.quick else given.sizes
    contexts = {s: given.contexts or list(SIZES[s].contexts) for s in sizes}
    comparison = Comparison(given.out, given.budget)
    comparison.made["tokens"] = {s: SIZES[s].tokens for s in sizes}
    comparison.made["recomputed"] = [s for s in sizes if SIZES[s].recompute]
    workers = [Worker(m, s) for s in sizes for m in given.models]
    try:
        workers = comparison.prepared(workers, contexts, given.directions)
        for size in sizes:
            ready = [w for w in workers if w.size == size]
            ready = comparison.built(ready, min(contexts[size]))
            for context in contexts[size]:
                for direction in given.directions:
                    if comparison.left > 0:
                        comparison.timed(ready, context, direction, 0 if given.quick else given.seconds)  # fmt: skip
            if comparison.left > 0:
                comparison.profiled(ready, sorted(contexts[size])[len(contexts[size]) // 2], given.directions[-1])  # fmt: skip
            if ON_GPU and comparison.left > 0:
                comparison.replayed(ready)
            for w in ready:
                w.alive and w.end()
    finally:
        for w in workers:
            w.alive and w.end()
    losses = {s: {n: m.get("first_loss", math.nan) for n, m in found.items()} for s, found in comparison.made["models"].items()}  # fmt: skip
    print(f"losses before training {losses}")


if __name__ == "__main__":
    main()
