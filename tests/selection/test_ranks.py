"""Several processes share an event: they find what one alone finds, and fail together."""

import contextlib
import os
import random
import sys
import threading
import traceback
from pathlib import Path

import guard
import pytest
import torch
import torch.distributed as dist
from torch import nn

from reprune_triton import REPrune, RepruneError
from reprune_triton.fused import dispatch
from reprune_triton.selection import ranks, steps

EVENTS = 2
SETTINGS = {  # by name: how the pruners of this test differ
    "reference": {"impl": "reference", "sparsity": 0.5},
    "triton": {"impl": "triton", "sparsity": 0.5, "tie": "norm"},
    "flops": {"impl": "reference", "flops": 0.6, "linkage": "average", "regrow_by": "coverage"},
    "triton flops": {"impl": "triton", "flops": 0.6, "tie": "gamma", "regrow": 0.0},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for n_in, n_out, k in ((3, 6, 3), (6, 5, 1), (5, 6, 3), (6, 8, 1)):
        layers += [nn.Conv2d(n_in, n_out, k, padding=k // 2), nn.BatchNorm2d(n_out), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    return model


def pruned(name: str, wrap=lambda model: model) -> tuple[REPrune, nn.Module]:
    model = wrap(network())
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    settings = {"every": 1, "until": EVENTS + 2, **SETTINGS[name]}
    pruner = REPrune(model, optimizer, example_inputs=x[:2], **settings)
    for _ in range(EVENTS):
        # All have the same gradients; the mean of three equal ones may round.
        with model.no_sync() if wrap is nn.parallel.DistributedDataParallel else contextlib.nullcontext():
            model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    return pruner, model


def found(pruner: REPrune, model: nn.Module) -> dict:
    state = pruner.state_dict()
    history = [{k: v for k, v in event.items() if k not in ("ms", "stages")} for event in state["history"]]
    weights = {key.removeprefix("module."): value for key, value in model.state_dict().items()}
    momenta = [state.get("momentum_buffer") for state in pruner.optimizer.state.values()]
    return {"layers": state["layers"], "history": history, "weights": weights, "momenta": momenta}


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# What the processes do. Each writes "passed", or what went wrong, into a file.


def work(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    guard.install()
    result = Path(folder) / f"result{rank}"
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        expected = torch.load(f"{folder}/expected", weights_only=False)
        for name in SETTINGS:
            pruner, model = pruned(name, nn.parallel.DistributedDataParallel)
            assert equal(found(pruner, model), expected[name]), f"{name}: not what one process alone finds"
        if size == 3:  # one that fails, and others before and behind it
            failing(rank, size)
            diverged(rank, size)
        result.write_text("passed")
    except BaseException:
        result.write_text(traceback.format_exc())
        os._exit(1)  # the others may be waiting
    dist.destroy_process_group()


def failing(rank: int, size: int) -> None:
    """In any step of the last process: all raise, then all can go on."""
    pruner, _ = pruned("reference", nn.parallel.DistributedDataParallel)
    before = {name: index.clone() for name, index in pruner.active.items()}
    for step in ("__init__", "cluster", "cut", "labels", "membership", "cover", "bits"):
        own = getattr(steps.Reference, step)

        def broken(*arguments, _own=own, _step=step):
            if rank == size - 1:
                raise MemoryError(f"no memory in {_step}")
            return _own(*arguments)

        setattr(steps.Reference, step, broken)
        try:
            pruner.step()
            raise AssertionError(f"process {rank} did not notice that {step} failed in process {size - 1}")
        except MemoryError as error:
            assert rank == size - 1 and str(error) == f"no memory in {step}"
        except RepruneError as error:
            assert rank < size - 1
            assert str(error) == (
                f"the pruning event failed in process {size - 1} of {size}: MemoryError: no memory in {step}"
            )
        finally:
            setattr(steps.Reference, step, own)
        assert pruner.epoch == EVENTS and equal(pruner.active, before), "nothing has changed"
    if rank == 0:  # as the first process alone has what watches a model, or an average of it
        pruner.model.lock = threading.Lock()
    try:
        pruner.step()
        raise AssertionError(f"process {rank} did not notice that the model of process 0 cannot be copied")
    except RepruneError as error:
        assert "cannot be copied" in str(error) and ("in process 0 of" in str(error)) == (rank > 0), error
    vars(pruner.model).pop("lock", None)
    pruner.step()
    assert pruner.epoch == EVENTS + 1


def diverged(rank: int, size: int) -> None:
    """NaN in one process only, which should not be: it says where, the others say in which process."""
    for name in ("reference", "triton"):
        pruner, model = pruned(name, nn.parallel.DistributedDataParallel)
        if rank == 0:
            model.module[4].weight.data[3] = torch.nan  # a BatchNorm's
        try:
            pruner.step()
            raise AssertionError(f"process {rank} did not notice")
        except RepruneError as error:
            if rank == 0:
                assert "4.weight holds NaN or inf" in str(error)
            else:
                assert "process 0" in str(error) or "another process" in str(error), error


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo and Triton's interpreter, where there is no GPU")
def test_processes_find_what_one_alone_finds_and_fail_together(size, tmp_path):
    torch.save({name: found(*pruned(name)) for name in SETTINGS}, tmp_path / "expected")
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, size, str(tmp_path))) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    hanging = [process.is_alive() for process in processes]
    for process in processes:
        process.kill()
        process.join()
    for rank in range(size):
        path = tmp_path / f"result{rank}"
        print(path.read_text() if path.exists() else f"process {rank} left no result", file=sys.stderr)
        assert path.exists() and path.read_text() == "passed", f"process {rank} of {size}"
    assert not any(hanging)


def test_shares_are_all_problems_once_and_of_equal_cost():
    for seed in range(200):
        random.seed(seed)
        layers, size = random.randint(1, 12), random.randint(1, 9)
        problems = [random.randint(1, 40) for _ in range(layers)]
        cost = [random.randint(1, 500) for _ in range(layers)]
        found = [ranks.shares(problems, cost, rank, size) for rank in range(size)]
        for layer, count in enumerate(problems):
            ends = [own[layer] for own in found]
            assert ends[0][0] == 0 and ends[-1][1] == count
            assert all(a[1] == b[0] and a[0] <= a[1] for a, b in zip(ends, ends[1:], strict=False))
        total = sum(count * each for count, each in zip(problems, cost, strict=True))
        for own in found:
            load = sum((last - first) * each for (first, last), each in zip(own, cost, strict=True))
            assert abs(load - total / size) <= max(cost), (seed, own)


def test_owners_are_balanced():
    cost = [100, 1, 1, 60, 40, 30, 30, 30, 5]
    for size in (1, 2, 3, 20):
        owner = ranks.owners(cost, size)
        load = [sum(c for c, own in zip(cost, owner, strict=True) if own == rank) for rank in range(size)]
        assert max(load) <= max(sum(cost) / size + max(cost) / 2, max(cost))
    assert ranks.owners(cost, 2) == ranks.owners(cost, 2)


def test_one_process_alone_raises_its_own_error():
    alone = ranks.Ranks()
    assert (alone.size, alone.rank) == (1, 0)
    with pytest.raises(KeyError):
        alone.raise_failure(KeyError("x"), torch.device("cpu"))


def test_objects_go_over_the_models_own_device(monkeypatch):
    """Which need not be the current one: NCCL would take that of every process that has not called set_device."""
    device, seen = torch.device("cuda", 1), []
    make = torch.tensor

    def tensor(*arguments, device):
        seen.append(device)
        return make(*arguments)

    def send(objects, group, group_src, device):
        seen.append(device)
        objects[0] = "KeyError: 'x'"

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, operation, group: tensor.fill_(1))
    monkeypatch.setattr(dist, "broadcast_object_list", send)
    monkeypatch.setattr(dist, "all_gather_object", lambda *_, **__: pytest.fail("which takes no device"))
    with pytest.raises(RepruneError, match="failed in process 1 of 2: KeyError: 'x'"):
        ranks.Ranks(dist.group.WORLD or object()).raise_failure(None, device)
    table = dispatch.Table(None, lambda run: 0.0)
    with pytest.raises(ValueError):  # what was sent is no table
        table.share(object(), device)
    assert seen == [device] * 3
