"""Machine code that reads a register which nothing writes is seen, and not run."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from tttc.codegen import machine_code
from tttc.codegen.machine_code import LOWER, Miscompiled, sound, unwritten


def code(*lines):
    return "\n".join(f"        /*{16 * i:04x}*/    {x} ;" for i, x in enumerate(lines))


# From what ptxas 12.8 made of the backward of LaCT's chunks.
WRONG = code(
    "UIADD3 UR4, UP0, URZ, 0x400, URZ",
    "UIADD3 UR25, UP0, UR25, 0x2, URZ",
    "UIADD3 UR12, UR4, 0x30000, URZ",
    "UIADD3 UR10, UP6, UR25, 0xfe, URZ",
    "USHF.R.U32.HI UR24, URZ, 0x4, UR12",
    "UMOV UR25, URZ",
    "HGMMA.64x16x16.F32.BF16 R232, R124, gdesc[UR8].tnspB, R232, gsb0",
    "EXIT",
)
RIGHT = code(
    "ULDC.64 UR8, c[0x0][0x208]",
    "UISETP.NE.AND UP0, UPT, UR9, URZ, UPT",  # the second register of a pair
    "@P0 BRA 0x50",
    "S2UR UR25, SR_CgaCtaId",
    "BRA 0x60",
    "R2UR UR25, R12",  # on the other way to the same place
    "LDS R4, [R5+UR25]",
    "LDG.E.128 R4, desc[UR6][R4.64]",  # of a descriptor not every register is read
    "@!P1 BRA 0x60",
    "EXIT",
    "BRA 0xa0",
)
LATER = code(  # written further down, which comes before it
    "BRA 0x30",
    "STS.128 [R119+UR4+0x30000], R12",
    "EXIT",
    "UMOV UR4, 0x400",
    "BRA 0x10",
)


@pytest.mark.parametrize("text", [RIGHT, LATER, ""])
def test_code_that_writes_what_it_reads(text):
    assert unwritten(text) is None


@pytest.mark.parametrize("dropped, read", [("S2UR", None), ("ULDC", "UISETP"), ("UMOV", "STS")])
def test_what_is_not_written(dropped, read):
    text = LATER if dropped == "UMOV" else RIGHT
    found = unwritten(re.sub(rf"{dropped}\S* .*;", "NOP ;", text))
    assert found is None if read is None else found.startswith(read)


def test_what_ptxas_made():
    assert unwritten(WRONG) == "UIADD3 UR25, UP0, UR25, 0x2, URZ"


def test_where_code_goes_must_be_seen():
    assert unwritten(WRONG.replace("UMOV UR25, URZ", "BRX R4 -0x20")) is None


def compiler(made, monkeypatch, products=True):
    """A compiler whose kernels' machine code is ``made``, level after level; what it was asked for."""
    asked = []

    def compiled(options):
        asked.append(options)
        ptx = "wgmma.mma_async.sync" if products else "mma.sync"
        return SimpleNamespace(asm={"ptx": ptx, "cubin": made[len(asked) - 1].encode()})

    monkeypatch.setattr(machine_code, "disassembled", lambda cubin: cubin.decode())
    return compiled, asked


def test_kernels_that_are_wrong_are_compiled_at_a_lower_level(monkeypatch, tmp_path):
    compiled, asked = compiler([WRONG, RIGHT], monkeypatch)
    options, kernel = sound(compiled, tmp_path)
    assert options["ptx_options"].endswith(LOWER) and kernel.asm["cubin"] == RIGHT.encode()
    assert asked == [{}, options]


def test_kernels_that_are_right_are_compiled_once(monkeypatch, tmp_path):
    compiled, asked = compiler([RIGHT], monkeypatch)
    assert sound(compiled, tmp_path)[0] == {} and asked == [{}]


def test_only_products_of_warpgroups_are_looked_at(monkeypatch, tmp_path):
    compiled, _ = compiler([WRONG], monkeypatch, products=False)
    assert sound(compiled, tmp_path)[0] == {} and not list(tmp_path.iterdir())


def test_what_stays_wrong_is_not_run(monkeypatch, tmp_path):
    compiled, _ = compiler([WRONG, WRONG], monkeypatch)
    with pytest.raises(Miscompiled, match="UR25"):
        sound(compiled, tmp_path)


def test_what_was_looked_at_is_remembered(monkeypatch, tmp_path):
    for again in (False, True):
        compiled, asked = compiler([WRONG, RIGHT], monkeypatch)
        if again:
            monkeypatch.setattr(machine_code, "disassembled", pytest.fail)
        sound(compiled, tmp_path)
        assert len(asked) == 2
    kept = sorted(str(json.loads(p.read_text())["unwritten"])[:4] for p in tmp_path.iterdir())
    assert kept == ["None", "UIAD"]
