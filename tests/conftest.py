"""What every test runs under: Triton's interpreter where there is no GPU, two threads, a cache of its own."""

import os
import tempfile

import marks
import pytest
import torch

if not torch.cuda.is_available():
    # Read by triton when it is imported, which torch._dynamo does: nothing that imports that may come before.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Tests count compilations and change the compiler: what one of them compiled is not for the next.
os.environ.setdefault("TTTC_WARM", "0")
_cache = tempfile.TemporaryDirectory(prefix="tttc-tests-")
os.environ["TTTC_CACHE_DIR"] = _cache.name
# Workers of pytest-xdist share the cores.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture
def constant_floats():
    """Floats are constants of captured graphs.

    Under dynamic=True Dynamo makes symbols of a norm's eps and the like, can't keep them, and compiles
    everything a second time; a test that is not about that saves the time.
    """
    import torch._dynamo

    with torch._dynamo.config.patch(specialize_float=True):
        yield


@pytest.fixture
def interpreter(monkeypatch, tmp_path):
    """Row-wise kernels run by Triton's interpreter; the names of those that ran."""
    if torch.cuda.is_available():
        pytest.skip(marks.INTERPRETED)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    from tttc.codegen import rowwise_launch
    from tttc.codegen.kernel import Kernel

    launched = []
    original = Kernel.module

    def module(self):
        launched.append(self.name)
        return original(self)

    monkeypatch.setattr(Kernel, "module", module)
    # Launchers keep the function they imported: under another setting it would be the wrong one.
    rowwise_launch._by_structure.clear()
    rowwise_launch._kernels.clear()
    yield launched
    rowwise_launch._by_structure.clear()
    rowwise_launch._kernels.clear()
