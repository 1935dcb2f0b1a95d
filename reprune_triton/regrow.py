"""Which pruned filters come back (SPEC, step 6; Hou et al., "CHEX", CVPR 2022)."""

import torch
from torch import Tensor

from .errors import RepruneError
from .rng import random_bits


def residual_norms(filters: Tensor, kept: Tensor) -> Tensor:
    """What the kept filters cannot express of each filter: the norm of w_i - projection of w_i on span{w_k : k kept}.

    Args:
        filters: (n, m) float, one filter a row.
        kept: (k,) int64.
    Returns:
        (n,) float64; 0 (up to rounding) for the kept filters.
    """
    rows = filters.double()
    basis = rows[kept]  # (k, m)
    # Eigenvectors of the small Gram matrix give an orthonormal basis of the span; dependent filters drop out with their
    # zero eigenvalues, which a QR decomposition would turn into arbitrary directions.
    values, vectors = torch.linalg.eigh(basis @ basis.T)
    good = values > values.max().clamp_min(0) * 1e-12
    span = (vectors[:, good] / values[good].sqrt()).T @ basis  # (r, m), orthonormal rows
    residual = rows - (rows @ span.T) @ span
    residual = residual - (residual @ span.T) @ span  # once more: the first pass leaves rounding of the large part
    return residual.norm(dim=1)


def regrow(filters: Tensor, kept: Tensor, count: int, seed: int) -> Tensor:
    """Draw `count` filters that are not kept, without replacement, with probability softmax(residual norm).

    Drawn as the `count` largest of log-probability + Gumbel noise, with counter-based random bits: the same seed gives
    the same filters on every device and rank.

    Args:
        filters: (n, m) float, every filter of the layer with the values it had when last active.
        kept: (k,) int64.
        count: in 0..n - k.
    Returns:
        (count,) int64, sorted.
    """
    n = len(filters)
    if not 0 <= count <= n - len(kept):
        raise RepruneError(f"cannot regrow {count} filters: {n - len(kept)} of {n} are not kept")
    if count == 0:
        return kept[:0]
    uniform = (random_bits(seed, 0, n, filters.device).double() + 0.5) / 2**32
    score = residual_norms(filters, kept) - torch.log(-torch.log(uniform))
    score[kept] = -torch.inf
    return score.topk(count).indices.sort().values
