"""Kernels that an assembler gets wrong go to a newer one, or are not run."""

from __future__ import annotations

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from tttc.codegen.assembler import LEVEL, Miscompiled, assembled, misread
from tttc.codegen.kernel import Kernel
from tttc.codegen.resources import Request, measure

from tttc.ir.errors import NotLowerable
from tttc.runtime import launch

triton = pytest.importorskip("triton")

FIRST = "or.b64 %rd234, %rd215, -9223371899415822336;"
NEXT = "add.s64 %rd235, %rd215, -9223371899415822272;"
PRODUCT = "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 ...;"
WIDE = "add.s64 %rd243, %rd232, 4611686293305294914;"  # rows of 128 bytes


@pytest.mark.parametrize(
    "lines, wrong",
    [
        ((FIRST, NEXT, PRODUCT), True),
        ((FIRST, WIDE, PRODUCT), False),
        ((NEXT,), False),
        (("add.s64 %rd1, %rd2, -128;", PRODUCT), False),
        ((), False),
    ],
)
def test_which_sums_are_misread(lines, wrong):
    assert misread("\n".join(lines)) == wrong


@pytest.fixture
def tools(monkeypatch):
    """Says which versions Triton finds; its knobs as they are otherwise."""

    def find(usual, newer, options=None):
        named = {None: usual, "newer": newer}
        nvidia = SimpleNamespace(
            scope=triton.knobs.nvidia.scope,
            ptxas_blackwell=SimpleNamespace(path="newer", version=newer),
            ptxas_options=options,
        )
        nvidia.ptxas = SimpleNamespace(path=None, version=named[None])
        monkeypatch.setattr(triton.knobs, "nvidia", nvidia)
        return nvidia

    return find


def compiler(nvidia, lines):
    """What was asked of the compiler, and by which assembler."""
    asked = []

    def compiled(options):
        asked.append((options, nvidia.ptxas if isinstance(nvidia.ptxas, str) else None))
        return SimpleNamespace(asm={"ptx": "\n".join(lines)})

    return compiled, asked


@pytest.mark.parametrize("given, options", [(None, LEVEL), ("-v", f"-v {LEVEL}")])
def test_what_is_misread_goes_to_a_newer_assembler(tools, given, options):
    compiled, asked = compiler(tools("12.8", "12.9", given), (FIRST, NEXT, PRODUCT))
    assert assembled(compiled)[0] == {"ptx_options": options}
    assert asked == [({}, None), ({"ptx_options": options}, "newer")]


@pytest.mark.parametrize("lines", [(FIRST, WIDE, PRODUCT), (NEXT,)])
def test_other_kernels_are_compiled_once(tools, lines):
    compiled, asked = compiler(tools("12.8", "12.9"), lines)
    assert assembled(compiled)[0] == {} and len(asked) == 1


def test_a_newer_assembler_gets_it_right(tools):
    compiled, asked = compiler(tools("13.1", "13.1"), (FIRST, NEXT, PRODUCT))
    assert assembled(compiled)[0] == {} and len(asked) == 1


def test_without_one_it_is_not_run(tools):
    compiled, _ = compiler(tools("12.8", "12.8"), (FIRST, NEXT, PRODUCT))
    with pytest.raises(Miscompiled, match=r"12\.8"):
        assembled(compiled)


def test_a_launch_says_so(monkeypatch):
    def refuses(call, pointers):
        raise Miscompiled("no")

    monkeypatch.setattr(launch, "_started", refuses)
    call = SimpleNamespace(kernel=Kernel("scan", ""))
    with pytest.raises(NotLowerable, match="scan: no"):
        launch._first_launch(call, [], ())


def test_it_is_asked_while_nothing_else_is_compiled(tools):
    """A newer assembler is told to Triton, and by that to every thread."""
    order = []
    compiled, _ = compiler(tools("12.8", "12.9"), (FIRST, NEXT, PRODUCT))

    @contextmanager
    def alone():
        order.append("alone")
        yield
        order.append("no longer")

    assembled(lambda more: (order.append(bool(more)), compiled(more))[1], alone)
    assert order == [False, "alone", True, "no longer"]


SOURCE = """
import triton
import triton.language as tl


@triton.jit
def product(x, y, z):
    i, k, n = tl.arange(0, 64), tl.arange(0, 64), tl.arange(0, 32)
    a = tl.load(x + i[:, None] * 64 + k[None, :])
    b = tl.load(y + k[:, None] * 32 + n[None, :])
    tl.store(z + i[:, None] * 32 + n[None, :], tl.dot(a, b))
"""


def test_compiling_processes_do_the_same(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "product.py"
    path.write_text(SOURCE)
    signature = {"x": "*bf16", "y": "*bf16", "z": "*fp32"}
    measure([Request(str(path), "product", signature, aligned=list(signature))], "sm_90")
    made = {json.loads(p.read_text()).get("ptx_options") for p in tmp_path.rglob("product.json")}
    assert made == {None, LEVEL}
