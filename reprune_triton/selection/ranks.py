"""The processes that share one event: who does what, and how they put it together.

    problems, in equal shares by cost -> cut heights --max--> labels --sum--> layers, one owner each -> filters --sum-->

Every process has the same weights. Each result is computed once and sent to all, so all of them go on with the same
channels, which are bit for bit those of one process alone. A process that fails still takes part in what the others
wait for; then all of them raise its error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from reprune_triton.errors import RepruneError

Value = TypeVar("Value")


def broadcast(value: Value, group: dist.ProcessGroup | None, device: torch.device, source: int = 0) -> Value:
    """Return in all processes of the group the value that process `source` has.

    device: of this process's own model. Without one, NCCL sends over the current device, which is the first GPU in
        every process that has not chosen another.
    """
    given = [value]
    dist.broadcast_object_list(given, group=group, group_src=source, device=device)
    return given[0]


class Ranks:
    """A process group; without one, this process alone."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def maximum(self, tensor: Tensor) -> None:
        """Replace each entry by the largest of all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)

    def total(self, tensor: Tensor) -> None:
        """Replace each entry by the sum over all processes, in place. Here each is 0 in all processes but one."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM, group=self.group)

    def together(self, work: Callable[[], None], device: torch.device) -> None:
        """Do the work in all processes. If it fails in one, all raise its error, as `raise_failure` does."""
        failure = None
        try:
            work()
        except Exception as error:
            failure = error
            if self.size == 1:
                raise
        if self.size > 1:
            failed = torch.tensor(int(failure is not None), device=device)
            self.maximum(failed)
            if failed:
                self.raise_failure(failure, device)

    def raise_failure(self, failure: BaseException | None, device: torch.device) -> NoReturn:
        """Tell all processes which one has failed, and raise in all of them. All call this when at least one has.

        device: of this process's own model.

        Raises:
            RepruneError: with what went wrong, and in which process. A process that has failed raises its own error.
        """
        if failure is not None and self.size == 1:
            raise failure
        first = torch.tensor(self.size if failure is None else self.rank, device=device)
        dist.all_reduce(first, dist.ReduceOp.MIN, group=self.group)
        text = broadcast(f"{type(failure).__name__}: {failure}", self.group, device, int(first))
        if failure is not None:
            raise failure
        raise RepruneError(f"the pruning event failed in process {int(first)} of {self.size}: {text}")


def shares(problems: Sequence[int], cost: Sequence[int], rank: int, size: int) -> list[tuple[int, int]]:
    """Return this process's problems of every layer, as (first, last + 1). The shares cost the same within a problem.

    Args:
        problems: how many each layer has.
        cost: of one problem of each layer, in any unit.
    """
    total = sum(count * each for count, each in zip(problems, cost, strict=True))
    found, done = [], 0
    for count, each in zip(problems, cost, strict=True):
        # A problem belongs to the process in whose part of the whole cost it begins.
        first, last = (min(max(-((done - total * number // size) // each), 0), count) for number in (rank, rank + 1))
        found.append((first, last))
        done += count * each
    return found


def owners(cost: Sequence[int], size: int) -> list[int]:
    """Return a process for every layer: the dearest layer first, each to the process with the least to do so far."""
    load, found = [0] * size, [0] * len(cost)
    for layer in sorted(range(len(cost)), key=lambda number: -cost[number]):
        found[layer] = min(range(size), key=load.__getitem__)
        load[found[layer]] += cost[layer]
    return found
