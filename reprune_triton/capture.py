"""Warm work up and capture it in a CUDA graph, always on the same stream of a device.

A node of autograd runs on the stream on which it was made, and cuBLAS keeps a workspace for every stream that it has
used. So work is warmed up on the stream that captures it, and all captures of a device share one stream.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
_STREAMS: dict[int, torch.cuda.Stream] = {}  # by device
_INVALID: list[torch.cuda.CUDAGraph] = []  # kept alive: the allocator of pinned memory may still ask them


def warm_up(work: Callable[[], T], times: int = 1) -> T:
    """Do the work `times` times on the stream for captures of the current device; return the last result."""
    stream, here = _stream(), torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        for _ in range(times):
            found = work()
    here.wait_stream(stream)
    return found


def capture(work: Callable[[], T]) -> Callable[[], T]:
    """Record the work without doing it; return a function that does it, on the same memory and with the same result.

    The work must have been warmed up, and all that it reads must keep its place in memory as long as it is replayed. If
    this fails, the current stream is the one from before, and the memory of the capture is given back.

    Raises:
        RuntimeError: if the work does something that a graph cannot hold, such as waiting for the device.
        Exception: any that `work` raises.
    """
    device, here = torch.cuda.current_device(), torch.cuda.current_stream()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        # Other threads, such as the one that pins batches, may go on.
        with torch.cuda.graph(graph, pool, _stream(), capture_error_mode="thread_local"):
            found = work()
    except BaseException:
        torch.cuda.set_stream(here)
        _end(graph, device, pool)
        raise

    def replay() -> T:
        graph.replay()
        return found

    return replay


def capturing() -> bool:
    """Whether a graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _stream() -> torch.cuda.Stream:
    device = torch.cuda.current_device()
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream()
    return _STREAMS[device]


def _end(graph: torch.cuda.CUDAGraph, device: int, pool: tuple[int, int]) -> None:
    """End a capture that CUDA has declared invalid, as torch does only for valid ones."""
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # it was valid: torch has ended it
        return
    torch._C._cuda_releasePool(device, pool)
    _INVALID.append(graph)
    generator = torch.cuda.default_generators[device]  # its old state believes that the capture goes on
    generator.graphsafe_set_state(generator.clone_state())
