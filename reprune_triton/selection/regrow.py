"""Regrowth: which filters come back (docs/method.md, step 6; Hou et al., "CHEX", CVPR 2022).

    filters -> Gram matrix -> residual norms --Gumbel noise--> the largest come back

Two other rules are for comparison: `distances` in place of residual norms, or the noise alone.

Nothing here waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from reprune_triton.selection.pool import Pool

RULES = ("residual", "coverage", "random")
_PAIRS = 2**24  # of kernels compared at once: 256 MB

# Added to the diagonal, as a share of the largest squared norm: a Gram matrix of dependent filters has no Cholesky
# factor. So a filter in the span of the others comes out with about 1e-5 of its norm instead of 0.
RIDGE = 1e-10


def residual_norms(gram: Tensor, kept: Tensor) -> Tensor:
    """Return the norm of the part of each filter that is not in the span of the kept ones.

    Its square is ||w_i||^2 - g_i^T G^-1 g_i, with the Gram matrix G of the kept filters and g_i = <w_k, w_i>.

    Args:
        gram: (B, n, n) float64, <w_i, w_j> of B layers of n filters.
        kept: (B, n) bool.
    Returns:
        (B, n) float64.
    """
    square = gram.diagonal(dim1=1, dim2=2)  # (B, n)
    largest = square.amax(1, keepdim=True)
    # Filters that are not kept stand in the matrix as rows of the identity, so that its size does not depend on them.
    unit = largest.masked_fill(largest <= 0, 1.0)
    among = gram * (kept[:, :, None] & kept[:, None, :])
    among.diagonal(dim1=1, dim2=2).add_(torch.where(kept, RIDGE * unit, unit))
    factor = torch.linalg.cholesky_ex(among).L
    explained = torch.linalg.solve_triangular(factor, gram * kept[:, :, None], upper=False).square().sum(1)
    return (square - explained).clamp_min(0).sqrt()


def residuals(filters: Sequence[Tensor | None], kept: Tensor, pool: Pool) -> Tensor:
    """Return the residual norms of all filters of a network: (T,) float64, 0 in layers that are None.

    Args:
        filters: per layer (n_out, m) floating point, one filter a row, or None.
        kept: (T,) bool.
    """
    found: list[Tensor] = [torch.zeros_like(part, dtype=torch.float64) for part in pool.split(kept)]
    groups: dict[int, list[int]] = {}  # layers of equal n_out go through the linear algebra together
    for number, rows in enumerate(filters):
        if rows is not None:
            groups.setdefault(len(rows), []).append(number)
    masks = pool.split(kept)
    for numbers in groups.values():
        grams = []
        for number in numbers:
            rows = filters[number].double()  # type: ignore[union-attr]
            grams.append(rows @ rows.T)
        norms = residual_norms(torch.stack(grams), torch.stack([masks[number] for number in numbers]))
        for number, norm in zip(numbers, norms, strict=True):
            found[number] = norm
    return torch.cat(found)


def distances(kernels: Sequence[Tensor | None], kept: Tensor, pool: Pool) -> Tensor:
    """Return how far each filter is from the kept ones, kernel by kernel.

    It is the root of the sum, over the input channels, of the squared distance from the filter's kernel to the nearest
    kernel of a kept filter.

    Args:
        kernels: per layer (P, n_out, d) floating point, the kernels of P input channels, or None.
        kept: (T,) bool; at least one filter in every layer that is not None.
    Returns:
        (T,) float64; 0 in layers that are None, and for kept filters.
    """
    found: list[Tensor] = []
    for points, own in zip(kernels, pool.split(kept), strict=True):
        square = torch.zeros_like(own, dtype=torch.float64)
        if points is not None:
            for some in points.double().split(max(1, _PAIRS // len(own) ** 2)):
                apart = torch.cdist(some, some, compute_mode="donot_use_mm_for_euclid_dist")
                square += apart.masked_fill(~own, torch.inf).amin(2).square().sum(0)
        found.append(square.sqrt())
    return torch.cat(found)


def draw(residual: Tensor, kept: Tensor, width: Tensor, bits: Tensor, pool: Pool) -> Tensor:
    """Return the active filters (T,) bool: the kept ones, and those that are drawn to come back.

    In every layer as many filters as it lacks are drawn from those that are not kept, without replacement, with
    probability softmax(residual): those with the largest log-probability + Gumbel noise.

    Args:
        residual: (T,) float64: residual norms, or what another rule has in their place.
        kept: (T,) bool.
        width: (L,) int64, how many filters every layer is to have.
        bits: (T,) int64 random bits in [0, 2^32), counter-based: the same on every device and in every process.
    """
    uniform = (bits.double() + 0.5) / 2**32
    score = (residual - torch.log(-torch.log(uniform))).masked_fill(kept, -torch.inf)
    lacking = (width - pool.count(kept)).clamp_min(0)
    return kept | (pool.descending(score) < lacking[pool.layer])
