"""What every test runs under: Triton's interpreter where there is no GPU, two threads, a cache of its own."""

import os
import tempfile

import torch

if not torch.cuda.is_available():
    # Read by triton when it is imported, so it is set before any test imports a kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")
_cache = tempfile.TemporaryDirectory(prefix="tttc-tests-")
os.environ["TTTC_CACHE_DIR"] = _cache.name
torch.set_num_threads(2)
