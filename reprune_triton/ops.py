"""The functional core: clustering, cut and coverage of one layer or of a network, and convolution on active channels.

    ward, ward_network          kernels -> merges
    cut, cluster_network        merges -> clusters
    cover, select_filters       clusters -> kept filters
    masked_conv2d               a training step on the kept filters alone

Here input is checked and an implementation is chosen. `reprune_triton.selection.definition` defines what the first six
compute; all implementations give the same answer, but for merges that only rounding tells apart.

Park et al., "REPrune: Channel Pruning via Kernel Representative Selection", AAAI 2024 (arXiv:2402.17862).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reprune_triton.errors import RepruneError
from reprune_triton.fused import conv
from reprune_triton.running.layers import gather
from reprune_triton.selection import reference, steps
from reprune_triton.selection.pool import Pool
from reprune_triton.selection.problems import (
    IMPLS,
    Clusters,
    Layer,
    Merges,
    checked,
    grouped,
    kernel_points,
    uses_triton,
)
from reprune_triton.selection.reference import LINKAGES, SCORED, TIES
from reprune_triton.selection.widths import keep_count

__all__ = [
    "ALGORITHMS", "IMPLS", "LINKAGES", "MAX_FILTERS", "TIES", "Clusters", "Cover", "Layer", "Merges", "cluster_network",
    "cover", "cut", "filter_norms", "keep_count", "kernel_points", "masked_conv2d", "select_filters", "ward",
    "ward_network",
]
ALGORITHMS = ("auto", "chain", "reciprocal")
MAX_FILTERS = 1 << reference.INDEX_BITS  # an index must fit into its bits of the sort key of `cover`
_MAX_CHANNELS = 1 << (63 - reference.INDEX_BITS - reference.TIE_BITS)  # ... and so must a gain


class Cover(NamedTuple):
    """The filters that greedy maximum coverage takes."""

    order: Tensor  # (keep,) int32, the kept filters in order of choice
    gains: Tensor  # (keep,) int32, clusters that each filter was the first to cover; never rises
    covered: int  # clusters that kept filters cover
    clusters: int  # clusters of all channels

    @property
    def coverage(self) -> float:
        """The share of clusters that is covered (paper, Fig. 3)."""
        return self.covered / self.clusters


def filter_norms(weight: Tensor) -> Tensor:
    """Return the L2 norm of every filter of a conv weight (n_out, n_in, kh, kw): (n_out,) float64.

    It is the score of tie="norm".
    """
    return weight.detach().flatten(1).double().norm(dim=1)


def ward(points: Tensor, linkage: str = "ward", impl: str = "auto", algorithm: str = "auto") -> Merges:
    """Cluster P problems at once: `ward_network` for one layer.

    Args:
        points: (P, n, d) floating point. Heights are float64 for float64 points, float32 for all others.
        linkage, impl, algorithm: see `ward_network`.
    Raises:
        RepruneError: as `ward_network` does, and for points of another shape.
    """
    if points.dim() != 3:
        raise RepruneError(f"points have shape {tuple(points.shape)}; they must be (problems, points, dimensions).")
    layer = Layer(points.transpose(0, 1).unsqueeze(2), name="points")
    return ward_network([layer], linkage, impl, algorithm)[0]


def ward_network(
    layers: Sequence[Layer], linkage: str = "ward", impl: str = "auto", algorithm: str = "auto"
) -> list[Merges]:
    """Cluster all kernels of a network: one problem per layer and active input channel. Waits for the device once.

    Args:
        layers: conv weights, of all filters and input channels or of the active ones.
        linkage: "ward": heights are I(A, B) = |A||B| / (|A| + |B|) * ||m_A - m_B||^2, the growth of the within-cluster
            SSE (SciPy's are sqrt(2 I)). "single", "complete", "average": heights are Euclidean distances.
        impl: "reference", "triton", or "auto": Triton for weights on a GPU in float32, float16 or bfloat16 (at most
            4096 filters of 121 numbers), else the reference. The reference computes in float64, Triton in float32: it
            may merge another pair if float32 cannot tell the two heights apart.
        algorithm: of Triton. "chain": nearest-neighbour chain. "reciprocal": all reciprocal nearest neighbours at once,
            Ward only. "auto": the quicker one for the size; for 1x1 kernels and Ward it sorts instead.
    Returns:
        The merges of every layer.
    Raises:
        RepruneError: with the name of the layer for weights that are not finite or have another shape; for an unknown
            linkage, impl or algorithm, or one that cannot be used here.
    """
    return [merges for merges, _ in _network(layers, None, linkage, impl, algorithm)]


def cluster_network(
    layers: Sequence[Layer], keeps: Sequence[int], linkage: str = "ward", impl: str = "auto", algorithm: str = "auto"
) -> list[tuple[Merges, Clusters]]:
    """Do `ward_network` and then `cut`, layer l to at most keeps[l] clusters. Waits for the device once.

    Raises:
        RepruneError: as `ward_network` and `cut` do, and if there is not one number for each layer.
    """
    if len(keeps) != len(layers):
        raise RepruneError(f"there are {len(layers)} layers and {len(keeps)} numbers to keep; give one for each.")
    return [(merges, clusters) for merges, clusters in _network(layers, keeps, linkage, impl, algorithm) if clusters]


def cut(merges: Merges, keep: int, impl: str = "auto") -> Clusters:
    """Cut all problems of one layer at the lowest height that leaves each at most `keep` clusters.

    With c = n - keep, the cut height h is the largest, over the problems, of the c-th smallest merge height. Merges of
    height <= h happen. With c = 0 nothing merges: every kernel is its own cluster, and h = 0.

    Raises:
        RepruneError: if keep is not in 1 .. n, or for an impl that is unknown or cannot run.
    """
    _check_keep(keep, merges.parent.shape[1])
    if _cut_by_triton(merges, impl):
        from reprune_triton.kernels.clustering import launch

        labels, h = launch.cut_layer(merges.parent, merges.height, keep)
    else:
        labels, h = reference.cut(merges.parent, merges.height, keep)
        labels = labels.to(torch.int32)
    return Clusters(labels, h * merges.scale)


def cover(
    labels: Tensor,
    keep: int,
    tie: str = "random",
    seed: int = 0,
    impl: str = "auto",
    score: Tensor | None = None,
) -> Cover:
    """Greedily take `keep` filters, each time the one that covers the most clusters not covered yet.

    Once everything is covered the remaining filters all tie, at gain 0.

    Args:
        labels: (n_in, n_out) integer; filter i covers cluster labels[j, i] of channel j. At most 4096 filters.
        tie: which of the filters with equal gain goes first. "random": any, by bits that depend only on (seed, step,
            filter), the same for every impl. "index": the lowest. "norm" and "gamma": the one with the largest score,
            then the lowest.
        score: (n_out,), for tie="norm" and "gamma".
    Raises:
        RepruneError: for labels of another shape or dtype, too many filters or channels, a keep out of range, a missing
            score or one that is not finite, an unknown tie, or an impl that is unknown or cannot run.
    """
    _one_of("tie", tie, TIES)
    if labels.dim() != 2 or 0 in labels.shape:
        raise RepruneError(f"labels have shape {tuple(labels.shape)}; they must be (input channels, filters).")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise RepruneError(f"labels are {labels.dtype}; they must be integers, as `cut` gives them.")
    n_in, n_out = labels.shape
    if n_out > MAX_FILTERS or n_in >= _MAX_CHANNELS:
        raise RepruneError(
            f"labels have {n_out} filters and {n_in} channels; at most {MAX_FILTERS} filters and "
            f"{_MAX_CHANNELS - 1} channels fit in the sort key. Leave this layer out of pruning."
        )
    _check_keep(keep, n_out)
    if tie in SCORED:
        if score is None:
            raise RepruneError(f'tie="{tie}" needs score, one number per filter; pass it or use tie="random".')
        if score.shape != (n_out,):
            raise RepruneError(f"score has shape {tuple(score.shape)}; it must be ({n_out},), one number per filter.")
        if not score.isfinite().all():
            raise RepruneError("score has NaN or infinity; the layer has diverged.")
        score = score.detach().to(labels.device)
    _one_of("impl", impl, IMPLS)
    if not uses_triton(Layer(torch.empty(1, device=labels.device).expand(n_out, n_in, 1, 1), name="labels"), impl):
        order, gains, covered, clusters = reference.cover(labels, keep, tie, seed, score)
        return Cover(order.to(torch.int32), gains.to(torch.int32), covered, clusters)
    from reprune_triton.kernels.clustering import launch

    value, member = labels.sort(dim=1, stable=True)
    number = torch.nn.functional.pad((value[:, 1:] != value[:, :-1]).long().cumsum(1), (1, 0))  # from 0, any integers
    ranked = None if tie == "random" else torch.zeros(n_out, dtype=torch.int32, device=labels.device)
    if score is not None and tie in SCORED:
        ranked = Pool([n_out], labels.device).ranked(score)
    found = launch.cover_layer(torch.empty_like(number).scatter_(1, member, number).int(), keep, seed, ranked)
    covered, clusters = found.totals[0].tolist()
    return Cover(found.order[:keep], found.gains[:keep], covered, clusters)


def select_filters(
    weight: Tensor,
    keep: int,
    *,
    linkage: str = "ward",
    tie: str = "random",
    seed: int = 0,
    impl: str = "auto",
    score: Tensor | None = None,
) -> tuple[Cover, Clusters]:
    """Choose `keep` filters of one conv weight (n_out, n_in, kh, kw): cluster, cut and cover.

    score: (n_out,), needed for tie="gamma" (|gamma| of the BatchNorm that follows); for "norm" it is computed.

    Raises:
        RepruneError: as `cluster_network` and `cover` do, and for a weight of another shape or without filters.
    """
    kernel_points(weight)  # refuses other shapes
    if len(weight) == 0:
        raise RepruneError("weight has no filters; there is nothing to select.")
    if tie == "norm" and score is None:
        score = filter_norms(weight)
    ((_, clusters),) = cluster_network([Layer(weight)], [keep], linkage, impl)
    return cover(clusters.labels, keep, tie, seed, impl, score), clusters


def masked_conv2d(
    x: Tensor, weight: Tensor, out_index: Tensor | None = None, in_index: Tensor | None = None, stride: conv.Size = 1,
    padding: conv.Size = 0, dilation: conv.Size = 1, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Return conv2d(x, weight[out_index][:, in_index]), differentiable in x and weight.

    This is a narrow conv in one call, for layers of your own. The pruner does it in two parts: it gathers the slices of
    all weights at once (`running.pack`), and each module convolves with its own (`fused.conv`).

    Args:
        x: (B, active inputs, H, W).
        weight: (n_out, n_in, kh, kw), the full shape. Its gradient is zero in rows and columns that are not active.
        out_index, in_index: the active output and input channels, sorted int64; None: all.
        stride, padding, dilation: a number, or two: for height and width.
        impl: "torch": PyTorch's convolution. "triton": the kernels. "auto": whichever is quicker on this GPU, torch
            wherever the kernels cannot run.
    Returns:
        (B, active outputs, P, Q); channels_last from the kernels. Under autocast it has autocast's dtype, as conv2d.
    Raises:
        RepruneError: for an unknown impl, channels that do not fit, or if impl="triton" cannot run.
    """
    cut = [(dim, index) for dim, index in enumerate((out_index, in_index)) if index is not None]
    y, _ = conv.norm_act_conv2d(x, gather(weight, cut), None, stride, padding, dilation, None, impl)
    return y


def _network(
    layers: Sequence[Layer], keeps: Sequence[int] | None, linkage: str, impl: str, algorithm: str
) -> list[tuple[Merges, Clusters | None]]:
    """Return the merges of every layer, and its clusters if keeps are given."""
    _one_of("linkage", linkage, LINKAGES)
    _one_of("impl", impl, IMPLS)
    _one_of("algorithm", algorithm, ALGORITHMS)
    if algorithm == "reciprocal" and linkage != "ward":
        raise RepruneError(f'algorithm="reciprocal" is for Ward; for linkage="{linkage}" use "auto" or "chain".')
    layers = [checked(layer) for layer in layers]
    for layer, keep in zip(layers, keeps or (), strict=keeps is not None):
        _check_keep(keep, layer.n)
    parts = grouped(layers, impl)
    if algorithm != "auto" and any(not by_triton for by_triton, _ in parts):
        raise RepruneError(f'algorithm="{algorithm}" is for impl="triton"; the reference has one algorithm.')
    found: list[tuple[Merges, Clusters | None]] = [None] * len(layers)  # type: ignore[list-item]
    for (by_triton, device), numbers in parts.items():
        work = steps.Work([layers[i] for i in numbers], linkage, algorithm)
        some = (steps.Triton if by_triton else steps.Reference)(work)
        some.cluster()
        labels = None
        if keeps is not None:
            some.cut(torch.tensor([keeps[i] for i in numbers], dtype=torch.int32, device=device))
            labels = some.labels()
        for number, result in zip(numbers, some.results(labels), strict=True):
            found[number] = result
    return found


def _cut_by_triton(merges: Merges, impl: str) -> bool:
    _one_of("impl", impl, IMPLS)
    if impl == "reference" or (impl == "auto" and merges.parent.device.type != "cuda"):
        return False
    like = Layer(merges.height[:, :, None, None].transpose(0, 1), name="the dendrogram")
    return uses_triton(like, impl)


def _check_keep(keep: int, n: int) -> None:
    if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= n:
        raise RepruneError(f"keep is {keep}; it must be a whole number from 1 to {n}, the number of filters.")


def _one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise RepruneError(f"{name} is {value!r}; it must be one of {', '.join(valid)}.")
