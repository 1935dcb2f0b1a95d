"""How many filters each layer keeps, in exact integers."""

import math

import pytest
import torch

from reprune_triton.errors import RepruneError
from reprune_triton.running import analysis
from reprune_triton.selection.pool import Pool
from reprune_triton.selection.widths import Budget, Scales, at_flops, at_sparsity, regrow_share, round_up
from reprune_triton.training import models


def scales_of(layers, active=None):
    pool = Pool([len(scale) for scale in layers])
    every = torch.cat([torch.as_tensor(scale) for scale in layers])
    return Scales(pool, every, torch.ones_like(every, dtype=torch.bool) if active is None else active)


def brute_force(layers, percent):
    """inf{g : F(g) >= s} by looking at every candidate, and the filters above it. Integers throughout."""
    pooled = torch.cat(layers).tolist()
    threshold = -math.inf
    if percent > 0:
        threshold = min(g for g in pooled if sum(x <= g for x in pooled) * 100 >= percent * len(pooled))
    return [sum(x > threshold for x in scale.tolist()) for scale in layers]


@pytest.mark.parametrize("seed", range(20))
def test_threshold_is_the_quantile(seed):
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.rand(n, generator=generator) for n in (7, 16, 31, 100)]
    scales = scales_of([scale * (-1) ** i for i, scale in enumerate(layers)])  # the sign does not count
    for percent in (0, 1, 7, 10, 29, 50, 55, 57, 90, 99):
        found = at_sparsity(scales, percent / 100, 0.05, 1, 1)
        floors = [[max(width, 1) for width in brute_force(layers, p)] for p in (percent, max(percent - 5, 0))]
        assert [found.keep.tolist(), found.width.tolist()] == floors, (seed, percent)
        assert int(found.rank) == -(-percent * 154 // 100) and not found.flat


def test_pruned_channels_count_as_zero_and_ties_go_together():
    layers = [torch.tensor([7.0, -9.0, 1.0, 2.0]), torch.tensor([0.5, 0.6, 3.0, 4.0])]
    scales = scales_of(layers, torch.tensor([False, False] + [True] * 6))
    for rank, widths in ((2, [2, 4]), (1, [2, 4]), (3, [2, 3]), (0, [4, 4]), (8, [0, 0])):  # both zeros go together
        assert scales.widths(rank).tolist() == widths
        assert scales.widths(torch.tensor(rank)).tolist() == widths
    every = scales.all_widths()
    assert every.tolist() == [scales.widths(rank).tolist() for rank in range(8)]


def test_scales_of_exactly_zero_are_no_reason_to_prune_more():
    """They go first, from all layers at the same pace, but no more of them than were asked for."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.rand(n, generator=generator) + 0.1 for n in (40, 20, 40)]
    for scale, dead in zip(layers, (30, 10, 20), strict=True):
        scale[torch.randperm(len(scale), generator=generator)[:dead]] = 0
    scales = scales_of(layers)
    for rank in (1, 20, 30, 59, 60, 61, 80):
        gone = torch.tensor([40, 20, 40]) - scales.widths(rank)
        assert gone.sum() == rank and not scales.flat(rank)
        if rank <= 60:
            assert (gone - rank * torch.tensor([30, 10, 20]) / 60).abs().max() < 1, "in proportion"
    assert scales.widths(60).tolist() == [10, 10, 20], "half of the channels is exactly the dead half"
    assert scales.all_widths().tolist() == [scales.widths(rank).tolist() for rank in range(100)]


def test_what_is_pruned_goes_before_what_is_dead():
    layers = [torch.tensor([0.0, 0.0, 1.0, 2.0]), torch.tensor([0.0, 5.0, 6.0, 7.0])]
    scales = scales_of(layers, torch.tensor([True, True, True, True, True, False, False, True]))
    for rank, widths in ((1, [4, 2]), (2, [4, 2]), (5, [2, 1]), (6, [1, 1])):
        assert scales.widths(rank).tolist() == widths
    assert scales.widths(3).sum() == 5


def test_scales_that_do_not_rank_are_found_and_refused():
    scales = scales_of([torch.ones(64)])
    assert at_sparsity(scales, 0.5, 0.0, 1, 1).flat
    with pytest.raises(RepruneError, match="64 of 64 BatchNorm scales are equal .*Train before"):
        scales.check(32)
    pruned = scales_of([torch.rand(64)], torch.arange(64) >= 40)
    assert not pruned.flat(3), "what is pruned is equal, too, and at or under every threshold"
    pruned.check(3)


@pytest.mark.parametrize("width, n_out, round_to, min_keep, expected", [
    (0, 64, 1, 1, 1), (0, 64, 16, 1, 16), (17, 64, 16, 1, 32), (64, 64, 16, 1, 64), (50, 51, 16, 1, 51),
    (3, 8, 16, 1, 8), (5, 64, 1, 9, 9), (5, 64, 4, 9, 12), (2, 4, 1, 9, 4),
])  # fmt: skip
def test_alignment_and_floor(width, n_out, round_to, min_keep, expected):
    assert round_up(width, n_out, round_to, min_keep) == expected


def test_flops_budget_is_met_as_closely_as_ranks_allow():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(32, generator=generator), torch.rand(47, generator=generator)
    scales = scales_of([a, b])
    terms = [(1, 0, None), (1, 1, 0), (1, None, 1), (5, None, None)]
    for rank in range(79):  # every rank is the answer to its own cost
        keep = [max(width, 1) for width in scales.widths(rank).tolist()]
        cost = keep[0] + keep[0] * keep[1] + keep[1] + 5
        budget = Budget(scales.pool, terms, cost)
        assert int(budget.multiply_adds(torch.tensor(keep))) == cost
        found = at_flops(scales, budget, 0.1, 1, 1)
        assert found.keep.tolist() == keep
        least = next(r for r in range(79) if [max(w, 1) for w in scales.widths(r).tolist()] == keep)
        assert int(found.rank) == least and int(found.regrown) == max(least - 7, 0)  # 7.9 filters more
        assert found.width.tolist() == [max(width, 1) for width in scales.widths(max(least - 7, 0)).tolist()]
    out_of_reach = at_flops(scales, Budget(scales.pool, terms, 0), 0.0, 1, 1)
    assert int(out_of_reach.rank) == 78


def test_the_budget_of_a_network_is_its_multiply_adds():
    """Products of widths, and the analysis' own exact count."""
    for name in ("resnet8", "mobilenet_v2"):
        found = analysis.analyse(models.build(name, num_classes=10), models.example_inputs(name))
        pool = Pool([layer.n_out for layer in found.prunable])
        budget = Budget(pool, found.terms(), 0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            widths = {x.name: int(torch.randint(1, x.n_out + 1, (), generator=generator)) for x in found.prunable}
            assert int(budget.multiply_adds(torch.tensor(list(widths.values())))) == sum(found.macs(widths).values())


def test_regrowth_follows_the_cosine():
    assert regrow_share(0, 100, 0.3) == pytest.approx(0.3)
    assert regrow_share(50, 100, 0.3) == pytest.approx(0.15)
    assert regrow_share(100, 100, 0.3) == 0.0
