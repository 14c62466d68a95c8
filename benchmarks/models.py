"""Whole language models beside peers of their size: tokens a second against context, forward and training step.

    python benchmarks/models.py benchmarks/results/OUT.json [--sizes 125m 1.3b] [--budget 1500] [--quick]

TTT-Linear and TTT-MLP by tttc, a Llama-style Transformer (peers/transformer.py), Mamba (peers/mamba.py, where mamba-ssm is
installed) and TTT-Linear with its dual form by hand under torch.compile (peers/hand_dual.py), with and without CUDA graphs.
bf16 parameters, random tokens; a training step is forward, loss, backward and a fused AdamW. At 1.3b every contender's
blocks are recomputed in the backward. Throughput is a matter of how much there is to do at a time, so there are two
settings: as many tokens a step at every context, and at least so many sequences.

Each contender is a process of its own. Those of a size compile beside each other, on models of one block, within half of
their time; then contenders are timed in turn, a burst each, so that whatever the machine does meets all of them. The dual
form by hand, whose steps take seconds, comes after the others; steps that would take too long are left out. A
process that takes too long or fails loses its own rows; what is done is saved after every row. What OUT.json has of sizes or
models that are not asked for stays, if it is of the same versions and device. ``--quick`` runs a tiny size, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from model_steps import DIRECTIONS, MODELS, ON_GPU, SIZES, Shape, Size, Steps
from timing import captured, once, record

BURST = 0.15  # seconds of steps between two contenders, about
ROUNDS = 15
REPLAYS = 5
SLOWEST = 40.0  # seconds of the slowest step worth waiting for
GRACE = 20.0  # seconds more that an answer may take
SLOW = 0.5  # seconds of a step that bursts need not repeat
ENOUGH = 4.0  # seconds of such steps, one at least
LONGEST_CAPTURED = 0.5  # seconds of a step that is captured as a CUDA graph too
SHOWN = 30  # kernels of a profile
RECOMPILE_LIMIT = 64  # contexts times directions, for each of what is compiled
BY_HAND = ("hand_dual_graphs", "hand_dual")  # timed one after another, after the others


# -- in a contender's process ------------------------------------------------------------------------------


class Contender:
    """What the process of a contender answers."""

    def __init__(self, name: str, size: Size) -> None:
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        self.name, self.size = name, size
        self.made: Steps | None = None
        self.compiled: set[tuple[Shape, str]] = set()

    def prepare(self, shapes: Sequence[Shape], directions: Sequence[str], seconds: float) -> dict[str, Any]:  # fmt: skip
        """Compile, by steps of a model of one block, which shares what is compiled with the whole model.

        What fails (no memory beside the others, say), and what would start after that many seconds, is compiled when it
        is timed. Raises the last failure where nothing was compiled.
        """
        start, failed = time.perf_counter(), None
        small = Steps(self.name, self.size, layers=1)
        for shape in shapes:
            for direction in directions:
                if time.perf_counter() - start > seconds:
                    break
                try:
                    small.step(shape, direction, head=False)()
                except Exception as error:
                    failed = error
                else:
                    self.compiled.add((shape, direction))
                self.free()
        if failed is not None and not self.compiled:
            raise failed
        del small
        self.free()
        return {"seconds": round(time.perf_counter() - start, 1), "steps": len(self.compiled)}

    def build(self, shape: Shape) -> dict[str, Any]:
        """The whole model, and its loss before any training."""
        self.made = Steps(self.name, self.size)
        loss = self.made.first_loss(shape)
        self.free()
        return {"parameters": self.made.parameters, "first_loss": loss}

    def time(self, shape: Shape, direction: str, calls: int) -> dict[str, Any]:
        """Microseconds of a step, over ``calls`` in a row after one; peak memory. A slow step is taken once."""
        assert self.made is not None
        run, out = self.made.step(shape, direction), []
        if (shape, direction) not in self.compiled:
            run()
            self.compiled.add((shape, direction))
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        first = once(lambda: out.append(run()))
        peak = torch.cuda.max_memory_allocated() if ON_GPU else None
        finite = bool(out.pop().sum().isfinite())
        seconds = first if first > SLOW else once(run, calls)
        return {"us": 1e6 * seconds, "peak_bytes": peak, "finite": finite}

    def replay(self, shape: Shape, direction: str, calls: int) -> dict[str, Any]:
        """Microseconds of a step replayed as one CUDA graph: what the device takes, without the Python that launches it."""
        assert self.made is not None
        graph, _ = captured(self.made.step(shape, direction))
        graph.replay()
        us = statistics.median(1e6 * once(graph.replay, calls) for _ in range(REPLAYS))
        return {"graph_us": us}

    def profile(self, shape: Shape, direction: str) -> dict[str, Any]:
        """Kernels of one step, the longest first, and what the device was busy in all."""
        assert self.made is not None
        run = self.made.step(shape, direction)
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
        busy = sum(r["us"] for r in rows)
        return {"busy_us": busy, "kernels": len(rows), "longest": rows[:SHOWN]}

    def free(self) -> None:
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
            answer = None, getattr(contender, what)(*arguments)
        except Exception as error:
            said = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"
            answer = said, {}
        contender.free()  # not while an exception holds what failed
        pipe.send(answer)


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


def kept(out: Path, made: dict[str, Any], sizes: Sequence[str], models: Sequence[str]) -> dict[str, Any]:  # fmt: skip
    """What a record of the same device and versions has of other sizes and models than those."""
    old = json.loads(out.read_text()) if out.exists() else {}
    if any(old.get(k) != made[k] for k in ("device", "versions")):
        old = {}

    def other(size: str, model: str) -> bool:
        return size not in sizes or model not in models

    rows = {k: [r for r in old.get(k, ()) if other(r["size"], r["model"])] for k in ("rows", "profiles", "failed")}  # fmt: skip
    described = {s: {m: x for m, x in found.items() if other(s, m)} for s, found in old.get("models", {}).items()}  # fmt: skip
    return rows | {"models": described, "tokens": old.get("tokens", {}), "recomputed": old.get("recomputed", [])}  # fmt: skip


class Comparison:
    """The record, and the workers it is made with."""

    def __init__(self, out: Path, sizes: Sequence[str], models: Sequence[str]) -> None:
        self.out, self.until = out, time.time()
        self.made: dict[str, Any] = record() | {"dtype": "bf16" if ON_GPU else "float32"}
        self.made |= kept(out, self.made, sizes, models)
        self.made["tokens"] |= {size: SIZES[size].tokens for size in sizes}
        recomputed = [*self.made["recomputed"], *(s for s in sizes if SIZES[s].recompute)]
        self.made["recomputed"] = list(dict.fromkeys(recomputed))

    @property
    def left(self) -> float:
        """Seconds that the size at hand has."""
        return self.until - time.time()

    def save(self) -> None:
        """Write what there is."""
        self.out.write_text(json.dumps(self.made, indent=1) + "\n")

    def fail(self, worker: Worker, what: str, why: Exception) -> None:
        """Note what there is no row of."""
        print(f"{worker.size} {worker.name} {what} FAILED: {str(why)[:600]}", flush=True)
        failed = {"size": worker.size, "model": worker.name, "what": what, "why": str(why)[:1500]}
        self.made["failed"].append(failed)
        self.save()

    def prepared(
        self, workers: Sequence[Worker], shapes: Sequence[Shape], directions: Sequence[str], seconds: float
    ) -> list[Worker]:  # fmt: skip
        """Those that compiled within that time."""
        until = time.time() + seconds
        for w in workers:
            w.ask("prepare", shapes, directions, 0.75 * seconds)
        ready = []
        for w in workers:
            try:
                found = w.answer(until - time.time())
            except Refused as why:
                self.fail(w, "compile", why)
                w.alive and w.end()
                continue
            described = {"how": MODELS[w.name][1], "compile_seconds": found["seconds"], "command": self.made["command"]}  # fmt: skip
            self.made["models"].setdefault(w.size, {})[w.name] = described
            ready.append(w)
            steps = f"{found['steps']} of {len(shapes) * len(directions)} steps"
            print(f"{w.size} {w.name}: compiled {steps} in {found['seconds']} s", flush=True)
        self.save()
        return ready

    def built(self, workers: Sequence[Worker], shape: Shape) -> list[Worker]:
        """Those whose whole model is there, one after another."""
        ready = []
        for w in workers:
            try:
                found = w.asked(min(SLOWEST, self.left), "build", shape)
            except Refused as why:
                self.fail(w, "build", why)
                w.alive and w.end()
                continue
            self.made["models"][w.size][w.name] |= found
            ready.append(w)
            print(f"{w.size} {w.name}: {found}", flush=True)
        self.save()
        return ready

    def expected(self, worker: Worker, shape: Shape, direction: str) -> float:
        """Seconds of a step, by those of the same direction at shorter contexts: no less than in proportion."""
        rows = [r for r in self.made["rows"] if (r["size"], r["model"], r["direction"]) == (worker.size, worker.name, direction)]  # fmt: skip
        return max((1e-6 * r["us"] * shape[1] / r["context"] for r in rows), default=0.0)

    def timed(self, workers: Sequence[Worker], shape: Shape, direction: str, seconds: float) -> None:  # fmt: skip
        """A row for each worker, all measured in turn for about ``seconds`` in all."""
        what = f"{direction} of {shape[0]} x {shape[1]}"
        calls: dict[Worker, int] = {}
        for w in workers:
            if w.alive and (step := self.expected(w, shape, direction)) > min(SLOWEST, self.left):
                self.fail(
                    w, what, Refused(f"a step takes {step:.0f} s; {self.left:.0f} s are left")
                )
            elif w.alive:
                calls[w] = 1
        samples: dict[Worker, list[dict[str, Any]]] = {w: [] for w in calls}
        start, rounds = time.time(), 0
        while rounds < 4 or (time.time() - start < seconds and rounds < ROUNDS):
            for w, n in list(calls.items()):
                slow = [x["us"] / 1e6 for x in samples[w] if x["us"] > 1e6 * SLOW]
                if len(slow) >= 3 or sum(slow) >= ENOUGH or (samples[w] and self.left < 0):
                    continue
                try:
                    found = w.asked(min(SLOWEST, self.left) + GRACE, "time", shape, direction, n)
                except Refused as why:
                    self.fail(w, what, why)
                    del calls[w]
                    continue
                if rounds or found["us"] > 1e6 * SLOW:  # the first says how many calls make a burst
                    samples[w].append(found)
                calls[w] = max(1, min(20, round(1e6 * BURST / found["us"])))
            rounds += 1
        for w, n in calls.items():
            row = self.row(w, shape, direction, samples[w]) | {"calls": n}
            self.made["rows"].append(row)
            print(shown(row), flush=True)
        self.save()

    def replayed(self, workers: Sequence[Worker]) -> None:
        """Rows as CUDA graphs too; after all else, since a capture that fails may take the process with it."""
        by_name = {w.name: w for w in workers}
        for row in self.made["rows"]:
            w = by_name.get(row["model"])
            short = row["us"] <= 1e6 * LONGEST_CAPTURED and self.left > 0
            if w is None or not w.alive or row["size"] != w.size or not short:
                continue
            shape, direction = (row["batch"], row["context"]), row["direction"]
            try:
                row |= w.asked(min(SLOWEST, self.left), "replay", shape, direction, row["calls"])
            except Refused as why:
                self.fail(w, f"graph of {direction} of {shape[0]} x {shape[1]}", why)
            else:
                print(shown(row), flush=True)
        self.save()

    def row(self, worker: Worker, shape: Shape, direction: str, samples: list[dict[str, Any]]) -> dict[str, Any]:  # fmt: skip
        """What is recorded of samples."""
        batch, context = shape
        times = [s["us"] for s in samples]
        times *= 2 if len(times) == 1 else 1
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
        return {
            "size": worker.size, "model": worker.name, "context": context, "batch": batch,
            "direction": direction, "tokens_per_second": batch * context / middle * 1e6,
            "us": middle, "q25": low, "q75": high, "rounds": len(samples),
            "peak_bytes": max((s["peak_bytes"] or 0) for s in samples) or None, "finite": all(s["finite"] for s in samples),
        }  # fmt: skip

    def profiled(self, workers: Sequence[Worker], shape: Shape, direction: str) -> None:
        """Where the time of a step goes."""
        for w in (w for w in workers if w.alive):
            try:
                found = w.asked(min(SLOWEST, self.left), "profile", shape, direction)
            except Refused as why:
                self.fail(w, f"profile of {direction} of {shape[0]} x {shape[1]}", why)
                continue
            said = {"size": w.size, "model": w.name, "batch": shape[0], "context": shape[1], "direction": direction}  # fmt: skip
            self.made["profiles"].append(said | found)
        self.save()


def shown(row: dict[str, Any]) -> str:
    """A row in words."""
    text = f"{row['size']} {row['batch']} x {row['context']} {row['direction']} {row['model']}: {row['tokens_per_second']:,.0f} tokens a second ({row['us'] / 1e3:.1f} ms"
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
    p.add_argument("--sequences", type=int, help="at least, in the second setting; default: those of the size")  # fmt: skip
    p.add_argument("--seconds", type=float, default=5, help="of timing a shape and direction")
    p.add_argument("--budget", type=float, default=1500, help="seconds for all of it")
    p.add_argument("--quick", action="store_true")
    given = p.parse_args()
    sizes = ["tiny"] if given.quick else given.sizes
    threads = max(2, (os.cpu_count() or 2) // len(given.models))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
    comparison, until = Comparison(given.out, sizes, given.models), time.time() + given.budget
    for i, size in enumerate(sizes):
        comparison.until = time.time() + (until - time.time()) / (len(sizes) - i)
        measured(comparison, size, given)
    losses = {s: {n: m.get("first_loss", math.nan) for n, m in found.items()} for s, found in comparison.made["models"].items()}  # fmt: skip
    print(f"losses before training {losses}")


def measured(comparison: Comparison, size: str, given: argparse.Namespace) -> None:
    """All of a size."""
    contexts = sorted(given.contexts or SIZES[size].contexts)
    shapes, middle = SIZES[size].shapes(contexts, given.sequences), contexts[len(contexts) // 2]
    workers = [Worker(m, size) for m in given.models]
    try:
        ready = comparison.prepared(workers, shapes, given.directions, 0.5 * comparison.left)

        def rows(*names: str) -> list[Worker]:
            group = comparison.built([w for w in ready if w.name in names], shapes[0])
            for shape in shapes:
                for direction in given.directions:
                    if comparison.left > 0:
                        comparison.timed(group, shape, direction, 0 if given.quick else given.seconds)  # fmt: skip
            return group

        graphs, loop = BY_HAND
        others = rows(*(n for n in given.models if n not in BY_HAND))
        rows(graphs)
        for shape in (s for s in shapes if s[1] == middle):
            if comparison.left > 0:
                comparison.profiled(others, shape, given.directions[-1])
        if ON_GPU:
            comparison.replayed(others)
        rows(loop)
    finally:
        for w in workers:
            w.alive and w.end()


if __name__ == "__main__":
    main()
