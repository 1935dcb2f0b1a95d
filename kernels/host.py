"""Numbers on their way from the host to the device; without Triton."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(numbers: Any, device: torch.device) -> Tensor:
    """Integers, nested in lists or in an array, as int64 on the device; the host does not wait for it."""
    found = torch.from_numpy(np.asarray(numbers, dtype=np.int64))
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found
