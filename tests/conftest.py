"""Set-up shared by all tests."""

import os

import torch

# Without a GPU Triton interprets the kernels. It reads this once, so it must be set before any kernel is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# The networks here are tiny. On a busy machine several threads wait for each other ten times longer than they work.
torch.set_num_threads(1)
