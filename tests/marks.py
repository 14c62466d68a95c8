"""Where a test runs: with CUDA_VISIBLE_DEVICES= a machine with a GPU runs what machines without one do."""

import pytest
import torch

INTERPRETED = (
    "kernels of Triton's interpreter: CUDA_VISIBLE_DEVICES= pytest runs them, as without a GPU"
)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason=INTERPRETED)
on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="kernels are launched on a GPU here"
)
