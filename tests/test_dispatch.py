"""The faster implementation is taken, a wrong one never; choices last, and processes share them."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from reprune_triton import conv, dispatch, norm
from reprune_triton.dispatch import Case, Table

CASE = Case("norm_act", "bfloat16", (4, 8, 8, 1), (64,))


def candidates(slow="torch", wrong=None):
    """Runs whose clock is their name; and how often they were made."""
    made = []

    def make():
        made.append(1)
        results = {name: [torch.ones(3) * (2 if name == wrong else 1)] for name in ("torch", "triton")}
        runs = {name: lambda name=name: results[name] for name in results}
        make.names = {id(run): name for name, run in runs.items()}
        return runs

    make.made = made
    return make, lambda run: 2.0 if make.names[id(run)] == slow else 1.0


@pytest.mark.parametrize("slow, fast", [("torch", "triton"), ("triton", "torch")])
def test_the_faster_one_is_measured_once_and_kept(tmp_path, slow, fast):
    make, clock = candidates(slow)
    path = tmp_path / "deep" / "table.json"
    table = Table(path, clock)
    assert [table.choose(CASE, lambda: make, lambda: True) for _ in range(3)] == [fast] * 3 and len(make.made) == 1
    assert table.choose(CASE._replace(channels=(32,)), lambda: make, lambda: True) == fast and len(make.made) == 2
    again = Table(path, clock)
    assert again.choose(CASE, lambda: make, lambda: True) == fast and len(make.made) == 2
    assert len(json.loads(path.read_text())) == 2


def test_a_wrong_one_is_never_taken_however_fast():
    make, clock = candidates("torch", wrong="triton")
    with pytest.warns(UserWarning, match="triton and PyTorch disagree for norm_act"):
        assert Table(None, clock).choose(CASE, lambda: make, lambda: True) == "torch"

    def fails():
        raise RuntimeError("no memory")

    with pytest.warns(UserWarning, match="no memory"):
        assert Table(None, clock).choose(CASE, lambda: fails, lambda: True) == "torch"


def test_where_nothing_may_be_measured_the_nearest_decides():
    make, clock = candidates("torch")
    table = Table(None, clock)
    assert table.choose(CASE, lambda: make, lambda: False) == "torch" and not make.made
    table.choices = {CASE._replace(channels=(16,)): "triton", CASE._replace(channels=(512,)): "torch"}
    assert table.choose(CASE, lambda: make, lambda: False) == "triton"
    assert table.choose(CASE._replace(channels=(400,)), lambda: make, lambda: False) == "torch"
    assert table.choose(CASE._replace(form=(4, 8, 8, 0)), lambda: make, lambda: False) == "torch"
    assert not make.made


def test_a_damaged_file_is_as_good_as_none(tmp_path):
    path = tmp_path / "table.json"
    path.write_text('[["norm_act", 3')
    make, clock = candidates()
    assert Table(path, clock).choose(CASE, lambda: make, lambda: True) == "triton"
    assert len(json.loads(path.read_text())) == 1


def share(rank, address, out):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    make, clock = candidates("torch" if rank == 0 else "triton")
    table = Table(None, clock)
    if rank == 0:  # the first process alone has met this case
        table.choose(CASE, lambda: make, lambda: False)
    table.share(dist.group.WORLD)
    (out / str(rank)).write_text(table.choices[CASE])
    dist.destroy_process_group()


def test_all_processes_take_the_first_ones_table(tmp_path):
    mp.spawn(share, (f"file://{tmp_path / 'meet'}", tmp_path), 2)
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["triton", "triton"]


@pytest.mark.parametrize("grad", [True, False])
def test_what_is_measured_agrees(device, grad):
    """The candidates of both operations, of every kind, through the kernels: no warning, and the generator is left."""
    x, weight = torch.empty(2, 5, 4, 3, device=device), torch.empty(7, 5, 1, 1, device=device)
    kind, one = torch.float32, [1, 1]
    norm_of = norm.Norm(*torch.rand(4, 5, device=device).unbind(), "relu", True)
    batch, given = (norm.BatchNorm(*[None] * 4, training, 0.1, 1e-5, "relu6") for training in (True, False))
    given = given._replace(running_mean=weight, running_var=weight)
    state = torch.get_rng_state()
    for make in (
        norm._candidates(x, True, batch, grad, False, True),
        norm._candidates(x, True, batch._replace(act="none"), grad, True, False),
        norm._candidates(x, False, given, grad, False, False),
        conv._candidates(x, kind, weight, None, (one, [0, 0], one), None, False, False, (False, grad)),
        conv._candidates(x, kind, weight, norm_of, ([2, 2], [0, 0], one), 1e-5, False, False, (grad, grad)),
        conv._candidates(x, kind, weight, norm_of, (one, [0, 0], one), None, True, True, (grad, False)),
    ):
        runs = make()
        results = [runs[name]() for name in ("torch", "triton")]
        assert dispatch._agree(*results) and len(results[0]) == len(results[1]) > (1 if grad else 0)
        assert not dispatch._agree([2 * x for x in results[0]], results[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_auto_takes_what_the_table_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "_TABLES", {})
    x = torch.randn(8, 64, 14, 14, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    vector = torch.ones(64, device="cuda")
    for choice in ("triton", "torch"):
        norm.batch_norm_act(x, vector, vector, None, None, act="relu")
        conv.masked_conv2d(x, x.new_ones(32, 64, 1, 1))
        table = dispatch.table(x.device)
        assert {case.operation for case in table.choices} == {"norm_act", "conv"} and list(tmp_path.rglob("*.json"))
        table.choices = dict.fromkeys(table.choices, choice)
        y, expected = (norm.batch_norm_act(x, vector, vector, None, None, act="relu", impl=i) for i in ("auto", choice))
        assert torch.equal(y, expected)
