"""Warm work up and capture it in a CUDA graph, always on the same stream of a device.

A node of autograd runs on the stream on which it was made, and cuBLAS keeps a workspace for every stream it has been
on. So what is captured is warmed up on the stream of the capture, and the next capture has that stream again.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
_STREAMS: dict[int, torch.cuda.Stream] = {}  # by device
_INVALID: list[torch.cuda.CUDAGraph] = []  # the allocator of pinned memory may still ask them


def warm_up(work: Callable[[], T], times: int = 1) -> T:
    """Do the work, `times` times, on the current device's stream of captures; return what the last time gave."""
    stream, here = _stream(), torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        for _ in range(times):
            found = work()
    here.wait_stream(stream)
    return found


def capture(work: Callable[[], T]) -> Callable[[], T]:
    """Record the work, which is not done now; what is returned does it, on the same memory, and gives the same tensors.

    The work has been warmed up, and what it reads from outside stays where it is as long as it is replayed. If this
    fails, the current stream is what it was before, and the memory of the capture is given back.

    Raises:
        RuntimeError: if the work does what a graph cannot hold, such as waiting for the device; or what `work` raises.
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
    """What torch leaves out where CUDA has declared a capture invalid."""
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # it was valid, and has ended in order
        return
    torch._C._cuda_releasePool(device, pool)
    _INVALID.append(graph)
    generator = torch.cuda.default_generators[device]  # whose state takes the capture to be going on
    generator.graphsafe_set_state(generator.clone_state())
