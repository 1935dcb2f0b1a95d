"""The definition against SciPy, and the reference against the definition."""

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import linkage as scipy_linkage

from reprune_triton import ops
from reprune_triton.selection import definition, reference
from reprune_triton.selection.rng import random_bits

N, COLUMNS = 10, 3


def weight(seed: int, k: int) -> torch.Tensor:
    return torch.randn(N, COLUMNS, k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("linkage", ops.LINKAGES)
def test_heights_are_scipys(linkage):
    for points in weight(0, 3).flatten(2).transpose(0, 1):
        ours = np.array([height for height, _, _ in definition.merges(points.tolist(), linkage)])
        theirs = scipy_linkage(points.numpy(), linkage)[:, 2]
        np.testing.assert_allclose(np.sqrt(2 * ours) if linkage == "ward" else ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("linkage", ops.LINKAGES)
def test_the_reference_computes_what_is_defined(linkage, k):
    for seed in range(2):
        kernels = weight(seed, k).flatten(2)  # (N, COLUMNS, k * k)
        defined = [definition.merges(points, linkage) for points in kernels.transpose(0, 1).tolist()]
        parent, height = reference.forest(kernels.transpose(0, 1), linkage)
        for column, merges in enumerate(defined):
            assert {(i, j) for _, i, j in merges} == {(int(parent[column, j]), j) for j in range(1, N)}
            costs = torch.tensor([cost for cost, _, _ in merges], dtype=torch.float64)
            torch.testing.assert_close(height[column, [j for _, _, j in merges]], costs, rtol=1e-12, atol=0)
        for keep in (1, 5, N):
            labels, h = reference.cut(parent, height, keep)
            clusters, defined_h = definition.cut(defined, N, keep)
            assert h == pytest.approx(defined_h, rel=1e-12)
            for column, sets in enumerate(clusters):
                assert sorted(map(sorted, sets)) == sorted(
                    (labels[column] == label).nonzero().flatten().tolist() for label in labels[column].unique()
                )


@pytest.mark.parametrize("tie", ops.TIES)
def test_the_filters_are_those_of_the_definition(tie):
    for seed in range(2):
        given = weight(seed, 1 + 2 * (seed % 2))
        score = torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(seed)).double()  # some are equal
        rules = {
            "index": lambda step, i: 0.0,
            "random": lambda step, i, seed=seed: int(random_bits(seed, step * N + i, 1)[0]) >> 1,  # 31 bits of 32
        }
        rule = rules.get(tie, lambda step, i, score=score: float(score[i]))
        for keep in (1, 6, N):
            cover, _ = ops.select_filters(given, keep, tie=tie, seed=seed, score=None if tie in rules else score)
            assert cover.order.tolist() == definition.select(given.flatten(2).tolist(), keep, rule)


def test_of_equal_merges_the_lowest_goes_first():
    line = [(0.0,), (1.0,), (2.0,), (3.0,)]
    assert [merge[1:] for merge in definition.merges(line)] == [(0, 1), (2, 3), (0, 2)]
    assert [merge[1:] for merge in definition.merges(line, "single")] == [(0, 1), (0, 2), (0, 3)]
