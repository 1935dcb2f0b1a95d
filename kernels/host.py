"""Numbers copied from the host to the device. Triton is not needed here."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(numbers: Any, device: torch.device) -> Tensor:
    """Copy integers, in nested lists or an array, to the device as int64; the host does not wait."""
    found = torch.from_numpy(np.asarray(numbers, dtype=np.int64))
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found
