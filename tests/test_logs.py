"""Logs under TTTC_LOGS, progress on terminals, and the names profilers show."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest
import torch
from marks import interpreted
from torch import nn

import tttc
from tttc import cli, logs, progress
from tttc.runtime.ranges import scan_range


def step(anchor, W, token, shared):
    gradient = torch.func.grad(lambda w: 0.5 * (torch.tanh(token @ w) - token).square().sum())
    return W - 0.1 * gradient(anchor), token @ W


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.init = nn.Parameter(torch.zeros(2, width, width))

    def forward(self, x):
        return tttc.scan(step, self.init, x, mini_batch_size=4)[1]


class Two(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = Layer(width), Layer(width)

    def forward(self, x):
        return self.second(self.first(x))


@pytest.fixture
def no_logs_after():
    yield
    logs.configure("")
    assert logging.getLogger("tttc").propagate


# -- logs ---------------------------------------------------------------------------------------------------


def test_logs_are_what_the_variable_asks_for(monkeypatch, capsys, no_logs_after):
    monkeypatch.setenv("TTTC_LOGS", "+passes,scans,schedule,-fusion")
    tttc.explain(Two(5), torch.randn(1, 2, 9, 5), backend="torch", check_tokens=0, target="")
    shown = capsys.readouterr()
    assert not shown.out
    assert re.search(r"tttc.passes\] step: dualise: \d+ nodes, [\d.]+ ms", shown.err)
    assert re.search(r"step: dualise leaves\ngraph\(\)", shown.err)
    assert "scan_full: Schedule(" in shown.err
    for layer in ("first", "second"):
        assert f"tttc.scans] {layer} {step.__module__}.step#" in shown.err
    assert "runs in its dual form" in shown.err
    assert "[tttc.fusion" not in shown.err and "tttc.capture]" not in shown.err


@interpreted
def test_kernels_are_logged_with_file_and_time(monkeypatch, capsys, no_logs_after):
    monkeypatch.setenv("TTTC_LOGS", "kernels")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with torch.no_grad():
        tttc.compile(Layer(6), backend="triton")(torch.randn(1, 2, 8, 6))
    shown = capsys.readouterr().err
    assert re.search(r"tttc.kernels\] scan_full: \S+scan_full_[0-9a-f]{16}\.py", shown)
    assert re.search(r"tttc.kernels\] scan_full: first launch: [\d.]+ ms", shown)
    assert "def scan_full" not in shown


def test_without_the_variable_logs_are_the_programs_own(monkeypatch, capsys, caplog):
    monkeypatch.delenv("TTTC_LOGS", raising=False)
    with caplog.at_level(logging.INFO, logger="tttc.passes"):
        tttc.explain(Layer(7), torch.randn(1, 2, 4, 7), backend="torch", check_tokens=0, target="")
    assert any("step: dualise" in r.getMessage() for r in caplog.records)
    assert "tttc.passes]" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["foo", "passes,+foo", "+tttc.passes"])
def test_a_wrong_name_lists_those_there_are(monkeypatch, capsys, text):
    monkeypatch.setenv("TTTC_LOGS", text)
    assert cli.main(["cache"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert all(name in shown for name in logs.CHANNELS)
    with pytest.raises(ValueError, match="TTTC_LOGS: expected names separated by commas"):
        tttc.compile(nn.Linear(2, 2))


def test_log_levels():
    assert logs.parse(" +passes, kernels ,-scans") == {
        "passes": logging.DEBUG,
        "kernels": logging.INFO,
        "scans": logging.ERROR,
    }
    levels = logs.parse("all,-fusion")
    assert levels.keys() == logs.CHANNELS.keys()
    assert levels["fusion"] == logging.ERROR and levels["capture"] == logging.INFO
    assert logs.parse("") == {}


# -- progress -----------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_terminal(monkeypatch):
    """Called within a test, since pytest gives each phase of one its own stderr."""
    monkeypatch.delenv("TTTC_PROGRESS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


def nested():
    with progress.doing("outer"):
        with progress.phase("passes", "a pass [with brackets]"):
            pass
        with progress.doing("inner") as change:
            change("changed")
    return progress._live


def test_progress_is_shown_on_a_terminal_and_goes(monkeypatch, capsys):
    terminal, texts = on_terminal(monkeypatch), []
    monkeypatch.setattr("rich.live.Live.update", lambda self, shown: texts.append(str(shown.text)))
    assert nested() is None and not progress._texts
    assert texts == [
        "outer: a pass [with brackets]",
        "outer",
        "outer: inner",
        "outer: changed",
        "outer",
    ]
    shown = terminal.getvalue()
    assert "outer" in shown and shown.endswith("\x1b[2K")  # the line is cleared
    assert not capsys.readouterr().out


def test_progress_is_quiet_where_there_is_no_terminal_or_it_is_unwanted(monkeypatch):
    terminal = on_terminal(monkeypatch)
    monkeypatch.setenv("TTTC_PROGRESS", "0")
    nested()
    assert not terminal.getvalue()
    monkeypatch.delenv("TTTC_PROGRESS")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    nested()
    assert not sys.stderr.getvalue()


# -- names in the profiler ----------------------------------------------------------------------------------


def test_the_profiler_shows_layer_and_direction():
    model, x = Two(8), torch.randn(1, 2, 8, 8)
    compiled = tttc.compile(model, backend="torch")
    compiled(x).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compiled(x).sum().backward()
    names = [e.key for e in profile.key_averages()]
    for direction in ("forward", "backward"):
        for layer in ("first", "second"):
            assert f"tttc {direction} {layer} (step)" in names


def test_without_a_profiler_there_are_no_ranges(monkeypatch):
    def opened(*args):
        raise AssertionError("a range costs time")

    monkeypatch.setattr(torch.profiler, "record_function", opened)
    with scan_range("forward", "module.step#1", "layer"):
        pass
