"""A kernel of one line: if it can be compiled and loaded, all others can."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def probe_kernel(x_ptr):
    tl.store(x_ptr, 0)


INTERPRETED = not isinstance(probe_kernel, triton.JITFunction)


def load(device: torch.device) -> None:
    """Compile the kernel for this GPU and load it, and all that a launch needs; do not launch it."""
    if not INTERPRETED:
        triton.runtime.driver.active.get_current_target()  # fails without a driver, before a GPU is touched
        with torch.cuda.device(device):
            probe_kernel.warmup(torch.int32, grid=(1,))[(1, 1, 1)]
