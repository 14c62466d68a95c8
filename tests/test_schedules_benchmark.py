"""The benchmark of schedules: what it says a search finds is what one finds, and no row is lost."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from marks import interpreted
from tttc.codegen.resources import Request, ResourceError, Resources

from tttc.runtime import segmented_scan
from tttc.tuning import search
from tttc.tuning.choose import timed_by

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import held
import pool
import schedules

SHAPE = ("ttt_linear_b4", 8, 1, 16)


def by_schedule(call):
    """Seconds that a kernel and its schedule decide, alike in every search."""
    s = call.kernel.config["schedule"]
    missed = (s.num_warps != 1) + (s.order != "least_live") + 2 * (s.nan != "branch")
    return 1e-3 * (1 + missed + 0.1 * s.num_stages + 0.01 * s.feature_major)


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(schedules, "WIDTH", 8)
    made = functools.partial(schedules.any_case, dtype=torch.float32)
    monkeypatch.setattr(schedules, "any_case", made)
    monkeypatch.setattr(search, "TRIED", 3)
    monkeypatch.setattr(search, "CHANGED", 2)


@interpreted
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_picked_schedules_are_those_that_are_picked(small, direction):
    backward = direction == "backward"
    with timed_by(by_schedule):
        found = schedules.asked(SHAPE, direction, "cpu")
    loop = found[0]
    assert loop.reverse is backward and loop.mini_batch_size == 4
    asked = []

    def clock(call):
        asked.append((call.kernel.name, call.kernel.config["schedule"]))
        return by_schedule(call)

    row = schedules.study(*found, backward, 6, clock, None, float("inf"))
    assert len(asked) == len(set(asked)) == row["timed"]
    real = search.search(*found, backward, by_schedule, None, 600.0)
    assert row["searched"]["us"] == pytest.approx(1e6 * real.seconds)
    assert row["searched"]["plan"] == schedules.words(real.plan)
    rules = schedules.by_rules(loop, found[2], backward)
    assert row["rules"]["plan"] == schedules.words(rules)
    assert row["rules"]["us"] > row["best"]["us"] > 0
    assert held.microseconds(row, rules) == pytest.approx(row["rules"]["us"], abs=0.1)
    assert sum(map(len, row["times"].values())) == row["timed"]
    for name in ("searched", "rules", "model"):
        assert row[name]["of best"] == pytest.approx(row[name]["us"] / row["best"]["us"])
        assert row[name]["of best"] >= 1


@interpreted
def test_what_rules_give_is_timed_though_it_spills(small):
    with timed_by(by_schedule):
        found = schedules.asked(SHAPE, "forward", "cpu")
    (default, *_) = (s for _, s in schedules.by_rules(found[0], found[2], False).schedules)

    def compiler(requests, seconds, done):
        spilled = [10_000 * (r.options["num_warps"] == default.num_warps) for r in requests]
        return [Resources(32, x, 0) for x in spilled]

    row = schedules.study(*found, False, 6, by_schedule, compiler, float("inf"))
    assert row["rules"]["us"] is not None
    assert f"num_warps={default.num_warps}" not in row["searched"]["plan"].values()


def test_a_pool_compiles_once_and_lets_others_go_on(tmp_path):
    source = "import triton, triton.language as tl\n@triton.jit\ndef one(x):\n    tl.store(x, {})\n"
    requests = []
    for name, value in (("right", 1.0), ("wrong", "nothing")):
        path = tmp_path / f"{name}.py"
        path.write_text(source.format(value))
        requests.append(Request(str(path), "one", {"x": "*fp32"}))
    turn = threading.Lock()
    made = pool.Pool("sm_90", 1, turn)
    others = []

    def other():
        with turn:
            others.append(len(made.known))

    with turn:
        thread = threading.Thread(target=other)
        thread.start()
        right, wrong = made.compiler(0)(requests, 300.0, lambda i: None)
        assert turn.locked()
        assert others == [2], "it had its turn while kernels were compiled"
        assert right.spill_bytes == 0 and "nothing" in str(wrong)
        assert made.compiler(1)(requests, 0.0, lambda i: None) == [right, wrong]
        (late,) = made.compiler(2)([Request(str(path), "two", {})], 0.0, lambda i: None)
        assert isinstance(late, ResourceError) and len(made.known) == 3
    thread.join()


@interpreted
def test_sequences_in_segments_are_two_searches(small, monkeypatch):
    long = ("ttt_linear_b4", 8, 1, 136)
    with timed_by(by_schedule):
        assert schedules.asked_in_segments(long, "cpu") == []
        monkeypatch.setattr(segmented_scan, "warps_of_segments", lambda *_: 4)
        whole = schedules.asked(long, "forward", "cpu")
        first, second = schedules.asked_in_segments(long, "cpu")
    assert (whole[1].length, first[1].length, second[1].length) == (
        136,
        132,
        32,
    )  # to where the last begins
    assert second[1].batch == 4 and whole[1].batch == first[1].batch == 1
    assert first[0].interval == 8 and not any(s.kind == "token" for _, s in first[0].sinks)
    rows = [schedules.study(*x, False, 4, by_schedule, None, float("inf")) for x in (whole, first, second)]  # fmt: skip
    row = schedules.joined(rows[0], rows[1:])
    assert row["rules"]["us"] == pytest.approx(rows[1]["rules"]["us"] + rows[2]["rules"]["us"])
    assert row["rules"]["plan"] == rows[0]["rules"]["plan"]
    assert row["best"] == rows[0]["best"], "by this clock one kernel is faster than two"
    assert row["rules"]["of best"] == pytest.approx(row["rules"]["us"] / row["best"]["us"])
    assert sum(map(len, row["times"].values())) == row["timed"]
    faster = [x | {"best": {"us": 1.0, "plan": {"scan_full": "x"}}} for x in rows[1:]]
    row = schedules.joined(rows[0], faster)
    assert row["best"] == {"us": 2.0, "plan": {"states scan_full": "x", "segments scan_full": "x"}}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Starts a run of three shapes without a GPU; ``fails`` are those whose study fails."""
    out = tmp_path / "picked.json"
    shapes = [("ttt_linear_b4", 8, b, 16) for b in (1, 2, 4)]
    monkeypatch.setattr(schedules, "SHAPES", shapes)
    monkeypatch.setattr(schedules, "Pool", lambda *_: SimpleNamespace(compiler=lambda place: place))
    monkeypatch.setattr(schedules, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "X1")
    monkeypatch.setattr(schedules, "asked", lambda shape, direction: (shape, None, None))
    monkeypatch.setattr(schedules, "asked_in_segments", lambda shape: [])

    def start(fails=(), usable=True, seconds=60.0):
        def study(shape, *rest):
            if shape[2] in fails:
                raise ValueError("fails")
            picked = {"us": 1.0, "of best": 1.0, "plan": {}}
            names = ("best", "searched", "rules", "model")
            return {**dict.fromkeys(names, picked), "timed": 1, "tried": rest[3]}

        monkeypatch.setattr(schedules, "study", study)
        monkeypatch.setattr(schedules, "usable", lambda: usable)
        made = schedules.Run(
            argparse.Namespace(
                out=out, seconds=seconds, candidates=16, only="", direction="forward"
            )
        )
        for place in range(len(made.wanted)):
            made.row(place)
        rows = json.loads(out.read_text())["rows"] if out.exists() else []
        return made, {r["shape"]: r for r in rows}

    return start


def test_rows_are_kept_and_what_failed_is_tried_again_last(run):
    first, second, third = (f"ttt_linear_b4_d8_B{b}_T16" for b in (1, 2, 4))
    made, rows = run(fails=(1,), usable=False)
    assert made.broken and list(rows) == [first], "a GPU in error measures nothing more"
    made, rows = run(fails=(1,))
    assert not made.broken and [x[0] for x in made.wanted] == [second, third, first]
    assert rows[first]["error"] == "ValueError: fails" and "error" not in rows[third]
    made, rows = run()
    assert [x[0] for x in made.wanted] == [first] and not any("error" in r for r in rows.values())
    assert len(rows) == 3 and not run()[0].wanted


def test_fewer_schedules_are_timed_where_time_runs_short(run, monkeypatch):
    made, rows = run(seconds=5.0)
    assert not rows, "too little time for a row"
    monkeypatch.setattr(schedules, "SURE", 1)
    now = [0.0]
    monkeypatch.setattr(schedules, "time", SimpleNamespace(monotonic=lambda: now[0]))
    made, rows = run(seconds=100.0)
    made.ended, made.began = 1, 0.0
    for seconds, tried in ((20, 16), (40, 12), (90, 8)):
        now[0] = seconds
        assert made.candidates() == tried
    assert [r["tried"] for r in rows.values()] == [16] * 3
