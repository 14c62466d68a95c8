"""What every test runs under: Triton's interpreter where there is no GPU, two threads, a cache of its own."""

import os
import subprocess
import sys
import tempfile


def _has_gpu() -> bool:
    """Asked in a process of its own: here torch must not be imported yet, it may import triton."""
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Triton reads it as it is imported, and torch's compiler imports triton.
if "TRITON_INTERPRET" not in os.environ and not _has_gpu():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import torch._dynamo

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
    with torch._dynamo.config.patch(specialize_float=True):
        yield
