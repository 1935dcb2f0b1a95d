"""How many filters each layer keeps, in exact integers."""

import math
from fractions import Fraction

import pytest
import torch

from reprune_triton import sparsity
from reprune_triton.errors import RepruneError


def brute_force(scales, s):
    """inf{g : F(g) >= s} by looking at every candidate, and the filters above it."""
    pooled = torch.cat(list(scales.values())).tolist()
    threshold = -math.inf
    if s > 0:
        # integers throughout: s is given in hundredths
        threshold = min(g for g in pooled if sum(x <= g for x in pooled) * 100 >= round(s * 100) * len(pooled))
    return {name: sum(x > threshold for x in scale.tolist()) for name, scale in scales.items()}


@pytest.mark.parametrize("seed", range(20))
def test_threshold_is_the_quantile(seed):
    generator = torch.Generator().manual_seed(seed)
    scales = {f"l{i}": torch.rand(n, generator=generator) for i, n in enumerate((7, 16, 31, 100))}
    for percent in (0, 1, 7, 10, 29, 50, 55, 57, 90, 99):
        assert sparsity.widths_at_sparsity(scales, percent / 100) == brute_force(scales, percent / 100), (seed, percent)


def test_pruned_channels_count_as_zero_and_ties_go_together():
    scales = {"a": torch.tensor([0.0, 0.0, 1.0, 2.0]), "b": torch.tensor([0.5, 0.6, 3.0, 4.0])}
    assert sparsity.widths_at_sparsity(scales, 0.25) == {"a": 2, "b": 4}
    assert sparsity.widths_at_sparsity(scales, 0.125) == {"a": 2, "b": 4}  # both zeros are at the threshold
    assert sparsity.widths_at_sparsity(scales, 0.375) == {"a": 2, "b": 3}
    assert sparsity.widths_at_sparsity(scales, -0.2) == {"a": 4, "b": 4}


def test_scales_that_do_not_rank_are_refused():
    with pytest.raises(RepruneError, match="64 of 64 BatchNorm scales are equal .*Train before"):
        sparsity.widths_at_sparsity({"a": torch.ones(64)}, 0.5)


@pytest.mark.parametrize("width, n_out, round_to, min_keep, expected", [
    (0, 64, 1, 1, 1), (0, 64, 16, 1, 16), (17, 64, 16, 1, 32), (64, 64, 16, 1, 64), (50, 51, 16, 1, 51),
    (3, 8, 16, 1, 8), (5, 64, 1, 9, 9), (5, 64, 4, 9, 12), (2, 4, 1, 9, 4),
])  # fmt: skip
def test_alignment_and_floor(width, n_out, round_to, min_keep, expected):
    assert sparsity.round_up(width, n_out, round_to, min_keep) == expected


def test_flops_budget_is_met_as_closely_as_ranks_allow():
    generator = torch.Generator().manual_seed(0)
    scales = {"a": torch.rand(32, generator=generator), "b": torch.rand(47, generator=generator)}

    def cost(w):
        return (w["a"] + w["a"] * w["b"] + w["b"]) / (32 + 32 * 47 + 47)

    for rank in range(79):  # every rank is the answer to its own cost
        budget = cost(sparsity.widths_at_rank(scales, rank))
        s = sparsity.sparsity_for_flops(scales, budget, cost)
        assert s == Fraction(rank, 79)
        assert sparsity.widths_at_sparsity(scales, s) == sparsity.widths_at_rank(scales, rank)


def test_regrowth_follows_the_cosine():
    assert sparsity.regrow_share(0, 100, 0.3) == pytest.approx(0.3)
    assert sparsity.regrow_share(50, 100, 0.3) == pytest.approx(0.15)
    assert sparsity.regrow_share(100, 100, 0.3) == 0.0
