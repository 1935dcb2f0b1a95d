"""Set-up shared by all tests."""

import os

# Triton reads this when it is first imported, so it must be set before any kernel is.
if not os.environ.get("REPRUNE_GPU_TESTS"):
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

# The networks here are tiny. On a busy machine several threads wait for each other ten times longer than they work.
torch.set_num_threads(1)
