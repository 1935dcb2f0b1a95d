"""Set-up shared by all tests."""

import os

import pytest
import torch

# Without a GPU Triton interprets the kernels. It reads this once, so it must be set before any kernel is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# The networks here are tiny. On a busy machine several threads wait for each other ten times longer than they work.
torch.set_num_threads(1)

CUDA = torch.cuda.is_available()


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(CUDA, reason="kernels are not interpreted where there is a GPU")),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU")]),
    ]
)
def device(request) -> str:
    """Where the kernels run: interpreted on the CPU, or on a GPU."""
    return request.param
