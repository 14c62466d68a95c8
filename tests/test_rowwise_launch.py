"""A launch of a row-wise kernel uses what Triton found for arguments laid out the same way, and for no others."""

from __future__ import annotations

import pytest
import torch
from tttc.codegen import rowwise_launch
from tttc.codegen.kernel import Kernel
from tttc.codegen.rowwise_launch import Start


class Compiled:
    def __init__(self, log):
        self.log = log

    def __getitem__(self, grid):
        return lambda *given: self.log.append((grid, given))


class Function:
    """As a ``triton.jit`` function is called."""

    arg_names = ("x", "y", "rows", "ROWS", "COLS")

    def __init__(self):
        self.first, self.later = [], []

    def __getitem__(self, grid):
        def launch(*given, **constants):
            self.first.append((grid, given, constants))
            return Compiled(self.later)

        return launch


def called(start, x, y, rows):
    start[(7,)](x, y, rows, ROWS=4, COLS=64, num_warps=2)


def test_a_second_launch_asks_triton_nothing():
    function = Function()
    start = Start(Kernel("made_up", ""), "start", function)
    x, y = torch.zeros(64), torch.zeros(64)
    for _ in range(3):
        called(start, x, y, 48)
    called(start, y, x, 96)  # elsewhere, of another size
    assert [constants for *_, constants in function.first] == [
        {"ROWS": 4, "COLS": 64, "num_warps": 2}
    ]
    assert [(g, given[2:]) for g, given in function.later] == [
        ((7, 1, 1), (48, 4, 64)),
        ((7, 1, 1), (48, 4, 64)),
        ((7, 1, 1), (96, 4, 64)),
    ]
    assert function.later[-1][1][0] is y


OTHERS = {
    "dtype": lambda x: (x, x.bfloat16(), 48),
    "alignment": lambda x: (x[1:], x, 48),
    "one": lambda x: (x, x, 1),
    "no multiple of sixteen": lambda x: (x, x, 49),
    "of 64 bits": lambda x: (x, x, 2**40),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_layout_is_another_launch(name):
    function = Function()
    start = Start(Kernel("made_up", ""), "start", function)
    x = torch.zeros(64)
    called(start, x, x, 48)
    called(start, *OTHERS[name](x))
    assert len(function.first) == 2 and not function.later


def test_two_functions_of_a_kernel_are_told_apart():
    kernel, functions = Kernel("made_up", ""), [Function(), Function()]
    x = torch.zeros(64)
    for name, function in zip(("start", "finish"), functions, strict=True):
        called(Start(kernel, name, function), x, x, 48)
    assert all(len(f.first) == 1 for f in functions)


def test_not_all_layouts_are_remembered(monkeypatch):
    monkeypatch.setattr(rowwise_launch, "MOST_KNOWN", 2)
    kernel, x = Kernel("made_up", ""), torch.zeros(64)
    start = Start(kernel, "start", Function())
    for rows in (1, 48, 49, 2**40, 2**40 + 1):
        called(start, x, x, rows)
        assert len(kernel.compiled) <= 2
