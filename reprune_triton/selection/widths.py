"""Widths: how many filters each layer keeps (docs/method.md, step 1).

    |gamma| of all prunable layers, pooled --quantile--> threshold --count per layer--> widths

Widths are tensors with one number per layer, and nothing here waits for the device that holds the scales. The rank of a
threshold is the number of filters that it takes: the threshold is the rank-th smallest scale. It is counted in integers
(`keep_count`), as `ceil((1 - s) * n)` in floats is off by one for many n.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from reprune_triton.errors import RepruneError
from reprune_triton.selection.pool import Pool

_TINY = 1e-300  # under every scale that is not 0


def keep_count(n: int, sparsity: float | str | Fraction) -> int:
    """Return n - ceil(sparsity * n), in exact integers, with the sparsity read as the decimal that was typed.

    Floats misround: 1 - 0.9 is a little under 0.1, and 0.07 * 100 is a little over 7.
    """
    try:
        exact = Fraction(str(sparsity))
    except ValueError as error:
        raise RepruneError(f"sparsity is {sparsity!r}; it must be a number like 0.5.") from error
    if not 0 <= exact < 1:
        raise RepruneError(f"sparsity is {sparsity}; it must be at least 0 and less than 1.")
    return n - math.ceil(exact * n)


class Widths(NamedTuple):
    """The numbers of filters that the layers are to have after an event."""

    keep: Tensor  # (L,) int64: filters to keep
    width: Tensor  # (L,) int64: kept and regrown filters
    rank: Tensor  # () int64: the rank of the threshold for `keep`; 0 without one
    regrown: Tensor  # () int64: the rank of the threshold for `width`
    flat: Tensor  # () bool: so many scales are equal that a threshold takes far more than was asked for


# Multiply-adds of a conv or linear: unit * width of layer out * width of layer into, by number; None is 1.
Term = tuple[int, int | None, int | None]


class Scales:
    """|gamma| of all filters of the prunable layers, in order.

    Args:
        scales: (T,) in the pool's order, as |gamma| or with a sign; any floating-point type.
        active: (T,) bool; the scale of a pruned channel counts as 0 (CHEX). Active channels whose scale is exactly 0
            rank above those, so that they do not all go together.
    """

    def __init__(self, pool: Pool, scales: Tensor, active: Tensor):
        self.pool = pool
        scales = scales.detach().abs().double()
        dead = active & (scales == 0)
        self.scales = torch.where(dead, self._turns(dead).double() * _TINY, scales).masked_fill(~active, 0.0)
        self.ordered, self._order = self.scales.sort(stable=True)

    def _turns(self, dead: Tensor) -> Tensor:
        """Number the dead filters (T,) 1, 2, ... in an order in which all layers lose theirs at the same pace."""
        upto, layer = dead.long().cumsum(0), self.pool.layer
        before = (upto - dead.long())[self.pool.start]  # in the layers before
        share = (upto - before[layer] - 0.5) / self.pool.count(dead)[layer].clamp_min(1)
        order = share.masked_fill(~dead, math.inf).argsort(stable=True)
        return torch.empty_like(order).scatter_(0, order, torch.arange(1, len(order) + 1, device=order.device))

    def threshold(self, rank: int | Tensor) -> Tensor:
        """Return the `rank`-th smallest scale; -inf for rank 0."""
        if isinstance(rank, int):
            return self.ordered[rank - 1] if rank else torch.full_like(self.ordered[0], -math.inf)
        return self.ordered.gather(0, (rank - 1).clamp_min(0).view(1))[0].masked_fill(rank <= 0, -math.inf)

    def widths(self, rank: int | Tensor) -> Tensor:
        """Return the filters per layer above the `rank`-th smallest scale: (L,) int64. Equal scales go together."""
        return self.pool.count(self.scales > self.threshold(rank))

    def all_widths(self) -> Tensor:
        """Return `widths` at every rank 0 .. T - 1: (T, L)."""
        layer = self.pool.layer[self._order]
        under = torch.nn.functional.one_hot(layer, len(self.pool.sizes)).cumsum(0)  # row r - 1: of the r smallest
        last = torch.searchsorted(self.ordered, self.ordered, right=True) - 1  # the end of each group of equals
        return torch.cat([self.pool.n_out[None], self.pool.n_out - under[last[:-1]]])

    def flat(self, rank: int | Tensor) -> Tensor:
        """Whether far more than `rank` scales are at or under the threshold, as they are equal and not 0: () bool."""
        taken = self.pool.total - self.widths(rank).sum()
        return (taken > rank + self.pool.total // 10) & (self.threshold(rank) > 0)  # rank 0: -inf

    def check(self, rank: int) -> None:
        """Raise RepruneError if the scales are `flat` at this rank; waits for the device."""
        if bool(self.flat(rank)):
            threshold = float(self.threshold(rank))
            raise RepruneError(
                f"{int((self.scales == threshold).sum())} of {self.pool.total} BatchNorm scales are equal "
                f"({threshold:g}), so they do not rank the channels. Train before the first pruning "
                "event (bf16 scales hardly move: keep BatchNorm in float32), or give sparsity per layer: "
                "sparsity={'layer1.*': 0.5, ...}."
            )


def at_sparsity(scales: Scales, sparsity: float | Fraction, extra: float, round_to: int, min_keep: int) -> Widths:
    """Return the widths at a global sparsity. With the regrown filters the sparsity is `extra` lower.

    The threshold is inf{g : F(g) >= sparsity} of the pooled scales.
    """
    total = scales.pool.total
    ranks = [total - keep_count(total, max(s, 0)) for s in (sparsity, sparsity - extra)]
    keep, width = (aligned(scales.widths(rank), scales.pool.n_out, round_to, min_keep) for rank in ranks)
    rank, regrown = (torch.full_like(scales.pool.start[0], rank) for rank in ranks)
    return Widths(keep, width, rank, regrown, scales.flat(rank) | scales.flat(regrown))


class Budget:
    """The multiply-adds of a network as a function of its widths, and how many there may be.

    Args:
        most: the multiply-adds there may be, for one sample.
    """

    def __init__(self, pool: Pool, terms: Sequence[Term], most: int):
        self.most, one = most, len(pool.sizes)
        self._unit, self._out, self._into = torch.tensor(
            [[unit, *(one if number is None else number for number in layers)] for unit, *layers in terms],
            device=pool.device,
        ).T.contiguous()

    def multiply_adds(self, widths: Tensor) -> Tensor:
        """Return the multiply-adds at widths (..., L): (...) int64."""
        whole = torch.nn.functional.pad(widths, (0, 1), value=1)  # (..., L + 1)
        return (self._unit * whole[..., self._out] * whole[..., self._into]).sum(-1)


def at_flops(scales: Scales, budget: Budget, extra: float, round_to: int, min_keep: int) -> Widths:
    """Return the widths at the smallest global sparsity that is within the budget, or else at the highest.

    With the regrown filters the sparsity is `extra` lower.
    """
    pool = scales.pool
    every = aligned(scales.all_widths(), pool.n_out, round_to, min_keep)  # (T, L)
    # Multiply-adds do not rise with the rank, so the first rank within the budget is the number of ranks over it.
    rank = (budget.multiply_adds(every) > budget.most).sum().clamp_max(pool.total - 1)
    # Equal scales go together, as do all pruned filters: the threshold may take more than `rank` filters.
    rank = (pool.total - scales.widths(rank).sum()).clamp_max(pool.total - 1)
    regrown = (rank - math.floor(Fraction(str(extra)) * pool.total)).clamp_min(0)  # ceil(s * T - extra * T)
    keep, width = (aligned(scales.widths(r), pool.n_out, round_to, min_keep) for r in (rank, regrown))
    return Widths(keep, width, rank, regrown, scales.flat(rank) | scales.flat(regrown))


def round_up(width: int, n_out: int, round_to: int, min_keep: int) -> int:
    """Return `aligned` for one layer."""
    return int(aligned(torch.tensor(width), torch.tensor(n_out), round_to, min_keep))


def aligned(width: Tensor, n_out: Tensor, round_to: int, min_keep: int) -> Tensor:
    """Raise widths (..., L) to a multiple of `round_to` that is at least `min_keep` and not 0, or to all filters."""
    width = width.clamp_min(max(min_keep, 1))
    return torch.minimum((width + round_to - 1) // round_to * round_to, n_out)


def regrow_share(epoch: int, until: int, start: float) -> float:
    """Return by how much the network in training is denser than its target (Hou et al., "CHEX", CVPR 2022).

    delta_t = delta_0 (1 + cos(pi t / T)) / 2 before the last event, T, and 0 from then on.
    """
    return start * (1 + math.cos(math.pi * epoch / until)) / 2 if epoch < until else 0.0
