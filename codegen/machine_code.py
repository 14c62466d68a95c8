"""Machine code of kernels, kept on disk beside their sources: a later process loads it, and asks Triton nothing.

Triton keeps machine code too. To find it there it digests its own files (0.4 s), parses the source of a kernel and all that it
calls, and asks the assembler for its version.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler.compiler import get_cache_invalidating_env_vars
from tttc.codegen.beside_others import together
from tttc.codegen.kernel import cache_dir, warn_about, write_atomically
from tttc.codegen.specialised import Specialised

FORMAT = 1
# How PyTorch's launcher is told a type of Triton's; pointers are "O".
_TYPES = {"i1": "i", "i8": "b", "i16": "h", "i32": "i", "i64": "l", "u1": "I", "u8": "B",
          "u16": "H", "u32": "I", "u64": "K"}  # fmt: skip
_PLACES = ("TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_DUMP_DIR")  # say nothing about code
_KNOBS = {
    "compilation": ("instrumentation_mode", "enable_asan", "use_ir_loc", "disable_line_info", "front_end_debugging"),
    "language": ("fp32_default", "default_fp_fusion"),
    "nvidia": ("disable_ptxas_opt", "ptxas_options", "mock_ptx_version"),
    "runtime": ("debug", "override_arch"),
}  # fmt: skip


@dataclass(frozen=True)
class MachineCode:
    """A kernel as a GPU runs it, and what a launch needs to know.

    Attributes:
        name: of the function in it.
        warps: of a program.
        shared: bytes of shared memory of a program.
        passed: places of the arguments that are not compiled in.
        types: of these, and of pointers to scratch memory that nobody uses, a letter each.
        cubin: what the assembler made.
    """

    name: str
    warps: int
    shared: int
    passed: tuple[int, ...]
    types: str
    cubin: bytes


def passed_on(made: Any) -> tuple[int, ...]:
    """The places of the arguments that Triton has not compiled in."""
    known = {k[0] if isinstance(k, tuple) else k for k in getattr(made.src, "constants", {})}
    kinds = enumerate(made.src.signature.items())
    return tuple(
        i for i, (n, kind) in kinds if kind != "constexpr" and i not in known and n not in known
    )


def machine_code(made: Any) -> MachineCode | None:
    """What Triton made for an NVIDIA GPU; None where only Triton's own launcher can start it."""
    data = made.metadata
    special = (
        data.num_ctas != 1
        or getattr(data, "launch_cooperative_grid", False)
        or getattr(data, "launch_pdl", False)
        or getattr(data, "global_scratch_size", 0)
        or getattr(data, "profile_scratch_size", 0)
    )
    if special or "cubin" not in made.asm:
        return None
    passed = passed_on(made)
    kinds = list(made.src.signature.values())
    types = ["O" if kinds[i].startswith("*") else _TYPES.get(kinds[i]) for i in passed]
    types += ["O" for x in ("global_scratch_size", "profile_scratch_size") if hasattr(data, x)]
    if None in types:
        return None
    letters = "".join(x for x in types if x)
    return MachineCode(data.name, data.num_warps, data.shared, passed, letters, made.asm["cubin"])


@functools.cache
def _compiler() -> tuple[Any, ...]:
    """What compiles here: a Triton, and ours that tells it what and by which assembler."""
    library = next(Path(triton.__file__).parent.glob("_C/libtriton*"), None)
    found = library.stat() if library is not None else None
    stamp = (found.st_size, found.st_mtime_ns) if found is not None else None
    ours = [Path(__file__).with_name(f"{x}.py").read_bytes() for x in ("assembler", "specialised")]
    digest = hashlib.sha256(b"".join(ours)).hexdigest()
    return FORMAT, triton.__version__, stamp, platform.machine(), sys.platform, digest


def _told() -> list[Any]:
    """What Triton is told by the environment and by its knobs."""
    said = {k: v for k, v in os.environ.items() if k.startswith("TRITON_") and k not in _PLACES}
    knobs = [
        (group, name, getattr(getattr(triton.knobs, group), name, None))
        for group, names in _KNOBS.items()
        for name in names
    ]
    return [sorted((said | get_cache_invalidating_env_vars()).items()), knobs]


def may_be_kept() -> bool:
    """Whether what is compiled follows from what was said: nobody has put stages of his own among Triton's."""
    return getattr(triton.knobs.runtime, "add_stages_inspection_hook", None) is None


def path_of(wanted: Specialised, device: int) -> Path:
    """Where the machine code of a kernel is kept, for a GPU."""
    capability = torch.cuda.get_device_capability(device)
    with together():
        digest = wanted.digest(_compiler(), _told(), capability)
    return cache_dir() / "kernels" / f"{wanted.kernel.name}_{digest[:16]}.cubin"


def keep(path: Path, code: MachineCode) -> bool:
    """Write machine code and what belongs to it; whether the disk took it."""
    about = asdict(code) | {"cubin": hashlib.sha256(code.cubin).hexdigest(), "format": FORMAT}
    try:
        write_atomically(path, code.cubin)
        write_atomically(path.with_suffix(".json"), json.dumps(about))
    except OSError as error:
        warn_about(path, f"could not be written ({error}): the next process compiles again")
        return False
    return True


def kept(path: Path) -> MachineCode | None:
    """What is kept there; None where there is nothing, or something that is damaged."""
    try:
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        cubin = path.read_bytes()
        if about["format"] != FORMAT or about["cubin"] != hashlib.sha256(cubin).hexdigest():
            raise ValueError
        return MachineCode(about["name"], int(about["warps"]), int(about["shared"]), _whole(about["passed"]), str(about["types"]), cubin)  # fmt: skip
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, LookupError):
        warn_about(path, "is damaged: its kernel is compiled as if it were not there")
        return None


def _whole(places: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(i) for i in places)
