"""The device on which a benchmark runs, its clock and its memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

from reprune_triton.errors import RepruneError


def use(name: str) -> torch.device:
    """Make the device of this name the current one, and return it. "cuda" is the CUDA device that is current already.

    Raises:
        RepruneError: if there is no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RepruneError(f"--device {name} is no device: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RepruneError("there is no CUDA device here; --device cpu is the other one.")
        index = torch.cuda.current_device() if device.index is None else device.index  # set_device needs a number
        if index >= torch.cuda.device_count():
            raise RepruneError(f"--device {name}: the last CUDA device here is cuda:{torch.cuda.device_count() - 1}.")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_each(work: Callable[[], object], count: int, device: torch.device, wait: bool = False) -> list[float]:
    """Return milliseconds of each of `count` calls, one right after the other; `wait`: until the device is done."""
    if device.type != "cuda" or wait:
        spent = []
        for _ in range(count):
            synchronize(device)
            started = time.perf_counter()
            work()
            synchronize(device)
            spent.append((time.perf_counter() - started) * 1e3)
        return spent
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize(device)
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in zip(marks, marks[1:], strict=False)]


def give_back(device: torch.device) -> None:
    """Give the memory that nobody uses any more back to the device."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def memory(device: torch.device) -> int:
    """Return the bytes in use; from here on the peak is counted."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak(device: torch.device, before: int) -> dict[str, float]:
    """Return the most memory in use during a step beyond that before it: activations and workspaces.

    Before it there are weights, momentum, the last gradients and what other variants hold. The same holds for eager,
    compile and graph. max-autotune has no figure: only Inductor knows what the graphs it has recorded share.
    """
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize(device)
    return {"peak_mb": (torch.cuda.max_memory_allocated(device) - before) / 2**20}
