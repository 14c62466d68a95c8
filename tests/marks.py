"""Where a test runs."""

import pytest
import torch

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's interpreter is what runs kernels without a GPU"
)
on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="kernels are launched on a GPU here"
)
