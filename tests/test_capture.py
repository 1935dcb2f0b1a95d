"""Warm-up and capture on one stream, and what is left after a capture that fails."""

import contextlib

import pytest
import torch

from reprune_triton import capture


class Driver:
    """Of a GPU that is not there: which stream is current, and what is told to the allocator."""

    def __init__(self):
        self.streams, self.device, self.current, self.log = [], 0, "default", []
        self.valid, self.recording = True, None

    def stream(self):
        self.streams.append(f"{self.device}.{len(self.streams)}")
        return Stream(self, self.streams[-1])

    def set(self, stream):
        self.current = stream.name

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def end(self, device, pool):
        if pool != self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording = None
        self.log.append(("ended", device, pool))


class Stream:
    def __init__(self, driver, name):
        self.driver, self.name = driver, name

    def wait_stream(self, other):
        self.driver.log.append((self.name, "waits for", other.name))


@pytest.fixture
def driver(monkeypatch):
    found = Driver()

    class Graph:
        def capture_begin(self, pool, capture_error_mode, **_):
            found.recording = pool
            found.log.append(("begin", found.current, capture_error_mode))

        def capture_end(self):
            found.log.append(("end", found.current))
            if not found.valid:
                raise RuntimeError("operation failed due to a previous error during capture")
            found.recording = None

        def replay(self):
            found.log.append("replay")

    class Generator:
        def clone_state(self):
            return "a new state"

        def graphsafe_set_state(self, state):
            found.log.append(state)

    monkeypatch.setattr(torch.cuda, "default_generators", [Generator()])
    monkeypatch.setattr(capture, "_STREAMS", {})
    monkeypatch.setattr(capture, "_INVALID", [])
    for name, value in {
        "Stream": found.stream, "current_stream": lambda: Stream(found, found.current), "set_stream": found.set,
        "stream": found.on, "current_device": lambda: found.device, "CUDAGraph": Graph, "synchronize": lambda: None,
        "empty_cache": lambda: None, "graph_pool_handle": lambda: (0, 7),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    for name, value in {
        "_host_emptyCache": lambda: None, "_cuda_endAllocateToPool": found.end,
        "_cuda_releasePool": lambda device, pool: found.log.append(("released", device, pool)),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch._C, name, value)
    return found


def test_all_of_a_device_is_warmed_up_and_captured_on_one_stream(driver):
    seen = []
    for device in (0, 1, 0):
        driver.device = device
        for _ in range(2):  # events
            assert capture.warm_up(lambda: seen.append(driver.current) or "warm", times=3) == "warm"
            replay = capture.capture(lambda: seen.append(driver.current) or ["found"])
            assert replay() is replay() and driver.log[-2:] == ["replay"] * 2
    assert seen == ["0.0"] * 8 + ["1.1"] * 8 + ["0.0"] * 8 and driver.current == "default"
    assert driver.log[:3] == [("0.0", "waits for", "default"), ("default", "waits for", "0.0"),
                              ("begin", "0.0", "thread_local")]  # fmt: skip


@pytest.mark.parametrize("valid", [True, False])
def test_a_capture_that_fails_leaves_nothing_behind(driver, valid):
    def work():
        driver.valid = valid
        raise ValueError("a batch of another size")

    with pytest.raises(ValueError if valid else RuntimeError):
        capture.capture(work)
    assert driver.current == "default" and driver.recording is None
    told = [("ended", 0, (0, 7)), ("released", 0, (0, 7)), "a new state"]
    assert [entry for entry in driver.log if entry in told] == ([] if valid else told)
    assert len(capture._INVALID) == (not valid), "the graph must stay, or the allocator asks freed memory"
    driver.valid = True
    assert capture.capture(lambda: "again")() == "again"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_after_a_capture_that_fails_all_goes_on():
    x = torch.zeros(1 << 20, device="cuda")
    capture.warm_up(lambda: x.add_(1))
    before = torch.cuda.memory_allocated()

    def waits():
        torch.nn.functional.dropout(x)
        x.mul_(2)
        (x + 1).sum().item()

    for _ in range(2):
        with pytest.raises(RuntimeError):
            capture.capture(waits)
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        assert torch.cuda.memory_allocated() == before
        torch.nn.functional.dropout(x)
    x.add_(1)
    replay = capture.capture(lambda: x.add_(1))
    assert x[0].item() == 2, "a capture does nothing"
    replay()
    assert x[0].item() == 3
