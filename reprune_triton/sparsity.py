"""How many filters each layer keeps (SPEC, step 1).

    |gamma| of all prunable layers, pooled --quantile--> threshold --count per layer--> widths

Everything is counted in integers (`ops.keep_count`): `ceil((1 - s) * n)` in floats is off by one for many n.
"""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

import torch
from torch import Tensor

from .errors import RepruneError
from .ops import keep_count

Widths = dict[str, int]


def round_up(width: int, n_out: int, round_to: int, min_keep: int) -> int:
    """`width` raised to a multiple of `round_to`, at least one such group and `min_keep`, at most all `n_out`."""
    width = max(width, min_keep, 1)
    return min(-(-width // round_to) * round_to, n_out)


def widths_at_rank(scales: Mapping[str, Tensor], rank: int) -> Widths:
    """Filters per layer above the `rank`-th smallest of all pooled scales (ties go together); rank 0 keeps all.

    Args:
        scales: per layer |gamma|, (n_out,) on the CPU; a pruned channel counts as 0 (CHEX).
    """
    if rank == 0:
        return {name: len(scale) for name, scale in scales.items()}
    threshold = torch.cat(list(scales.values())).sort().values[rank - 1]
    return {name: int((scale > threshold).sum()) for name, scale in scales.items()}


def widths_at_sparsity(scales: Mapping[str, Tensor], sparsity: float | Fraction) -> Widths:
    """Filters per layer at a global channel sparsity; the threshold is inf{g : F(g) >= sparsity} of the pooled scales.

    Raises:
        RepruneError: if so many scales are equal that the threshold would take far more than was asked for.
    """
    total = sum(len(scale) for scale in scales.values())
    rank = total - keep_count(total, max(sparsity, 0))
    widths = widths_at_rank(scales, rank)
    if rank and total - sum(widths.values()) > rank + total // 10:
        pooled = torch.cat(list(scales.values())).sort().values
        if pooled[rank - 1] > 0:
            raise RepruneError(
                f"{int((pooled == pooled[rank - 1]).sum())} of {total} BatchNorm scales are equal "
                f"({float(pooled[rank - 1]):g}), so they do not rank the channels. Train before the first pruning "
                "event (bf16 scales hardly move: keep BatchNorm in float32), or give sparsity per layer: "
                "sparsity={'layer1.*': 0.5, ...}."
            )
    return widths


def sparsity_for_flops(scales: Mapping[str, Tensor], flops: float, cost: Callable[[Widths], float]) -> Fraction:
    """The smallest global sparsity at which `cost(widths)`, a share of the dense FLOPs, is at most `flops`.

    `cost` must not rise when widths fall. Where even the highest sparsity is not enough it is what is returned.
    """
    total = sum(len(scale) for scale in scales.values())
    low, high = 0, total - 1  # the answer is in [low, high]; no layer loses its last filter anyway
    while low < high:
        middle = (low + high) // 2
        if cost(widths_at_rank(scales, middle)) <= flops:
            high = middle
        else:
            low = middle + 1
    # Ties and what is pruned already go together, so more than `low` may be at or under the threshold. A fraction,
    # because a float could round up to the next rank.
    return Fraction(min(total - sum(widths_at_rank(scales, low).values()), total - 1), total)


def regrow_share(epoch: int, until: int, start: float) -> float:
    """delta_t = delta_0 (1 + cos(pi t / T_prune)) / 2: by how much the network in training is denser than its target.

    Hou et al., "CHEX", CVPR 2022. Zero at and after T_prune.
    """
    return start * (1 + math.cos(math.pi * epoch / until)) / 2 if epoch < until else 0.0
