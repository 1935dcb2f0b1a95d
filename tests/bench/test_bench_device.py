"""Where benchmarks run: each name of a device, on a GPU that is played down to its driver."""

import json

import pytest
import torch
from played import NAME, OnCPU, play

from reprune_triton.bench.__main__ import main
from reprune_triton.bench.estimate import roofline
from reprune_triton.bench.measure import device as devices
from reprune_triton.errors import RepruneError


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_device_has_a_number(monkeypatch, name):
    played = play(monkeypatch)
    assert devices.use(name) == torch.device("cuda", 0) and played.device == 0


def test_devices_that_are_not_here(monkeypatch):
    assert devices.use("cpu") == torch.device("cpu")
    with pytest.raises(RepruneError, match="--device tpu is no device"):
        devices.use("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(RepruneError, match="no CUDA device here"):
            devices.use("cuda")
        play(monkeypatch)
        with pytest.raises(RepruneError, match="the last CUDA device here is cuda:0"):
            devices.use("cuda:1")


@pytest.fixture
def ceilings(monkeypatch):
    monkeypatch.setattr(roofline, "measure", lambda device: roofline.Ceilings("a test", 1e11, 1e10, False))


STEP = "step --model resnet8 --batch 4 --size 16 --sparsity 0.5 --warmup 1 --steps 2 --runs 1 --variants dense narrow"
COMMANDS = [
    STEP,
    "scaling --d 1 --sizes 8 --problems 1 --size 8 --counts 1 --seconds 0.1 --impl reference",
    "event --model resnet8 --inputs 1 --repeat 1 --impl reference",
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[0])
def test_all_run_on_cuda(monkeypatch, tmp_path, ceilings, command):
    """With tensors on the CPU: what surrounds them is as on a GPU."""
    played, cudnn = play(monkeypatch), torch.backends.cudnn.benchmark
    path = tmp_path / "rows"
    try:
        with OnCPU():
            assert main([*command.split(), "--device", "cuda", "--json", str(path)]) == 0
    finally:
        torch.backends.cudnn.benchmark = cudnn
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert played.device == 0 and found and all(row["device"] in (NAME, "cpu") for row in found)
    if command == STEP:
        assert [(row["variant"], row["result"]) for row in found] == [("dense", "measured"), ("narrow", "measured")]
        assert all(row["dtype"] == "bfloat16" and row["channels_last"] and row["round_to"] == 16 for row in found)
