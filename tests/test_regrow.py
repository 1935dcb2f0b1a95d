"""Which filters come back: residuals against numpy, and the distribution of the draw."""

import numpy as np
import pytest
import torch

from reprune_triton.errors import RepruneError
from reprune_triton.regrow import regrow, residual_norms


@pytest.mark.parametrize("n, m, k, rank", [(12, 40, 5, 12), (12, 40, 5, 3), (20, 6, 10, 6), (5, 9, 1, 5), (6, 8, 3, 1)])
def test_residuals_are_those_of_least_squares(n, m, k, rank):
    rng = np.random.default_rng(n * m + rank)
    filters = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, m))
    kept = rng.permutation(n)[:k]
    basis = filters[kept].T
    expected = [np.linalg.norm(f - basis @ np.linalg.lstsq(basis, f, rcond=1e-9)[0]) for f in filters]
    found = residual_norms(torch.tensor(filters), torch.tensor(kept))
    assert np.allclose(found, expected, atol=1e-9 * np.abs(filters).max())


def test_zero_filters_keep_their_own_norm():
    filters = torch.randn(4, 6)
    filters[0] = 0
    assert torch.allclose(residual_norms(filters, torch.tensor([0])), filters.double().norm(dim=1))


def test_draws_follow_the_softmax_of_the_residual():
    filters = torch.diag(torch.tensor([5.0, 0.0, 1.0, 2.0]))  # orthogonal: the residual is the norm
    draws = torch.tensor([regrow(filters, torch.tensor([0]), 1, seed).item() for seed in range(4000)])
    counts = torch.bincount(draws, minlength=4).double()
    expected = torch.softmax(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), 0) * 4000
    assert counts[0] == 0
    chi_square = float(((counts[1:] - expected) ** 2 / expected).sum())
    assert chi_square < 13.8, counts  # 0.1% point at two degrees of freedom


def test_draws_are_without_replacement_never_kept_and_repeatable():
    filters, kept = torch.randn(30, 12), torch.arange(0, 30, 3)
    for seed in range(20):
        back = regrow(filters, kept, 7, seed)
        assert len(set(back.tolist())) == 7 and not set(back.tolist()) & set(kept.tolist())
        assert torch.equal(back, regrow(filters, kept, 7, seed)) and torch.equal(back, back.sort().values)
    assert len(regrow(filters, kept, 0, 0)) == 0
    assert regrow(filters, kept, 20, 0).tolist() == [i for i in range(30) if i % 3]
    with pytest.raises(RepruneError, match="cannot regrow 21"):
        regrow(filters, kept, 21, 0)
