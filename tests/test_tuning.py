"""Schedules searched for, remembered, chosen: on a clock of the test's own, in the interpreter."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from marks import interpreted
from test_stages import call_of
from tttc.codegen import kernel
from tttc.codegen.candidates import CHOICES, candidates, neighbours, plans, shortlist
from tttc.codegen.crowding import Crowd
from tttc.codegen.kernel import write_atomically
from tttc.codegen.resources import NotInTime, ResourceError, Resources
from tttc.codegen.schedule import Schedule
from tttc.codegen.stages import stages

import tttc
from tttc import compiler
from tttc.nn import TTTLinear
from tttc.pipeline import _programs
from tttc.runtime import forward_kernels, triton_scan_backward
from tttc.tuning import choose, remembered, search
from tttc.tuning.choose import timed_by
from tttc.tuning.plan import Plan, Setting, by_rules, setting_of

pytestmark = interpreted


class Clock:
    """A timer by which schedules with the wanted choices are fastest; it keeps what it was asked."""

    def __init__(self, **wanted):
        self.wanted, self.times = wanted, {}

    def __call__(self, call):
        kernel, schedule = call.kernel, call.kernel.config["schedule"]
        missed = sum(getattr(schedule, k) != v for k, v in self.wanted.items())
        seconds = 1e-3 * (1 + missed + 1e-3 * len(self.times))
        self.times[kernel.name, schedule] = seconds
        return seconds


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache of its own, nothing remembered in the process, small searches."""
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(search, "TRIED", 3)
    monkeypatch.setattr(search, "CHANGED", 2)
    kernel._warned.clear()
    torch._dynamo.reset()
    forget()
    yield tmp_path
    forget()


def layer_and_input():
    torch.manual_seed(0)
    return TTTLinear(8, 1, mini_batch_size=4), torch.randn(1, 8, 8)


def forget():
    """As a process that has just started."""
    for program in _programs.values():
        program.plans.clear()
        program.searched.clear()
        program.kernels.clear()


def in_use():
    """The schedules of all kernels made since."""
    found = [s for p in _programs.values() for s in p.kernels.values()]
    return [k.config["schedule"] for s in found for k in s.kernels]


def tuned(clock, compiler=None, **options):
    """A layer compiled and run by a clock; its output."""
    layer, x = layer_and_input()
    with timed_by(clock, compiler), torch.no_grad():
        return tttc.compile(layer, backend="triton", strict=True, **options)(x)


def files(folder):
    return list((folder / "schedules").glob("*.json"))


def small_loop():
    """A loop like the layer's, and a size class."""
    _, program, _ = call_of(TTTLinear, T=8, d=8, b=4)
    return forward_kernels.forward_loop(program, "full", False), Setting(
        Crowd.TWO, 5, 6, torch.bfloat16
    )


def some_plan(loop, **choices):
    return Plan(((loop.name, replace(Schedule(), **choices)),))


# --- what is tried ----------------------------------------------------------------------------------------


def test_candidates_follow_from_loop_and_fields():
    loop, _ = small_loop()
    for common in plans(loop, Crowd.TWO):
        for part in stages(loop, common["stages"]):
            found = candidates(part, Crowd.TWO)
            assert len(found) == len(set(found)) > 20
            names = {k for choice in CHOICES for option in choice(part, found[0]) for k in option}
            assert names <= set(Schedule().choices())
            # What is computed stays: nothing that is not finite gets through, no more is rounded.
            assert {s.nan for s in found} <= {"branch", "product"}
            assert {s.narrow for s in found} == {False}
            assert not any(s.prefetch and s.late_loads for s in found)
            groups = {s.group for s in found}
            assert len(groups) > 1 if part.parallel else groups == {1}
            near = neighbours(found[0], found)
            assert found[0] not in near and 0 < len(near) < len(found)
            picked = shortlist(found, 8)
            assert len(picked) == 8 and picked[0] == found[0]


# --- measured, remembered, used ---------------------------------------------------------------------------


def test_the_fastest_is_picked_remembered_and_used_without_a_search(folder):
    layer, x = layer_and_input()
    expected = layer(x)
    clock = Clock(num_warps=1, order="least_live")
    with timed_by(clock), torch.no_grad():
        compiled = tttc.compile(layer, backend="triton", tune=True, strict=True)
        torch.testing.assert_close(compiled(x), expected, atol=1e-4, rtol=1e-4)
        asked = len(clock.times)
        assert len({s.num_warps for _, s in clock.times}) > 1
        compiled(x)
        assert len(clock.times) == asked, "once a size class"
    (file,) = files(folder)
    found = json.loads(file.read_text())
    assert found["timed"] == asked
    total = 0.0
    for entry in found["plan"]:
        its = {s: t for (name, s), t in clock.times.items() if name == entry["kernel"]}
        fastest = min(its, key=its.__getitem__)
        assert fastest.choices() == entry["schedule"]
        total += its[fastest]
    assert found["seconds"] == pytest.approx(total)
    forget()
    again = Clock()
    torch.testing.assert_close(tuned(again, tune=False), expected, atol=1e-4, rtol=1e-4)
    assert not again.times
    assert [s.choices() for s in in_use() if s.origin.startswith("measured: ")] == [
        e["schedule"] for e in found["plan"]
    ]


SECOND = """
import json, sys, torch, tttc
from tttc.pipeline import _programs
torch.manual_seed(0)
layer, x = tttc.nn.TTTLinear(8, 1, mini_batch_size=4), torch.randn(1, 8, 8)
with torch.no_grad():
    y = tttc.compile(layer, backend="triton", strict=True)(x)
kernels = [k for p in _programs.values() for s in p.kernels.values() for k in s.kernels]
schedules = [k.config["schedule"] for k in kernels]
print(json.dumps([[s.choices(), s.origin] for s in schedules]))
"""


def test_another_process_uses_it(folder):
    tuned(Clock(num_warps=1, nan="product"), tune=True)
    (file,) = files(folder)
    found = json.loads(file.read_text())
    # Hashes of strings differ from process to process; what is remembered must not.
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", SECOND], env=environment, capture_output=True, text=True, check=True
    )
    seen = json.loads(run.stdout)
    measured = [choices for choices, origin in seen if origin.startswith("measured: ")]
    assert measured == [e["schedule"] for e in found["plan"]]


def test_a_search_in_training_finds_both_directions(folder):
    layer, x = layer_and_input()
    exact = torch.autograd.grad(layer(x).square().sum(), layer.parameters())
    with timed_by(Clock(num_warps=2)):
        y = tttc.compile(layer, backend="triton", tune=True, strict=True)(x)
        got = torch.autograd.grad(y.square().sum(), layer.parameters())
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert len(files(folder)) == 2
    kernels = {e["kernel"] for f in files(folder) for e in json.loads(f.read_text())["plan"]}
    assert any("backward" in k for k in kernels) and not all("backward" in k for k in kernels)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"num_warps"', '"warps"'),
        lambda text: text.replace('"num_stages": ', '"num_stages": -'),
        lambda text: text.replace('"order": ', '"order": 3, "was": '),
        lambda text: text.replace('"kernel": "scan_full', '"kernel": "scan_part'),
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: "\x00\xff",
    ],
)
def test_damaged_files_are_ignored_once_said_and_written_again(folder, damage):
    loop, setting = small_loop()
    remembered.remember(loop, setting, some_plan(loop), 1e-3, 3)
    (file,) = files(folder)
    file.write_text(damage(file.read_text()))
    with pytest.warns(RuntimeWarning, match=r"is damaged"):
        assert remembered.recall(loop, setting) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert remembered.recall(loop, setting) is None
    remembered.remember(loop, setting, some_plan(loop, num_warps=8), 1e-3, 3)
    assert remembered.recall(loop, setting) == some_plan(loop, num_warps=8)


def test_files_that_are_no_text_or_no_files(folder):
    loop, setting = small_loop()
    path = remembered.path_of(remembered.key_of(loop, setting))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(RuntimeWarning, match=r"cannot be read"):
        assert remembered.recall(loop, setting) is None
    path.unlink()
    path.mkdir()
    kernel._warned.clear()
    with pytest.warns(RuntimeWarning, match=r"could not be written"):
        made = remembered.remember(loop, setting, some_plan(loop), 1e-3, 3)
    assert made == some_plan(loop)


def test_another_version_device_size_class_dtype_or_loop_misses(folder, monkeypatch):
    loop, setting = small_loop()
    plan = remembered.remember(loop, setting, some_plan(loop, num_warps=2), 1e-3, 3)
    assert remembered.recall(loop, setting) == plan
    for change in (
        {"crowd": Crowd.ONE},
        {"programs": 6},
        {"mini_batches": 7},
        {"dtype": torch.float16},
    ):
        assert remembered.recall(loop, replace(setting, **change)) is None
    assert remembered.recall(replace(loop, reverse=True), setting) is None
    for name in ("torch", "triton", "tttc"):
        with monkeypatch.context() as m:
            changed = {**remembered.versions(), name: "0.0"}
            m.setattr(remembered, "versions", lambda changed=changed: changed)
            assert remembered.recall(loop, setting) is None
    for words in (
        {"name": "H200", "capability": "sm_90"},
        {"name": "H200", "capability": "sm_100"},
    ):
        with monkeypatch.context() as m:
            m.setattr(remembered, "device_words", lambda device, words=words: words)
            assert remembered.recall(loop, setting) is None
            remembered.remember(loop, setting, plan, 1e-3, 3)
            assert remembered.recall(loop, setting) == plan
    assert len(files(folder)) == 3
    assert remembered.recall(loop, setting) == plan


def test_size_classes_are_powers_of_two():
    cpu = torch.device("cpu")
    assert setting_of(512, 128, torch.bfloat16, cpu) == setting_of(1000, 255, torch.bfloat16, cpu)
    assert setting_of(512, 128, torch.bfloat16, cpu) != setting_of(512, 256, torch.bfloat16, cpu)
    # Within a power of two the device may be full or not.
    assert setting_of(130, 128, torch.bfloat16, cpu) != setting_of(140, 128, torch.bfloat16, cpu)


def _writer(job):
    folder, number = job
    os.environ["TTTC_CACHE_DIR"] = folder
    path = Path(folder) / "schedules" / f"shared_{0:016x}.json"
    for i in range(50):
        text = json.dumps({"writer": number, "turn": i, "filling": "x" * 20_000})
        write_atomically(path, text)
        write_atomically(path.with_name(f"own{number}_{i:016x}.json"), text)
        json.loads(path.read_text())  # whole, whoever wrote it
    return number


def test_two_processes_may_write_at_once(folder):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_writer, [(str(folder), 1), (str(folder), 2)]) == [1, 2]
    assert len(files(folder)) == 101
    assert all(json.loads(f.read_text())["turn"] >= 0 for f in files(folder))
    assert not list(folder.rglob("*.partial"))


# --- what is not tried, or not taken ----------------------------------------------------------------------


def test_what_spills_or_does_not_compile_is_not_timed():
    fine = []

    def compiler(requests, seconds, done):
        """Of each kernel's one compiles well, one not at all, one spills, and so on."""
        found, numbers = [], {}
        for i, request in enumerate(requests):
            done(i)
            kind = numbers[request.name] = numbers.get(request.name, -1) + 1
            fine.extend([request.name] * (kind % 3 == 0))
            outcomes = (Resources(255, 16, 0), ResourceError("no"), Resources(255, 4000, 0))
            found.append(outcomes[kind % 3])
        return found

    clock = Clock()
    tuned(clock, compiler, tune=True)
    assert sorted(name for name, _ in clock.times) == sorted(fine)


def test_what_rules_say_is_timed_where_nothing_compiles_in_time(folder):
    """Else the fastest of whatever was compiled would be a plan, and slower than none."""
    clock = Clock(num_warps=8)
    tuned(clock, lambda requests, *_: [NotInTime("later")] * len(requests), tune=True)
    (file,) = files(folder)
    document = json.loads(file.read_text())
    assert {name for name, _ in clock.times} >= {x["kernel"] for x in document["plan"]}
    by_default = {}
    for name, schedule in clock.times:
        by_default.setdefault(name, []).append(schedule)
    assert all(len(x) == 1 for x in by_default.values())


@pytest.mark.parametrize("gluon", [False, True])
@pytest.mark.parametrize("crowd", Crowd)
def test_the_split_of_rules_is_tried_first(crowd, gluon):
    _, program, _ = call_of(TTTLinear, T=64, d=64, b=16)
    leaves = ("token_0", "token_1", "token_2")
    loop = triton_scan_backward.backward_loop_of(program, "full", leaves)
    setting = Setting(crowd, 9, 6, torch.bfloat16, gluon=gluon)
    first, ruled = next(plans(loop, crowd, True, gluon)), by_rules(loop, setting, True)
    assert first["stages"] == ruled.stages
    assert {first["narrow"]} == {s.narrow for _, s in ruled.schedules}


def test_what_computes_other_values_is_not_taken(folder, monkeypatch):
    """A compiler of kernels may be wrong: the fastest is no use then."""
    first, wrongly = {}, set()

    def wrong(call):
        """Right under the first schedule of each kernel alone."""
        launch(call)
        schedule = call.kernel.config["schedule"]
        if schedule != first.setdefault(call.kernel.name, schedule):
            wrongly.add((call.kernel.name, schedule))
            for name, x in call.tensors.items():
                if name.startswith(("output", "value", "saved", "new")):
                    x.mul_(1.5)

    launch = search.launch
    monkeypatch.setattr(search, "launch", wrong)
    clock = Clock()
    tuned(clock, tune=True)
    assert len(wrongly) >= 2
    assert set(clock.times) == set(first.items())
    (file,) = files(folder)
    for entry in json.loads(file.read_text())["plan"]:
        assert first[entry["kernel"]].choices() == entry["schedule"]


def test_a_search_ends_when_its_time_is_over(monkeypatch):
    monkeypatch.setenv("TTTC_TUNE_SECONDS", "0")
    clock = Clock()
    layer, x = layer_and_input()
    torch.testing.assert_close(tuned(clock, tune=True), layer(x), atol=1e-4, rtol=1e-4)
    assert not clock.times
    monkeypatch.setenv("TTTC_TUNE_SECONDS", "soon")
    with pytest.raises(ValueError, match="TTTC_TUNE_SECONDS: expected a number"):
        search.budget()


# --- how it is asked for ----------------------------------------------------------------------------------


def test_how_it_is_asked_for(monkeypatch):
    assert not choose.tuning_wanted(None)
    monkeypatch.setenv("TTTC_TUNE", "1")
    assert choose.tuning_wanted(None) and not choose.tuning_wanted(False)
    monkeypatch.setenv("TTTC_TUNE", "yes")
    with pytest.raises(ValueError, match="TTTC_TUNE: expected 0 or 1"):
        tttc.compile(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="tune: expected True, False or None"):
        tttc.compile(torch.nn.Linear(2, 2), tune="max")


@torch.no_grad()
def test_through_torch_compile():
    layer, x = layer_and_input()
    with pytest.raises(Exception, match="mode: expected one of default, reduce-overhead, max-auto"):
        torch.compile(layer, backend="tttc", mode="fast")(x)
    torch._dynamo.reset()
    clock = Clock()
    with timed_by(clock):
        options = {"backend": "triton", "tune": True}
        y = torch.compile(layer, backend="tttc", options=options)(x)
    assert clock.times
    torch.testing.assert_close(y, layer(x), atol=1e-4, rtol=1e-4)
    seen = []
    monkeypatched = compiler.compile_graph
    compiler.compile_graph = lambda gm, inputs, options: seen.append(options) or gm.forward
    try:
        torch._dynamo.reset()
        torch.compile(layer, backend="tttc", mode="max-autotune")(x)
    finally:
        compiler.compile_graph = monkeypatched
    assert [o.tune for o in seen] == [True]
