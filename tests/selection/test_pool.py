"""All filters in one row: counts, ranks and index lists, layer by layer."""

import pytest
import torch

from reprune_triton.selection.pool import Pool

SIZES = [5, 1, 8, 3]


@pytest.fixture
def pool() -> Pool:
    return Pool(SIZES)


def test_where_everything_stands(pool):
    assert pool.total == 17 and pool.starts == [0, 5, 6, 14]
    assert pool.n_out.tolist() == SIZES and pool.start.tolist() == pool.starts
    assert pool.layer.tolist() == [0] * 5 + [1] + [2] * 8 + [3] * 3
    assert [len(part) for part in pool.split(pool.layer)] == SIZES


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_counts_and_index_lists(pool, share):
    mask = torch.rand(17, generator=torch.Generator().manual_seed(1)) < share
    parts = pool.split(mask)
    assert pool.count(mask).tolist() == [int(part.sum()) for part in parts]
    assert pool.count(torch.stack([mask, ~mask])).tolist() == [
        [int(part.sum()) for part in parts], [int((~part).sum()) for part in parts]
    ]  # fmt: skip
    for part, row in zip(parts, pool.split(pool.partition(mask)), strict=True):
        assert row.tolist() == [*part.nonzero().flatten().tolist(), *(~part).nonzero().flatten().tolist()]


def test_places_and_levels(pool):
    score = torch.tensor([2.0, 1, 2, 0, 9, -1, 3, 3, 3, 3, 1, 1, 0, 5, 0, 0, 0])
    places, ranked = pool.split(pool.descending(score)), pool.split(pool.ranked(score))
    for own, place, rank in zip(pool.split(score), places, ranked, strict=True):
        assert place.argsort().tolist() == own.argsort(descending=True, stable=True).tolist()
        for i in range(len(own)):
            for j in range(len(own)):
                assert (rank[i] < rank[j]) == (own[i] < own[j]) and (rank[i] == rank[j]) == (own[i] == own[j])
