"""Kernels are compiled again where their machine code reads a uniform register which nothing has written.

Descriptors of operands in shared memory, which matrix products of warpgroups read, are worked out in uniform registers,
of which there are 63. Of a kernel with 15 such products ptxas 12.8 (that of Triton 3.6 and 3.7) wrote an address to UR24 a hundred
instructions after it was to be read from UR25, and to that never::

    UIADD3 UR25, UP0, UR25, 0x2, URZ ;      the first that names UR25
    ...
    USHF.R.U32.HI UR24, URZ, 0x4, UR12 ;    what it was to add to

Its products read where some earlier kernel had left descriptors: results were wrong by orders of magnitude, the same each
time, or there was an illegal memory access. Neither the interpreter nor an emulation of the PTX shows any of that. One
level of optimisation lower the same PTX becomes what it should, with fewer registers spilled.

Compiling processes run this file by itself: nothing of ours is imported.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOWER = "--opt-level 1"  # for ptxas

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_GUARD = re.compile(r"^@!?U?P(?:\d|T)\s+")
_UNIFORM = re.compile(r"(?<![\w.])UR(\d+)\b")
_PREDICATE = re.compile(r"^!?U?P(?:\d|T)$")
_DESCRIPTOR = re.compile(r"\bg?desc\[UR\d+\]")  # of these not every register is read


class Miscompiled(RuntimeError):
    """No level of optimisation gives machine code that can be run."""


def sound(compiled: Callable[[dict[str, Any]], Any], folder: Path) -> tuple[dict[str, Any], Any]:
    """What ``compiled`` makes, at a lower level of optimisation where that is not to be run.

    Args:
        compiled: compiles a kernel under some more of Triton's options.
        folder: where it is remembered what was looked at.

    Returns:
        The options, and the kernel.

    Raises:
        Miscompiled: where neither can be run.
    """
    wrong = ""
    for level in (None, LOWER):
        options = {} if level is None else {"ptx_options": _with(level)}
        kernel = compiled(options)
        if "cubin" not in kernel.asm or "wgmma" not in kernel.asm["ptx"]:
            return options, kernel
        found = _remembered(kernel.asm["cubin"], folder)
        if found is None:
            return options, kernel
        wrong = found
    raise Miscompiled(f"machine code reads a register that nothing writes: {wrong}")


def _with(level: str) -> str:
    """Options of ptxas, beside those that the user asks Triton for."""
    import triton

    return " ".join(filter(None, (triton.knobs.nvidia.ptxas_options, level)))


def _remembered(cubin: bytes, folder: Path) -> str | None:
    """:func:`unwritten`, looked up where this machine code was looked at before: the disassembler takes 0.3 s."""
    path = folder / f"checked_{hashlib.sha256(cubin).hexdigest()[:16]}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["unwritten"]
    except (OSError, ValueError, LookupError):
        pass
    text = disassembled(cubin)
    found = None if text is None else unwritten(text)
    if text is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"unwritten": found}), encoding="utf-8")
    return found


def disassembled(cubin: bytes) -> str | None:
    """The instructions of a kernel as text, None where Triton came without the tool for it."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        made = subprocess.run([str(tool), "-sass", file.name], capture_output=True, text=True)
    return made.stdout if made.returncode == 0 else None


def unwritten(text: str) -> str | None:
    """The first instruction that reads a uniform register which no instruction writes on any way there; else None.

    ``text``: of ``cuobjdump -sass``.

    Example:
        >>> unwritten("/*0000*/ UMOV UR4, 0x1 ; /*0010*/ UIADD3 UR5, UR4, 0x2, URZ ; /*0020*/ EXIT ;")
        >>> unwritten("/*0000*/ UIADD3 UR5, UR4, 0x2, URZ ; /*0010*/ UMOV UR4, 0x1 ; /*0020*/ EXIT ;")
        'UIADD3 UR5, UR4, 0x2, URZ'
    """
    found = [(int(at, 16), line) for at, line in _LINE.findall(text)]
    place = {at: i for i, (at, _) in enumerate(found)}
    lines = [line for _, line in found]
    after_calls = {i + 1 for i, x in enumerate(lines) if _operation(x).startswith("CALL")}
    written: list[set[int] | None] = [None] * (len(lines) + 1)  # on some way to each
    stack: list[tuple[int, set[int]]] = [(0, set())]
    while stack:
        i, so_far = stack.pop()
        while i < len(lines):
            before = written[i]
            if before is not None and so_far <= before:
                break
            so_far = written[i] = so_far | (before or set())
            line = lines[i]
            made = _written(line)
            if made:
                so_far = so_far | made
            operation, ends = _operation(line), _GUARD.match(line) is None
            if operation.startswith(("BRA", "JMP", "CALL")):
                target = re.search(r"\b0x([0-9a-f]+)$", line)
                if target is None or int(target[1], 16) not in place:
                    return None  # where it goes is not to be seen
                stack.append((place[int(target[1], 16)], so_far))
                ends = ends and not operation.startswith("CALL")
            elif operation.startswith("RET"):
                stack += [(n, so_far) for n in after_calls]
            elif operation.startswith(("BRX", "JMX", "BRXU", "JMXU")):
                return None
            elif not operation.startswith("EXIT"):
                ends = False
            if ends:
                break
            i += 1
    for line, before in zip(lines, written, strict=False):
        if before is not None and not _read(line) <= before:
            return line
    return None


def _operation(line: str) -> str:
    return _GUARD.sub("", line).partition(" ")[0]


def _operands(line: str) -> tuple[str | None, list[str]]:
    """The uniform register that an instruction writes, if any, and its other operands."""
    rest = _GUARD.sub("", line).partition(" ")[2]
    operands = [x.strip() for x in _DESCRIPTOR.sub("", rest).split(",")]
    while operands and _PREDICATE.match(operands[0]):
        operands.pop(0)
    compares = "SETP" in _operation(line)  # predicates are all it writes
    if operands and not compares and re.fullmatch(r"UR\d+", operands[0]):
        return operands[0], operands[1:]
    return None, operands


def _written(line: str) -> set[int]:
    target, _ = _operands(line)
    if target is None:
        return set()
    first = int(target[2:])
    return set(range(first, first + (2 if re.search(r"\.64|WIDE", _operation(line)) else 1)))


def _read(line: str) -> set[int]:
    _, operands = _operands(line)
    return {int(n) for x in operands for n in _UNIFORM.findall(x)}
