"""The filters of all prunable layers in one row, to be counted, ranked and sorted together.

No method waits for the device: sizes that only the device knows stay tensors there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from reprune_triton.kernels.host import to_device


class Pool:
    """A row of T filters: those of layer 0, then those of layer 1, ...

    Attributes:
        sizes: filters per layer, n_out.
        starts: where each layer begins in the row.
        total: T.
        n_out: (L,) int64, sizes on the device.
        start: (L,) int64, starts on the device.
        layer: (T,) int64, the layer of every filter.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device | str | None = None):
        self.sizes, self.total = list(sizes), sum(sizes)
        self.starts = [sum(self.sizes[:number]) for number in range(len(self.sizes))]
        self.n_out, self.start = (to_device(row, torch.device(device or "cpu")) for row in (self.sizes, self.starts))
        self.layer = torch.arange(len(self.sizes), device=device).repeat_interleave(self.n_out, output_size=self.total)

    @property
    def device(self) -> torch.device:
        return self.layer.device

    def count(self, mask: Tensor) -> Tensor:
        """Count the filters of each layer that are in a mask (..., T): (..., L) int64."""
        upto = torch.nn.functional.pad(mask.long().cumsum(-1), (1, 0))
        return upto[..., self.start + self.n_out] - upto[..., self.start]

    def descending(self, score: Tensor) -> Tensor:
        """Return every filter's place (T,) in its layer by score (T,): 0 for the largest, the lowest on ties."""
        order = score.argsort(descending=True, stable=True)
        order = order[self.layer[order].argsort(stable=True)]
        return torch.empty_like(order).scatter_(0, order, torch.arange(self.total, device=score.device) - self._before)

    def ranked(self, score: Tensor) -> Tensor:
        """Return integers (T,) int32 that are in the same order as the scores (T,), and equal where these are."""
        value, order = score.sort(stable=True)
        new = torch.ones_like(order)
        new[1:] = (value[1:] != value[:-1]).long()
        return torch.empty_like(order).scatter_(0, order, new.cumsum(0)).int()

    def partition(self, mask: Tensor) -> Tensor:
        """Return the filters of each layer (T,) int64: those in the mask (T,) bool, ascending, then the others."""
        order = (2 * self.layer + (~mask).long()).argsort(stable=True)
        return order - self._before

    @property
    def _before(self) -> Tensor:
        return self.start[self.layer]

    def split(self, row: Tensor) -> list[Tensor]:
        """Split a tensor (T, ...) into views of the layers."""
        return list(row.split(self.sizes))
