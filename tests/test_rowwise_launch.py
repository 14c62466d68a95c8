"""A launch of a row-wise kernel uses what Triton found for arguments laid out the same way, and for no others."""

from __future__ import annotations

import pytest
import torch
from tttc.codegen import rowwise_launch
from tttc.codegen.kernel import Kernel
from tttc.codegen.rowwise_launch import Start


class There(torch.Tensor):
    """A tensor that says it is on a GPU."""

    def get_device(self):
        return 0


class Executable:
    def __init__(self, log):
        self.log = log

    def passed(self, arguments):
        return arguments

    def start(self, grid, passed):
        self.log.append((grid, passed))


class Function:
    """As a ``triton.jit`` function is looked at."""

    arg_names = ("x", "y", "rows", "ROWS", "COLS")


@pytest.fixture
def made(monkeypatch):
    """What is compiled, and what is started."""
    compiled, started = [], []

    def executable(wanted, device):
        compiled.append((wanted, device))
        return Executable(started)

    monkeypatch.setattr(rowwise_launch, "executable", executable)
    monkeypatch.setattr(rowwise_launch.triton.knobs.runtime, "interpret", False)
    return compiled, started


def zeros():
    return torch.zeros(64).as_subclass(There)


def called(start, x, y, rows):
    start[(7,)](x, y, rows, ROWS=4, COLS=64, num_warps=2)


def test_a_second_launch_asks_for_nothing(made):
    compiled, started = made
    start = Start(Kernel("made_up", ""), "start", Function())
    x, y = zeros(), zeros()
    for _ in range(3):
        called(start, x, y, 48)
    called(start, y, x, 96)  # elsewhere, of another size
    ((wanted, device),) = compiled
    assert wanted.constants == (("ROWS", 4), ("COLS", 64)) and device == 0
    assert wanted.options == (("num_warps", 2),)
    aligned = (torch.float32, True, True)
    assert wanted.arguments == (aligned, aligned, (False, True, True))
    here, there = x.data_ptr(), y.data_ptr()
    assert started == [((7, 1, 1), [here, there, 48])] * 3 + [((7, 1, 1), [there, here, 96])]


OTHERS = {
    "dtype": lambda x: (x, x.bfloat16(), 48),
    "alignment": lambda x: (x[1:], x, 48),
    "one": lambda x: (x, x, 1),
    "no multiple of sixteen": lambda x: (x, x, 49),
    "of 64 bits": lambda x: (x, x, 2**40),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_layout_is_another_kernel(name, made):
    start = Start(Kernel("made_up", ""), "start", Function())
    x = zeros()
    called(start, x, x, 48)
    called(start, *OTHERS[name](x))
    first, second = (wanted.digest() for wanted, _ in made[0])
    assert first != second


def test_two_functions_of_a_kernel_are_told_apart(made):
    kernel, x = Kernel("made_up", ""), zeros()
    for name in ("start", "finish"):
        called(Start(kernel, name, Function()), x, x, 48)
    assert len({wanted.digest() for wanted, _ in made[0]}) == 2


def test_not_all_layouts_are_remembered(monkeypatch, made):
    monkeypatch.setattr(rowwise_launch, "MOST_KNOWN", 2)
    kernel, x = Kernel("made_up", ""), zeros()
    start = Start(kernel, "start", Function())
    for rows in (1, 48, 49, 2**40, 2**40 + 1):
        called(start, x, x, rows)
        assert len(kernel.compiled) <= 2
