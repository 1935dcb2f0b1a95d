"""Which filters come back: residuals against numpy, and the distribution of the draw."""

import numpy as np
import pytest
import torch

from reprune_triton.selection import regrow, rng
from reprune_triton.selection.pool import Pool


def mask_of(n: int, *kept: int) -> torch.Tensor:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[list(kept)] = True
    return mask


@pytest.mark.parametrize("n, m, k, rank", [(12, 40, 5, 12), (12, 40, 5, 3), (20, 6, 10, 6), (5, 9, 1, 5), (6, 8, 3, 1)])
def test_residuals_are_those_of_least_squares(n, m, k, rank):
    generator = np.random.default_rng(n * m + rank)
    pool, filters, masks, expected = Pool([n, n, 4, n]), [], [], []
    for scale in (1.0, 1e-12, None, 1e12):  # layers of one size go through the linear algebra together
        if scale is None:
            filters, masks, expected = [*filters, None], [*masks, mask_of(4)], [*expected, np.zeros(4)]
            continue
        own = generator.standard_normal((n, rank)) @ generator.standard_normal((rank, m)) * scale
        kept = generator.permutation(n)[:k]
        basis = own[kept].T
        expected.append([np.linalg.norm(f - basis @ np.linalg.lstsq(basis, f, rcond=1e-9)[0]) for f in own])
        filters.append(torch.tensor(own))
        masks.append(mask_of(n, *kept))
    found = pool.split(regrow.residuals(filters, torch.cat(masks), pool))
    for own, wanted, rows in zip(found, expected, filters, strict=True):
        largest = 1.0 if rows is None else float(rows.norm(dim=1).max())
        # What is in the span comes out as the root of the ridge; what is clearly outside as it is.
        assert np.allclose(own, wanted, atol=30 * regrow.RIDGE**0.5 * largest, rtol=0)
        outside = np.asarray(wanted) > 0.05 * largest
        assert np.allclose(own[outside], np.asarray(wanted)[outside], rtol=1e-6)


def test_zero_filters_keep_their_own_norm():
    filters = torch.randn(4, 6)
    filters[0] = 0
    for rows in (filters, torch.zeros(4, 6)):
        found = regrow.residuals([rows], mask_of(4, 0), Pool([4]))
        assert torch.allclose(found, rows.double().norm(dim=1), rtol=1e-9)


@pytest.mark.parametrize("pairs", [regrow._PAIRS, 200])  # all channels at once, and a few
def test_distances_are_those_to_the_nearest_kept_kernels(pairs, monkeypatch):
    monkeypatch.setattr(regrow, "_PAIRS", pairs)
    generator = np.random.default_rng(0)
    pool, kernels, masks, expected = Pool([7, 3, 12]), [], [], []
    for n, columns, d in ((7, 5, 9), (3, 0, 0), (12, 8, 1)):
        kept = sorted(generator.permutation(n)[: n // 2].tolist())
        masks.append(mask_of(n, *kept))
        if not d:
            kernels, expected = [*kernels, None], [*expected, np.zeros(n)]
            continue
        points = generator.standard_normal((columns, n, d))
        apart = np.linalg.norm(points[:, :, None] - points[:, None, kept], axis=3)  # (columns, n, kept)
        kernels.append(torch.tensor(points))
        expected.append(np.sqrt((apart.min(2) ** 2).sum(0)))
        assert expected[-1][kept].max() == 0 < np.delete(expected[-1], kept).min()
    assert np.allclose(regrow.distances(kernels, torch.cat(masks), pool), np.concatenate(expected), rtol=1e-12)


def drawn(residual: torch.Tensor, kept: torch.Tensor, width: int, seed: int) -> list[int]:
    pool = Pool([len(kept)])
    bits = rng.random_bits(seed, 0, len(kept))
    return regrow.draw(residual.double(), kept, torch.tensor([width]), bits, pool).nonzero().flatten().tolist()


def test_draws_follow_the_softmax_of_the_residual():
    residual, kept = torch.tensor([5.0, 0.0, 1.0, 2.0]), mask_of(4, 0)
    draws = [next(i for i in drawn(residual, kept, 2, seed) if i) for seed in range(4000)]
    counts = torch.bincount(torch.tensor(draws), minlength=4).double()
    expected = torch.softmax(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), 0) * 4000
    assert counts[0] == 0
    chi_square = float(((counts[1:] - expected) ** 2 / expected).sum())
    assert chi_square < 13.8, counts  # 0.1% point at two degrees of freedom


def test_draws_are_without_replacement_repeatable_and_keep_the_kept():
    residual, kept = torch.rand(30), mask_of(30, *range(0, 30, 3))
    found = set()
    for seed in range(20):
        back = drawn(residual, kept, 17, seed)
        assert len(back) == 17 and set(range(0, 30, 3)) <= set(back)
        assert back == drawn(residual, kept, 17, seed)
        found.add(tuple(back))
    assert len(found) > 15
    for width in (0, 10):
        assert drawn(residual, kept, width, 0) == list(range(0, 30, 3)), "nothing comes back, and nothing goes"
    assert drawn(residual, kept, 30, 0) == drawn(residual, kept, 99, 0) == list(range(30))


def test_layers_are_drawn_apart():
    """A layer's draw is what it would be alone."""
    sizes, widths = [9, 1, 20, 6], [5, 1, 20, 2]
    pool = Pool(sizes)
    residual, kept = torch.rand(36).double(), torch.rand(36) < 0.3
    bits = torch.cat([rng.random_bits(seed, 0, n) for seed, n in enumerate(sizes)])
    found = pool.split(regrow.draw(residual, kept, torch.tensor(widths), bits, pool))
    for seed, (own, norms, mask, width) in enumerate(
        zip(found, pool.split(residual), pool.split(kept), widths, strict=True)
    ):
        assert own.nonzero().flatten().tolist() == drawn(norms, mask, width, seed)
