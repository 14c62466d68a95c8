"""The order of lines in which warps wait less often: it computes the same, with fewer barriers."""

from __future__ import annotations

import random
import re

import pytest
from test_warps import WARPS, case_of
from tttc.codegen.exchanges import fewer_barriers
from tttc.codegen.render import render

from tttc.runtime import forward_kernels


class Room:
    """Room in shared memory; what was stored since the last barrier makes a load wait."""

    def __init__(self, waiting):
        self.value, self.waiting = None, waiting

    def store(self, value):
        self.value = value
        self.waiting.add(self)

    def load(self):
        return self.value


def run(lines, filled):
    """What names are at the end."""
    waiting = set()
    names = {"mma_v2": lambda x, y: x * y + 1, "w": 3, "start": lambda: None}
    names |= {room: Room(waiting) for line in lines for room in re.findall(r"\br\d+_s\b", line)}
    names |= {name: 5 + i for i, name in enumerate(filled)}
    exec("\n".join(lines), names)
    return {k: v for k, v in names.items() if isinstance(v, int)}


def barriers(lines, rooms):
    """Loads before which warps wait."""
    waiting, found = set(), []
    for line in lines:
        loaded = {x for x in rooms if re.search(rf"\b{x}\.(\w+\(.*?\)\.)?load\(", line)}
        if loaded & waiting:
            found.append(line)
            waiting.clear()
        waiting |= {x for x in rooms if line.strip().startswith(f"{x}.store(")}
    return found


def program(seed):
    """Random lines of a turn."""
    g, lines, names, rooms = random.Random(seed), [], ["w", "f1", "f2"], []
    for i in range(40):
        x, y = g.choice(names), g.choice(names[-6:])
        kind = g.choice(["light", "light", "heavy", "room", "room", "again"])
        if kind == "light":
            lines.append(f"x{i} = {x} + {y}")
        elif kind == "heavy":
            lines.append(f"x{i} = mma_v2({x}, {y})")
        elif kind == "room" or not rooms:
            rooms.append(f"r{i}_s")
            lines += [f"r{i}_s.store({x})", f"x{i} = r{i}_s.load() + {y}"]
        else:
            room = g.choice(rooms)
            lines += [f"{room}.store({x})", f"x{i} = {room}.load() + {y}"]
        names.append(f"x{i}")
    operands = set(g.sample(names[3:], 5))
    return lines, rooms, operands


@pytest.mark.parametrize("seed", range(60))
def test_lines_compute_the_same_in_another_order(seed):
    lines, rooms, operands = program(seed)
    filled = ["f1", "f2"]
    made = fewer_barriers(lines, rooms, operands, filled, ["start()"])
    assert sorted(made) == sorted([*lines, "start()"])
    assert run(made, filled) == run(lines, filled)
    assert len(barriers(made, rooms)) <= len(barriers(lines, rooms))


def test_what_is_made_for_a_store_of_copied_tokens_is_made_first():
    lines = ["a = w + 1", "r1_s.store(a)", "b = r1_s.load()", "c = mma_v2(b, w)", "r2_s.store(c)", "d = r2_s.load()",
             "e = f1 + a", "r3_s.store(e)", "g = r3_s.load()", "h = d + w", "r4_s.store(h)", "i = r4_s.load() + h"]  # fmt: skip
    made = fewer_barriers(lines, ["r1_s", "r2_s", "r3_s", "r4_s"], [], ["f1"], ["start()"])
    assert made[:3] == ["a = w + 1", "e = f1 + a", "r3_s.store(e)"]
    assert made[made.index("start()") - 1] == "d = r2_s.load()"


def test_pairs_are_packed_before_they_wait_for_a_barrier():
    lines = ["p = mma_v2(w, w)", "q = p + 1", "a = w + 1", "r1_s.store(a)", "b = r1_s.load()", "o = q + w",
             "c = mma_v2(o, b)", "k = c + 1", "x = k + 1", "d = mma_v2(x, b)"]  # fmt: skip
    made = fewer_barriers(lines, ["r1_s"], ["o", "x"])
    assert made == [lines[0], lines[1], lines[5], *lines[2:5], *lines[6:]]


def test_copies_start_where_what_they_fill_is_read_no_more_before_a_barrier():
    lines = ["a = f1 + 1", "r1_s.store(a)", "b = r1_s.load() + f2", "c = mma_v2(b, f1)",
             "r2_s.store(c)", "d = r2_s.load()", "r3_s.store(mma_v2(d, w))", "e = r3_s.load() + f1"]  # fmt: skip
    rooms = ["r1_s", "r2_s", "r3_s"]
    made = fewer_barriers(lines, rooms, [], ["f1", "f2"], ["start()"])
    assert made[made.index("start()") - 1] == "d = r2_s.load()"
    late = [*lines[:6], "g = f2 + d", *lines[6:]]
    assert fewer_barriers(late, rooms, [], ["f1", "f2"], ["start()"])[0] == "start()"
    assert fewer_barriers(lines[:4], rooms, [], ["f1", "f2"], ["start()"])[0] == "start()"


@pytest.mark.parametrize("b", [16, 32])
def test_a_mini_batch_of_an_mlp_waits_four_times(b):
    loop = forward_kernels.forward_loop(
        case_of(name=f"ttt_mlp_b{b}").program(), "full", False, settled=False
    )
    source = render(loop, WARPS).source
    (first, *_) = re.findall(r"    for n in range\(0, N\):\n(.*?)\n    async_copy", source, re.S)
    rooms = re.findall(r"^ +(\w+) = gl.allocate_shared_memory", source, re.M)
    found = barriers(
        first.splitlines(), [x for x in rooms if not x.startswith(("token", "anchor"))]
    )
    assert (
        len(found) == 4
    )  # two sums of what warps have, gradients of tokens, those of hidden units
