"""Families of clustering problems, from well-behaved to nasty. All values are exact in float32."""

import numpy as np

Rng = np.random.Generator


def gaussian(n: int, d: int, rng: Rng) -> np.ndarray:
    return rng.standard_normal((n, d)) * np.sqrt(2 / (n * d))


def heavy_tailed(n: int, d: int, rng: Rng) -> np.ndarray:
    return rng.standard_t(2.5, (n, d)) * rng.lognormal(0, 1, (n, 1)) * 0.02


def clustered(n: int, d: int, rng: Rng) -> np.ndarray:
    centres = rng.standard_normal((max(2, n // 8), d))
    return centres[rng.integers(0, len(centres), n)] + 0.05 * rng.standard_normal((n, d))


def low_rank(n: int, d: int, rng: Rng) -> np.ndarray:
    rank = min(2, d)
    return rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d)) + 0.05 * rng.standard_normal((n, d))


def offset(n: int, d: int, rng: Rng) -> np.ndarray:
    return rng.standard_normal((n, d)) + 100


def tiny(n: int, d: int, rng: Rng) -> np.ndarray:
    return rng.standard_normal((n, d)) * 1e-20


def huge(n: int, d: int, rng: Rng) -> np.ndarray:
    return rng.standard_normal((n, d)) * 1e18


def duplicated(n: int, d: int, rng: Rng) -> np.ndarray:
    points = rng.standard_normal((n, d))
    return points[rng.integers(0, (n + 1) // 2, n)]


def half_zero(n: int, d: int, rng: Rng) -> np.ndarray:
    points = rng.standard_normal((n, d))
    points[rng.permutation(n)[: n // 2]] = 0
    return points


def geometric(n: int, d: int, rng: Rng) -> np.ndarray:
    """Growing gaps on a line: one merge a round, the worst case of merging in rounds."""
    return np.cumsum(1.05 ** np.arange(n))[:, None] * np.ones((1, d)) * (1 + 1e-3 * rng.random((n, d)))


def all_zero(n: int, d: int, rng: Rng) -> np.ndarray:
    return np.zeros((n, d))


def grid(n: int, d: int, rng: Rng) -> np.ndarray:
    """Quantised: many exact ties at distances other than zero, so that the dendrogram is not unique."""
    return np.round(rng.standard_normal((n, d)) * 2) / 2


def coarse(n: int, d: int, rng: Rng) -> np.ndarray:
    """Next to the resolution of float32, with many ties: a float32 mean is rounded by as much as points differ."""
    return 2.0**19 + np.round(rng.standard_normal((n, d)) * 6) / 16


def simplex(n: int, d: int, rng: Rng) -> np.ndarray:
    """Groups of points that are all equally far from each other, up to rounding."""
    rotation = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return np.tile(rotation, (n // d + 1, 1))[rng.permutation(n)] * rng.choice([1, 1.5, 3], (n, 1))


UNIQUE = (
    gaussian, heavy_tailed, clustered, low_rank, offset, tiny, huge, duplicated, half_zero, geometric, all_zero,
)  # fmt: skip


def problems(family, P: int, n: int, d: int, seed: int) -> np.ndarray:
    """P problems of one family: (P, n, d) float64, every value exact in float32."""
    rng = np.random.default_rng(seed)
    return np.stack([family(n, d, rng) for _ in range(P)]).astype(np.float32).astype(np.float64)
