"""The search for a plan: the cost model ranks, processes compile, spills prune, the device decides.

Every kernel of a loop is searched for by itself: what passes between kernels has the same form in all candidates, so
times add up. After a first round of the best by the model a second one changes single choices of the fastest.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from tttc.codegen.candidates import candidates, neighbours, plans, shortlist
from tttc.codegen.cost_model import CostModel
from tttc.codegen.devices import device_of
from tttc.codegen.loop import Loop
from tttc.codegen.render import render
from tttc.codegen.resources import NotInTime, Request, ResourceError
from tttc.codegen.schedule import Schedule
from tttc.codegen.stages import stages
from tttc.ir.errors import KernelTooLarge, NotLowerable
from tttc.progress import counting, phase
from tttc.runtime.launch import Launch, fast, launch, prepared
from tttc.runtime.staged import run_staged, staged
from tttc.tuning.compiling import Compiler
from tttc.tuning.plan import Plan, Setting, split_of

Tensor = torch.Tensor
Timer = Callable[[Launch], float]  # runs a launch, and says how many seconds it takes
log = logging.getLogger("tttc.schedule")

TRIED = 8  # schedules of each kernel, in the first round
CHANGED = 4  # and in the second
WORSE = 1.6  # times as long as another: a split with such an estimate is not tried
COMPILING = 0.75  # of the time that is left; measuring takes less
SPILLS = 256  # bytes of a thread that are not worth a thought
WRONG = {
    2: 3e-2,
    4: 1e-2,
}  # relative errors, by bytes of a number, that no order of summation explains


@dataclass(frozen=True)
class Call:
    """The arguments of a call of a loop, as :func:`tttc.runtime.staged.run_staged` takes them."""

    tensors: Mapping[str, Tensor]
    batch: int
    heads: int
    length: int
    place: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Found:
    """What a search leaves: the plan, its seconds, and those of every schedule that was timed, by kernel."""

    plan: Plan
    seconds: float
    times: Mapping[tuple[str, Schedule], float]


def budget() -> float:
    """Seconds that the search for one loop may take: ``$TTTC_TUNE_SECONDS``, else 11."""
    given = os.environ.get("TTTC_TUNE_SECONDS", "11")
    try:
        return float(given)
    except ValueError:
        raise ValueError(
            f"TTTC_TUNE_SECONDS: expected a number of seconds, got {given!r}"
        ) from None


def time_on_device(call: Launch, warmup: int = 4, repeats: int = 16) -> float:
    """The median of repeated launches on the current GPU, its cache cleared before each; of so many milliseconds each.

    A kernel that was launched before is launched by what is known of it: a short one must not wait for the host.
    """
    from triton.testing import do_bench

    known = prepared(call)
    run = partial(launch, call)
    if known is not None:
        kernel, grid, arguments = known
        run = partial(kernel.start, grid, [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])  # fmt: skip
    return 1e-3 * do_bench(run, warmup=warmup, rep=repeats, return_mode="median")


@dataclass
class _Kernel:
    """One kernel of a split loop, and what is known of its schedules."""

    loop: Loop
    model: CostModel
    ranked: list[Schedule]
    times: dict[Schedule, float] = field(default_factory=dict)
    refused: set[Schedule] = field(default_factory=set)

    def fastest(self) -> Schedule:
        return min(self.times, key=self.times.__getitem__)


@dataclass
class _Split:
    """A way to split a loop, and its kernels."""

    whole: Loop
    stages: int
    kernels: list[_Kernel]

    def seconds(self) -> float:
        """Of its fastest kernels; infinite where one has none."""
        return sum(min(k.times.values(), default=float("inf")) for k in self.kernels)


def search(
    loop: Loop,
    call: Call,
    setting: Setting,
    backward: bool,
    timer: Timer = time_on_device,
    compiler: Compiler | None = None,
    seconds: float | None = None,
    *,
    tried: int | None = None,
    worse: float = WORSE,
) -> Found | None:
    """The fastest plan of a loop for a call, or None where none could be timed.

    Args:
        loop: before it is split into stages.
        call: real arguments; its results are written over.
        timer: seconds of a launch.
        compiler: compiles ahead of launches, and tells what spills; None for neither.
        seconds: after which nothing more is tried.
        tried: schedules of each kernel in the first round.
        worse: a way to split the loop is not tried where its estimate is so much longer than that of another.
    """
    tried = TRIED if tried is None else tried
    end = time.monotonic() + (budget() if seconds is None else seconds)
    with phase("schedule", f"tuning {loop.name}"):
        found = _splits(loop, call, setting, backward, worse)
        options = [{k.loop.name: shortlist(k.ranked, tried) for k in x.kernels} for x in found]
        _try(found, options, call, timer, compiler, end)
        best = min(found, key=_Split.seconds)
        if best.seconds() < float("inf") and time.monotonic() < end:
            options = [{k.loop.name: _changed(k) for k in best.kernels}]
            _try([best], options, call, timer, compiler, end)
        if best.seconds() == float("inf"):
            log.warning("%s: no schedule could be timed", loop.name)
            return None
        plan = Plan(tuple((k.loop.name, k.fastest()) for k in best.kernels))
        times = {
            (k.loop.name, s): t
            for split in found
            for k in split.kernels
            for s, t in k.times.items()
        }
        log.info("%s: %.0f us by %s", loop.name, best.seconds() * 1e6, plan)
        return Found(plan, best.seconds(), times)


def _splits(loop: Loop, call: Call, setting: Setting, backward: bool, worse: float) -> list[_Split]:
    """The ways to split a loop that are worth a measurement: one for each number of kernels, the default's first."""
    device = device_of(setting.device)
    sizes = (call.batch, call.heads, call.length)
    found: list[tuple[float, dict[str, Any], list[tuple[Loop, CostModel]]]] = []
    seen: dict[tuple[str, ...], int] = {}
    how = split_of(loop, setting, backward)
    for common in plans(loop, setting.crowd, backward, setting.gluon, how):
        parts = stages(loop, common["stages"])
        models = [(p, CostModel(p, sizes, device, call.dtype.itemsize)) for p in parts]
        first = [candidates(p, setting.crowd, backward, setting.gluon, how)[0] for p in parts]
        estimate = sum(
            m.estimate(replace(s, **common)).seconds
            for (_, m), s in zip(models, first, strict=True)
        )
        names = tuple(p.name for p in parts)
        if names not in seen:
            seen[names] = len(found)
            found.append((estimate, common, models))
        elif (
            seen[names] > 0 and estimate < found[seen[names]][0]
        ):  # of the first what rules say stays
            found[seen[names]] = (estimate, common, models)
    least = min(x[0] for x in found)
    kept = [found[0], *(x for x in sorted(found[1:], key=lambda x: x[0]) if x[0] <= worse * least)]
    splits = []
    for _, common, models in kept:
        kernels = []
        for part, model in models:
            all_ = [
                replace(s, **common)
                for s in candidates(part, setting.crowd, backward, setting.gluon, how)
            ]
            ranked = [s for s, _ in model.rank(all_)]
            kernels.append(_Kernel(part, model, list(dict.fromkeys([all_[0], *ranked]))))
        splits.append(_Split(loop, common["stages"], kernels))
    return splits


def _changed(kernel: _Kernel) -> list[Schedule]:
    """Schedules that were not tried, and differ from the fastest in one choice: the best by the model."""
    untried = [s for s in kernel.ranked if s not in kernel.times and s not in kernel.refused]
    return neighbours(kernel.fastest(), untried)[:CHANGED]


def _try(
    splits: Sequence[_Split],
    options: list[dict[str, list[Schedule]]],
    call: Call,
    timer: Timer,
    compiler: Compiler | None,
    end: float,
) -> None:
    """Compile and time schedules of the kernels of each split, and write down what came of them."""
    if compiler is not None:
        _compile(splits, options, call, compiler, end)
    with counting("timing schedules", sum(len(x) for o in options for x in o.values())) as advance:
        for split, its in zip(splits, options, strict=True):
            if any(its.values()) and time.monotonic() < end:
                _measure(split, its, call, timer, end, advance)


def _launches(split: _Split, call: Call, tensors: Mapping[str, Tensor]) -> list[Launch]:
    """The launches of a split's kernels under the fastest schedules, or the defaults; none is made."""
    base = {k.loop.name: k.fastest() if k.times else k.ranked[0] for k in split.kernels}
    found: list[Launch] = []
    made = staged(split.whole, split.stages, lambda part: base[part.name])
    run_staged(
        made, tensors, call.batch, call.heads, call.length, call.place, call.dtype, found.append
    )
    return found


def _compile(
    splits: Sequence[_Split],
    options: list[dict[str, list[Schedule]]],
    call: Call,
    compiler: Compiler,
    end: float,
) -> None:
    """Compile all, the best by the model first; drop what does not compile in time or spills much.

    What rules say is timed in any case: a plan must not be worse because there was too little time.
    """
    abstract = {
        k: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        for k, x in call.tensors.items()
    }
    queue: list[tuple[int, _Kernel, list[Schedule], Schedule, Request]] = []
    for split, its in zip(splits, options, strict=True):
        by_name = {k.loop.name: k for k in split.kernels}
        try:
            launches = _launches(split, call, abstract)
        except NotLowerable:
            continue  # measuring says so
        for x in launches:
            kernel = by_name[x.kernel.name]
            made = variants(x, kernel.loop, its[x.kernel.name])
            queue += [
                (rank, kernel, its[x.kernel.name], schedule, y.request(fast=fast()))
                for rank, (schedule, y) in enumerate(made.items())
            ]
    queue.sort(key=lambda x: x[0])
    with counting("compiling schedules", len(queue)) as advance:
        seconds = max(COMPILING * (end - time.monotonic()), 1.0)
        results = compiler(
            [x[-1] for x in queue], seconds, lambda i: advance(queue[i][1].loop.name)
        )
    spills: dict[int, list[int]] = {}
    for (_, kernel, *_), result in zip(queue, results, strict=True):
        if not isinstance(result, ResourceError):
            spills.setdefault(id(kernel), []).append(result.spill_bytes)
    for (_, kernel, listed, schedule, _), result in zip(queue, results, strict=True):
        if isinstance(result, NotInTime) and schedule == kernel.ranked[0]:
            continue  # whoever launches it compiles it
        if isinstance(result, ResourceError):
            reason = str(result)
        elif result.spill_bytes > max(SPILLS, 1.5 * min(spills[id(kernel)])):
            reason = f"{result.spill_bytes} B spilled"
        else:
            continue
        log.debug("%s under %s: %s", kernel.loop.name, schedule, reason)
        kernel.refused.add(schedule)
        listed.remove(schedule)


def _measure(
    split: _Split,
    options: Mapping[str, Sequence[Schedule]],
    call: Call,
    timer: Timer,
    end: float,
    advance: Callable[[str], None],
) -> None:
    """Time schedules of the kernels of one split."""
    kernels = {k.loop.name: k for k in split.kernels}
    try:
        launches = _launches(split, call, call.tensors)
    except NotLowerable as error:
        log.info("%s in %d: %s", split.whole.name, split.stages, error)
        return
    except torch.OutOfMemoryError:  # what would pass between kernels: the model leaves no room
        log.info("%s in %d: no memory for what kernels pass on", split.whole.name, split.stages)
        return
    for standing in launches:
        kernel, its = kernels[standing.kernel.name], options[standing.kernel.name]
        made = variants(standing, kernel.loop, its)
        kernel.refused |= set(its) - set(made)
        _time(kernel, standing, made, timer, end, advance)


def variants(base: Launch, loop: Loop, schedules: Sequence[Schedule]) -> dict[Schedule, Launch]:
    """A launch of a loop's kernel under each of the schedules that it can be rendered under."""
    mini_batches = -(-base.length // loop.mini_batch_size) if loop.tokens else base.length
    found = {}
    for schedule in schedules:
        try:
            made = render(loop, schedule)
        except NotLowerable:
            continue
        programs = -(-mini_batches // schedule.group) if loop.parallel else 1
        tensors = dict(base.tensors)
        for name in made.config["sums"] if loop.parallel else ():
            x = tensors[name]
            tensors[name] = x.new_empty((*x.shape[:2], programs, *x.shape[3:]))
        grid = (base.grid[0], programs)
        found[schedule] = replace(base, kernel=made, tensors=tensors, grid=grid)
    return found


def _results(loop: Loop, call: Launch) -> list[Tensor]:
    """What a launch writes, of the first and the last sequence."""
    prefix = {"state": "new_"}
    names = [prefix.get(s.kind, "") + s.name for _, s in loop.sinks]
    names += [f"saved_{name}" for name in loop.save]
    found = [call.tensors[n] for n in dict.fromkeys(names) if n in call.tensors]
    return [y for x in found if x.is_floating_point() for y in (x[:1], x[-1:])]


def _time(
    kernel: _Kernel,
    base: Launch,
    todo: Mapping[Schedule, Launch],
    timer: Timer,
    end: float,
    advance: Callable[[str], None],
) -> None:
    """Time the launches of one kernel; those whose values differ from the first that ran are refused."""
    expected: list[Tensor] | None = None
    ran: Launch | None = None
    # Sums of parallel programs differ in how many programs made them.
    compared = not (kernel.loop.parallel and base.kernel.config["sums"])
    if kernel.times:  # an earlier round has found the standing schedule right
        launch(base)
        ran, expected = base, [x.clone() for x in _results(kernel.loop, base)]
    for schedule, variant in todo.items():
        fastest = min(kernel.times.values(), default=float("inf"))
        advance(f"{kernel.loop.name}" + (f", {fastest * 1e6:.0f} us" if kernel.times else ""))
        if time.monotonic() > end and ran is not None:
            break
        results = _results(kernel.loop, variant)
        for x in results:
            x.fill_(float("nan"))
        try:
            launch(variant)
            if expected is None:
                expected = [x.clone() for x in results]
            elif compared and not _alike(results, expected, base.dtype.itemsize):
                log.warning(
                    "%s under %s: other values than under %s", kernel.loop.name, schedule, ran
                )
                kernel.refused.add(schedule)
                continue
            kernel.times[schedule] = timer(variant)
            ran = ran or variant
        except KernelTooLarge:
            kernel.refused.add(schedule)
    if ran is not None:
        # What comes after reads the values of a launch that is right, where the standing one expects them.
        launch(ran)


def _alike(got: Sequence[Tensor], expected: Sequence[Tensor], size: int) -> bool:
    """Whether values agree as far as the order of sums lets them; what is no number in both agrees."""
    for x, y in zip(got, expected, strict=True):
        x, y = x.float(), y.float()
        if not torch.equal(x.isfinite(), y.isfinite()):
            return False
        x, y = x.nan_to_num(0, 0, 0), y.nan_to_num(0, 0, 0)
        if float((x - y).norm()) > WRONG.get(size, WRONG[4]) * float(y.norm()) + 1e-6:
            return False
    return True
