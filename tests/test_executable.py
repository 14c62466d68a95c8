"""Kernels that are loaded and started: made once for all threads, kept on disk, started without asking Triton."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import triton
from marks import on_gpu
from tttc.codegen import beside_others, executable, machine_code
from tttc.codegen.devices import H200
from tttc.codegen.executable import Executable
from tttc.codegen.kernel import Kernel
from tttc.codegen.machine_code import MachineCode
from tttc.codegen.specialised import Specialised, argument

SOURCE = '''"""Adds."""

import triton
import triton.language as tl


@triton.jit
def add(x, y, stride, n, add, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + i, tl.load(x + i * stride, mask=i < n) + add, mask=i < n)
'''
CODE = MachineCode("add", 4, 1024, (0, 1, 3, 4), "OOiiOO", b"machine code")


def wanted(stride=1, n=48, add=2**40, shift=0, kernel=None, block=32):
    kernel = kernel or Kernel("add", SOURCE)
    x = torch.zeros(128)
    given = (x[shift:], x, stride, n, add)
    return Specialised(
        kernel,
        "add",
        tuple(argument(a) for a in given),
        (("N", block),),
        (("num_warps", 4),),
        kernel.function,
    )


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that is not there; what is loaded on it and launched."""
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    loaded, launched = [], []

    class Launcher:
        @staticmethod
        def _load_kernel(path, name, shared, device):
            with open(path, "rb") as file:
                loaded.append((file.read(), name, shared, device))
            return 5, 77, 40, 0  # newer PyTorch says a module first

        @staticmethod
        def _launch_kernel(*given):
            launched.append(given)

    monkeypatch.setattr(torch._C, "_StaticCudaLauncher", Launcher, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda d: 900 + d, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    properties = SimpleNamespace(shared_memory_per_block_optin=2000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(executable, "device_of", lambda device: H200)
    monkeypatch.setattr(executable, "_made", {})
    return SimpleNamespace(loaded=loaded, launched=launched)


def compiled(monkeypatch, work=lambda: None):
    """Have Triton's compiler stand in; counts what it makes."""
    count = []

    def run(self):
        work()
        count.append(threading.current_thread())
        return SimpleNamespace(
            src=SimpleNamespace(
                signature={"x": "*fp32", "y": "*fp32", "stride": "constexpr", "n": "i32", "add": "i64", "N": "constexpr"},
                constants={(2,): 1, (5,): 32},
            ),
            metadata=SimpleNamespace(
                name="add", num_warps=4, num_ctas=1, shared=1024, global_scratch_size=0, profile_scratch_size=0
            ),
            asm={"cubin": b"machine code"},
        )  # fmt: skip

    monkeypatch.setattr(Specialised, "compiled", run)
    return count


def test_what_tells_kernels_apart():
    same = wanted().digest()
    assert wanted(n=96).digest() == same, "another multiple of 16"
    others = [
        wanted(stride=2), wanted(n=49), wanted(add=1), wanted(add=3), wanted(shift=1), wanted(block=64),
        wanted(kernel=Kernel("add", SOURCE + "\n")),
    ]  # fmt: skip
    assert len({same, *(w.digest() for w in others)}) == 1 + len(others)


def test_a_kernel_is_started_on_what_is_not_compiled_in(gpu, monkeypatch):
    count = compiled(monkeypatch)
    found = executable.executable(wanted(), 1)
    passed = found.passed([1000, 2000, 1, 48, 3])
    assert passed == [1000, 2000, 48, 3]
    found.start((7, 2, 1), passed)
    assert gpu.loaded == [(b"machine code", "add", 1024, 1)]
    given = (1000, 2000, 48, 3, None, None)
    assert gpu.launched == [(77, 7, 2, 1, 4, 1024, "OOilOO", given, 901)]
    assert executable.executable(wanted(), 1) is found and len(count) == 1


def test_another_process_compiles_nothing(gpu, monkeypatch, tmp_path):
    count = compiled(monkeypatch)
    executable.executable(wanted(), 0)
    executable._made.clear()  # as in a process that begins
    executable.executable(wanted(), 0)
    assert len(count) == 1 and len(gpu.loaded) == 2
    executable._made.clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    executable.executable(wanted(), 0)
    assert len(count) == 2, "machine code of another GPU"
    monkeypatch.setenv("TRITON_SOMETHING", "1")
    executable._made.clear()
    executable.executable(wanted(), 0)
    assert len(count) == 3, "Triton was told otherwise"
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    executable._made.clear()
    executable.executable(wanted(), 0)
    assert len(count) == 4, "Triton was told to compile"


@pytest.mark.parametrize("harm", ["code", "about", "json", "type", "driver"])
def test_what_is_damaged_is_compiled_again(harm, gpu, monkeypatch):
    count = compiled(monkeypatch)
    executable.executable(wanted(), 0)
    path = machine_code.path_of(wanted(), 0)
    about = path.with_suffix(".json")
    if harm == "code":
        path.write_bytes(b"machine")
    elif harm == "json":
        about.write_text("{")
    elif harm == "about":
        about.write_text(json.dumps({k: v for k, v in json.loads(about.read_text()).items() if k != "warps"}))  # fmt: skip
    elif harm == "type":
        about.write_text("[]")
    elif harm == "driver":  # files whole, and still not to be loaded
        first = [True]

        def load(path, name, shared, device):
            if first and first.pop():
                raise RuntimeError("invalid image")
            return 5, 77, 40, 0

        monkeypatch.setattr(torch._C._StaticCudaLauncher, "_load_kernel", load)
    executable._made.clear()
    if harm == "driver":
        executable.executable(wanted(), 0)
    else:
        with pytest.warns(RuntimeWarning, match="is damaged"):
            executable.executable(wanted(), 0)
    assert len(count) == 2
    assert machine_code.kept(path).cubin == b"machine code", "it is whole again"


def test_nothing_is_kept_where_nothing_can_be_written(gpu, monkeypatch, tmp_path):
    compiled(monkeypatch)
    (tmp_path / "kernels").write_text("in the way")
    with pytest.warns(RuntimeWarning, match="could not be written"):
        found = executable.executable(wanted(), 0)
    found.start((1, 1, 1), [1, 2, 3, 4])
    assert gpu.launched


def test_threads_share_what_one_of_them_makes(gpu, monkeypatch):
    go = threading.Event()
    count = compiled(monkeypatch, work=go.wait)
    executable.begin(wanted(), 0)
    executable.begin(wanted(), 0)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(executable.executable(wanted(), 0)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1 and len(found) == 3
    assert len(count) == 1 and count[0] not in threads


def test_what_fails_says_so_to_each_that_asks(gpu, monkeypatch):
    def fails():
        raise ValueError("no such operator")

    compiled(monkeypatch, work=fails)
    executable.begin(wanted(), 0)
    for _ in range(2):
        with pytest.raises(ValueError, match="no such operator"):
            executable.executable(wanted(), 0)
    count = compiled(monkeypatch)
    executable.executable(wanted(), 0)
    assert len(count) == 1


def test_what_is_compiled_alone_waits_for_others_and_they_for_it():
    """A newer assembler, for one kernel, would be everybody's."""
    order, inside = [], threading.Event()

    def one():
        with beside_others.together():
            inside.set()
            order.append("begins")
            time.sleep(0.1)
            order.append("ends")

    def other():
        with beside_others.together():
            order.append("later")

    first, later = threading.Thread(target=one), threading.Thread(target=other)
    first.start()
    inside.wait()
    with beside_others.alone():
        order.append("alone")
        later.start()
        time.sleep(0.1)
        order.append("no longer")
    first.join()
    later.join()
    assert order == ["begins", "ends", "alone", "no longer", "later"]
    assert (beside_others._running, beside_others._alone) == (0, 0)


def test_what_can_not_be_begun_is_left_to_the_launch(gpu, monkeypatch):
    count = compiled(monkeypatch)

    class Full:
        def submit(self, *given, **more):
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(executable, "_threads", Full)
    executable.begin(wanted(), 0)
    executable.executable(wanted(), 0)
    assert count == [threading.current_thread()]


def test_a_thread_without_a_gpu_says_so(gpu, monkeypatch):
    compiled(monkeypatch)

    def fails(device):
        raise RuntimeError("no such device")

    go = threading.Event()
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: (go.wait(), fails(device)))
    executable.begin(wanted(), 0)
    found = executable._made[wanted().digest(), 0]
    go.set()
    with pytest.raises(RuntimeError, match="no such device"):
        found.result(timeout=60)
    executable.executable(wanted(), 0)


EXIT = """
import time
from concurrent.futures import Future
from tttc.codegen import executable

pool = executable._threads()
for _ in range(4 * pool._max_workers):
    pool.submit(time.sleep, 4)
print("ends", flush=True)
"""


def test_a_script_that_ends_compiles_nothing_more():
    with subprocess.Popen([sys.executable, "-c", EXIT], stdout=subprocess.PIPE) as script:
        assert script.stdout.readline()
        start = time.monotonic()
        assert script.wait() == 0
        assert time.monotonic() - start < 10  # 16 seconds where all were waited for


def test_what_a_gpu_does_not_hold(gpu):
    with pytest.raises(triton.runtime.errors.OutOfResources):
        Executable(wanted(), MachineCode(**{**vars(CODE), "warps": 64}), 0)


@pytest.mark.parametrize("most", [1024, 1023])
def test_a_program_that_takes_all_shared_memory_is_started_by_triton(most, gpu, monkeypatch):
    """Or refused by it: PyTorch's launcher keeps some back."""
    compiled(monkeypatch)
    properties = SimpleNamespace(shared_memory_per_block_optin=most)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = executable.executable(wanted(), 0)
    assert not found._by_us and not gpu.loaded
    assert machine_code.kept(machine_code.path_of(wanted(), 0)) is None


TOLD = {
    "environment": lambda m: m.setenv("DISABLE_PTXAS_OPT", "1"),
    "options": lambda m: m.setattr(triton.knobs.nvidia, "ptxas_options", "-O0"),
    "debug": lambda m: m.setattr(triton.knobs.runtime, "debug", True),
    "instrumentation": lambda m: m.setattr(
        triton.knobs.compilation, "instrumentation_mode", "consan"
    ),
    "ours": lambda m: m.setattr(machine_code, "_compiler", lambda: "another"),
}


@pytest.mark.parametrize("name", TOLD)
def test_what_triton_is_told_tells_files_apart(name, gpu, monkeypatch):
    before = machine_code.path_of(wanted(), 0)
    TOLD[name](monkeypatch)
    assert machine_code.path_of(wanted(), 0) != before


def test_nothing_is_kept_of_stages_of_somebody_else(gpu, monkeypatch):
    count = compiled(monkeypatch)
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", lambda *given: None)
    for n in (1, 2):
        executable.executable(wanted(), 0)
        executable._made.clear()
        assert len(count) == n
    assert not machine_code.path_of(wanted(), 0).exists()


def test_triton_starts_what_only_it_can_start(gpu, monkeypatch):
    calls = []

    class Made(SimpleNamespace):
        def __getitem__(self, grid):
            return lambda *given: calls.append((grid, given))

    compiled(monkeypatch)
    made = Made(**vars(wanted().compiled()))
    for special in ({"num_ctas": 2}, {"launch_pdl": True}, {"global_scratch_size": 64}):
        made.metadata = SimpleNamespace(**{**vars(made.metadata), **special})
        assert machine_code.machine_code(made) is None
    found = Executable(wanted(), made, 0)
    found.start((3, 1, 1), found.passed([1000, 2000, 1, 48, 3]))
    assert calls == [((3, 1, 1), (1000, 2000, 1, 48, 3, 32))] and not gpu.launched


def test_a_profiler_of_triton_is_told(gpu, monkeypatch):
    calls = []
    found = Executable(wanted(), CODE, 0)
    made = {(1, 1, 1): lambda *given: calls.append(given)}
    monkeypatch.setattr(Specialised, "compiled", lambda self: made)
    hooks = triton.knobs.runtime.launch_enter_hook
    listener = lambda metadata: None  # noqa: E731
    hooks.add(listener)
    try:
        found.start((1, 1, 1), [1000, 2000, 48, 3])
    finally:
        hooks.remove(listener)
    assert calls == [(1000, 2000, 1, 48, 3, 32)] and not gpu.launched
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", None)
    found.start((1, 1, 1), [1000, 2000, 48, 3])
    assert len(calls) == 1 and len(gpu.launched) == 1


OFFLINE = """
import pickle, sys
from tttc.codegen.kernel import Kernel
from tttc.codegen.machine_code import machine_code
from tttc.codegen.resources import _Absent
from triton.runtime.driver import driver
from test_executable import wanted

driver.set_active(_Absent("sm_90"))
code = machine_code(wanted().compiled())
print(code.name, code.warps, code.passed, code.types, len(code.cubin) > 500)
"""


def test_stand_ins_are_compiled_as_arguments_are(tmp_path):
    """By Triton itself, for a GPU that need not be there."""
    environment = {"TTTC_CACHE_DIR": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "triton"), "PATH": ""}  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE], cwd="tests", env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split("\n")[0] == "add 4 (0, 1, 3, 4) OOilOO True"


@on_gpu
def test_machine_code_from_disk_computes_the_same(tmp_path, monkeypatch):
    for name in ("TTTC_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(executable, "_made", {})
    x = torch.arange(100, device="cuda", dtype=torch.float32)
    kernel = Kernel("add", SOURCE)
    results = []
    for _ in range(2):
        y = torch.zeros_like(x)
        given = (x, y, 1, 100, 5)
        this = Specialised(
            kernel, "add", tuple(argument(a) for a in given), (("N", 32),), (("num_warps", 1),), kernel.function
        )  # fmt: skip
        found = executable.executable(this, x.get_device())
        found.start((4, 1, 1), found.passed([x.data_ptr(), y.data_ptr(), *given[2:]]))
        results.append(y)
        executable._made.clear()
        shutil.rmtree(tmp_path / "TRITON_CACHE_DIR", ignore_errors=True)  # what is kept is enough
        monkeypatch.setattr(Specialised, "compiled", None)
    torch.testing.assert_close(results[0], x + 5)
    assert torch.equal(*results)
