"""A GPU that is played, for what surrounds the kernels: the driver's part of torch.cuda is replaced, torch.cuda is not.

What takes a device, a stream or an event by PyTorch's rules still does so; only tensors live on the CPU.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from reprune_triton import capture

NAME = "played"
MS = 2.0  # between any two events


class Played:
    """What the driver was asked for."""

    def __init__(self) -> None:
        self.device: int | None = None  # that was made the current one
        self.capturing = False
        self.replays = 0


def play(monkeypatch: pytest.MonkeyPatch) -> Played:
    """One CUDA device, until the end of the test."""
    if torch.cuda.is_available():
        pytest.skip("there is a real one")
    played = Played()

    def set_device(index: int) -> None:
        assert type(index) is int and index == 0, "as the driver sees it"
        played.device = index

    class Stream:
        """The default one, or another."""

        device = torch.device("cuda", 0)

        def __init__(self, device: Any = None, priority: int = 0, stream_id: int = 1, **others: Any):
            self.stream_id, self.device_index, self.device_type = stream_id, 0, 1

        def wait_stream(self, other: Any) -> None:
            assert isinstance(other, Stream)

    def record(event: Any, stream: Any = None) -> None:
        event.recorded = True

    def elapsed_time(event: Any, end: Any) -> float:
        assert event.recorded and end.recorded
        return MS

    class Graph:
        """Holds nothing: what is captured is done at once, and a replay leaves it as it is."""

        def capture_begin(self, *pool: Any, **options: Any) -> None:
            played.capturing = True

        def capture_end(self) -> None:
            played.capturing = False

        def replay(self) -> None:
            assert not played.capturing
            played.replays += 1

    properties = types.SimpleNamespace(name=NAME, multi_processor_count=132, major=9, minor=0)
    stats = {"allocated_bytes": {"all": {"current": 1 << 20, "peak": 4 << 20}}}
    driver = {
        "getDeviceCount": lambda: 1, "getDevice": lambda: 0, "setDevice": set_device, "synchronize": lambda: None,
        "exchangeDevice": lambda index: 0, "maybeExchangeDevice": lambda index: 0, "emptyCache": lambda: None,
        "memoryStats": lambda device: stats, "resetPeakMemoryStats": lambda device: None,
        "getCurrentStream": lambda device: (0, 0, 1), "setStream": lambda **stream: None,
        "isCurrentStreamCapturing": lambda: played.capturing, "sleep": lambda cycles: None,
    }  # fmt: skip
    for name, answer in driver.items():
        monkeypatch.setattr(torch._C, f"_cuda_{name}", answer)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None)
    for name in ("exchange_device", "maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, f"_{name}", lambda index: 0)
    monkeypatch.setattr(torch.cuda, "_get_device_properties", lambda index: properties, raising=False)
    monkeypatch.setattr(torch.cuda, "_initialized", True)
    monkeypatch.setattr(torch.cuda, "default_generators", (torch.Generator(),))
    monkeypatch.setattr(torch.cuda.graphs, "is_current_stream_capturing", lambda: played.capturing)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: played.capturing)
    # Classes of C take no patches, and cannot be made without a driver.
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda.Event, "record", record)
    monkeypatch.setattr(torch.cuda.Event, "elapsed_time", elapsed_time)
    monkeypatch.setattr(torch.cuda.Event, "query", lambda event: False)  # has not been reached
    for name in ("wait", "synchronize"):
        monkeypatch.setattr(torch.cuda.Event, name, lambda event, stream=None: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(capture, "_STREAMS", {})
    return played


class OnCPU(TorchFunctionMode):
    """Tensors that are wanted on the played GPU are on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        def here(x: Any) -> Any:
            on_gpu = isinstance(x, (torch.device, str)) and str(x).split(":")[0] == "cuda"
            return torch.device("cpu") if on_gpu else x

        if func is torch.device:
            return func(*args, **(kwargs or {}))
        return func(*map(here, args), **{key: here(x) for key, x in (kwargs or {}).items()})
