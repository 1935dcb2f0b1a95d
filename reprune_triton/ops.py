"""The operations of one pruning event: ward, cut, cover; ward_network and cluster_network for all layers at once.

And `masked_conv2d`, what training on the active channels consists of.

This is where input is checked and where an implementation is chosen. What the operations compute is defined by
`reprune_triton.reference`; every implementation must give the same answer.

Park et al., "REPrune: Channel Pruning via Kernel Representative Selection", AAAI 2024 (arXiv:2402.17862).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reprune_triton import availability, reference
from reprune_triton.conv import masked_conv2d as masked_conv2d
from reprune_triton.errors import RepruneError
from reprune_triton.pool import Pool
from reprune_triton.reference import LINKAGES, TIES

IMPLS = ("auto", "reference", "triton")
ALGORITHMS = ("auto", "chain", "reciprocal")
MAX_FILTERS = 1 << reference.INDEX_BITS  # the sort key of `cover` has this many bits for the index
_MAX_CHANNELS = 1 << (63 - reference.INDEX_BITS - reference.TIE_BITS)  # ... and for the gain
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_SAFE_EXPONENTS = {torch.float32: (-40, 50), torch.float64: (-400, 400)}  # of max|x|: squares stay normal numbers


class Layer(NamedTuple):
    """A conv weight whose kernels are to be clustered, one problem for every active input channel."""

    weight: Tensor  # (n_out, n_in, kh, kw), any strides
    filters: Tensor | None = None  # (n,) the active filters; None: all
    inputs: Tensor | None = None  # (P,) the active input channels; None: all
    name: str = "weight"  # for messages

    @property
    def n_out(self) -> int:
        """All filters, active or not."""
        return self.weight.shape[0]

    @property
    def n(self) -> int:
        """Points of every problem: active filters."""
        return (self.weight if self.filters is None else self.filters).shape[0]

    @property
    def columns(self) -> int:
        """Problems: active input channels."""
        return self.weight.shape[1] if self.inputs is None else self.inputs.shape[0]

    @property
    def d(self) -> int:
        """Dimensions of the points: kh * kw."""
        return self.weight.shape[2] * self.weight.shape[3]

    def points(self) -> Tensor:
        """The clustering problems, copied if only some are active: (P, n, d)."""
        weight = self.weight.detach()
        if self.filters is not None:
            weight = weight[self.filters]
        if self.inputs is not None:
            weight = weight[:, self.inputs]
        return kernel_points(weight)

    def rows(self) -> Tensor:
        """All filters over the active input channels, one a row, copied if only some are active: (n_out, m)."""
        weight = self.weight.detach()
        return (weight if self.inputs is None else weight.index_select(1, self.inputs)).flatten(1)


class Merges(NamedTuple):
    """Dendrograms of P problems of n points, as absorption forests.

    Each merge kills one representative j, the higher of the two: parent[j] = i < j, at height[j]. The root has
    parent[r] = r = 0 and height +inf. Heights never decrease along a path to the root.
    """

    parent: Tensor  # (P, n) int32
    height: Tensor  # (P, n) float32, or float64 for float64 points; I for ward, Euclidean distance for the others
    linkage: str
    scale: float = 1.0  # true height = height * scale; a power of two, 1 unless the points are tiny or huge

    def problems(self, start: int, stop: int) -> Merges:
        """The problems start .. stop - 1, for layers that were clustered in one call."""
        return self._replace(parent=self.parent[start:stop], height=self.height[start:stop])

    def to_scipy(self) -> np.ndarray:
        """SciPy's linkage matrices, (P, n - 1, 4) float64, with SciPy's heights (ward: sqrt(2 I)).

        Merges of exactly equal height are ordered so that the matrix is valid; SciPy may order them otherwise.
        """
        parent = self.parent.long().cpu().numpy()
        height = self.height.double().cpu().numpy()
        P, n = parent.shape
        problem = np.arange(P)
        depth, above = np.zeros_like(parent), parent  # hops to the root
        for _ in range(n):
            depth, above = depth + (above != 0), np.take_along_axis(parent, above, 1)
            if not above.any():
                break
        else:
            raise RepruneError("these parents do not lead to point 0: the dendrograms are not complete.")
        order = np.lexsort((-depth, height), axis=1)  # of equal heights the deeper goes first: children before parents
        name, size = np.tile(np.arange(n), (P, 1)), np.ones_like(parent)
        Z = np.empty((P, n - 1, 4))
        for t in range(n - 1):
            j = order[:, t]
            i = parent[problem, j]
            a, b = name[problem, i], name[problem, j]
            size[problem, i] += size[problem, j]
            Z[:, t, 0], Z[:, t, 1] = np.minimum(a, b), np.maximum(a, b)
            Z[:, t, 2], Z[:, t, 3] = height[problem, j], size[problem, i]
            name[problem, i] = n + t
        if self.linkage == "ward":
            Z[:, :, 2] = np.sqrt(2 * Z[:, :, 2]) * math.sqrt(self.scale)
        else:
            Z[:, :, 2] *= self.scale
        return Z


class Clusters(NamedTuple):
    """What the cut leaves of every problem."""

    labels: Tensor  # (P, n) int32: equal label = same cluster; numbered from 0 by the lowest member
    h: float  # height of the cut, in true units (I for ward)


class Cover(NamedTuple):
    """The filters that greedy maximum coverage takes."""

    order: Tensor  # (keep,) int32, in order of choice
    gains: Tensor  # (keep,) int32, clusters each filter was the first to cover; never rises
    covered: int  # clusters covered by the chosen filters
    clusters: int  # clusters of all channels

    @property
    def coverage(self) -> float:
        """Coverage rate: covered clusters / all clusters (paper, Fig. 3)."""
        return self.covered / self.clusters


def keep_count(n: int, sparsity: float | str | Fraction) -> int:
    """n - ceil(sparsity * n), in exact integers, with the sparsity read as the decimal that was typed.

    Floats misround: 1 - 0.9 is a little under 0.1, and 0.07 * 100 is a little over 7.
    """
    try:
        exact = Fraction(str(sparsity))
    except ValueError as error:
        raise RepruneError(f"sparsity is {sparsity!r}; it must be a number like 0.5.") from error
    if not 0 <= exact < 1:
        raise RepruneError(f"sparsity is {sparsity}; it must be at least 0 and less than 1.")
    return n - math.ceil(exact * n)


def kernel_points(weight: Tensor) -> Tensor:
    """The clustering problems of a conv weight (n_out, n_in, kh, kw): points (n_in, n_out, kh * kw)."""
    if weight.dim() != 4:
        raise RepruneError(f"weight has shape {tuple(weight.shape)}; it must be (n_out, n_in, kh, kw).")
    return weight.detach().flatten(2).transpose(0, 1)


def filter_norms(weight: Tensor) -> Tensor:
    """L2 norm of every filter of a conv weight (n_out, n_in, kh, kw): (n_out,) float64, the score of tie="norm"."""
    return weight.detach().flatten(1).double().norm(dim=1)


def scale_of(points: Tensor) -> int:
    """e such that `ward` works on points * 2^-e. It is 0 unless max|x| is so tiny or huge that squares would leave
    the normal range. Layers may share one call of `ward` when n, d and this exponent are equal.
    """
    largest = points.detach().abs().max().to(torch.float64).item() if points.numel() else 0.0
    low, high = _SAFE_EXPONENTS[working_dtype(points)]
    exponent = math.frexp(largest)[1]
    return 0 if largest == 0 or not math.isfinite(largest) or low <= exponent <= high else exponent


def ward(points: Tensor, linkage: str = "ward", impl: str = "auto", algorithm: str = "auto") -> Merges:
    """Agglomerative clustering of P problems at once: `ward_network` for one layer.

    points: (P, n, d) floating point. Heights are float64 for float64 points, float32 for all others.
    """
    if points.dim() != 3:
        raise RepruneError(f"points have shape {tuple(points.shape)}; they must be (problems, points, dimensions).")
    layer = Layer(points.transpose(0, 1).unsqueeze(2), name="points")
    return ward_network([layer], linkage, impl, algorithm)[0]


def ward_network(
    layers: Sequence[Layer], linkage: str = "ward", impl: str = "auto", algorithm: str = "auto"
) -> list[Merges]:
    """Agglomerative clustering of all kernels of a network: one problem per layer and active input channel.

    linkage: "ward" (heights in I(A, B) = |A||B| / (|A| + |B|) * ||m_A - m_B||^2, the growth of the within-cluster SSE;
    SciPy's is sqrt(2 I)), or "single", "complete", "average" (Euclidean distance).
    impl: "auto" is Triton for weights on a GPU in float32, float16 or bfloat16 (at most 4096 filters of 121 numbers),
    else the plain reference. The reference computes in float64, Triton in float32: where two merges are closer than
    float32 can tell, they may take the other one.
    algorithm, of Triton only: "chain" (nearest-neighbour chain) or "reciprocal" (all reciprocal nearest neighbours at
    once, Ward only); "auto" is the quicker one for the size. For 1x1 kernels and Ward, "auto" sorts instead.
    The device is waited for once.
    Raises RepruneError, with the name of the layer, for weights that are not finite, and for shapes, names or an impl
    that do not fit.
    """
    return [merges for merges, _ in _network(layers, None, linkage, impl, algorithm)]


def cluster_network(
    layers: Sequence[Layer], keeps: Sequence[int], linkage: str = "ward", impl: str = "auto", algorithm: str = "auto"
) -> list[tuple[Merges, Clusters]]:
    """`ward_network` and then `cut`, each layer to at most keeps[l] clusters, still waiting for the device once."""
    if len(keeps) != len(layers):
        raise RepruneError(f"there are {len(layers)} layers and {len(keeps)} numbers to keep; give one for each.")
    return [(merges, clusters) for merges, clusters in _network(layers, keeps, linkage, impl, algorithm) if clusters]


def cut(merges: Merges, keep: int, impl: str = "auto") -> Clusters:
    """Cut all problems of one layer at the lowest height that leaves each at most `keep` clusters.

    With c = n - keep: h is the largest, over the problems, of the c-th smallest height; merges up to h (included)
    happen. With c = 0 nothing merges: every kernel is its own cluster and h = 0.
    """
    _check_keep(keep, merges.parent.shape[1])
    if _cut_by_triton(merges, impl):
        from reprune_triton.kernels import launch

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
    """Greedily take `keep` filters, each time the one that covers most clusters not covered yet.

    labels: (n_in, n_out) integer; filter i covers cluster labels[j, i] of channel j. At most 4096 filters.
    tie: which of the filters with equal gain goes first. "random": uniform, with bits that depend only on
    (seed, step, filter), the same for every impl; "index": the lowest; "norm" and "gamma": the largest score (n_out,),
    then the lowest.
    Once everything is covered the remaining filters all tie, at gain 0.
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
    if tie in ("norm", "gamma"):
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
    from reprune_triton.kernels import launch

    value, order = labels.sort(dim=1, stable=True)
    number = torch.nn.functional.pad((value[:, 1:] != value[:, :-1]).long().cumsum(1), (1, 0))  # from 0, any integers
    levels = None if tie == "random" else torch.zeros(n_out, dtype=torch.int32, device=labels.device)
    if score is not None and tie in ("norm", "gamma"):
        levels = Pool([n_out], labels.device).levels(score)
    found = launch.cover_layer(torch.empty_like(number).scatter_(1, order, number).int(), keep, seed, levels)
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

    score is needed for tie="gamma" (|gamma| of the BatchNorm that follows); for "norm" it is computed.
    """
    kernel_points(weight)  # refuses other shapes
    if len(weight) == 0:
        raise RepruneError("weight has no filters; there is nothing to select.")
    if tie == "norm" and score is None:
        score = filter_norms(weight)
    ((_, clusters),) = cluster_network([Layer(weight)], [keep], linkage, impl)
    return cover(clusters.labels, keep, tie, seed, impl, score), clusters


def _network(
    layers: Sequence[Layer], keeps: Sequence[int] | None, linkage: str, impl: str, algorithm: str
) -> list[tuple[Merges, Clusters | None]]:
    """Merges of every layer, and its clusters if keeps are given."""
    from reprune_triton import steps

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
            some.level(torch.tensor([keeps[i] for i in numbers], dtype=torch.int32, device=device))
            labels = some.labels()
        for number, result in zip(numbers, some.results(labels), strict=True):
            found[number] = result
    return found


def grouped(layers: Sequence[Layer], impl: str) -> dict[tuple[bool, torch.device], list[int]]:
    """Layer numbers by what works on them (Triton? else the reference), and where."""
    parts: dict[tuple[bool, torch.device], list[int]] = {}
    for number, layer in enumerate(layers):
        parts.setdefault((uses_triton(layer, impl), layer.weight.device), []).append(number)
    return parts


def uses_triton(layer: Layer, impl: str) -> bool:
    """Does Triton cluster this layer, or the reference? The one asked for, never another one in silence.

    Raises RepruneError for impl="triton" where the kernels cannot run.
    """
    if impl == "reference" or (impl == "auto" and layer.weight.device.type != "cuda"):
        return False
    reason = availability.why_not(layer.weight.device)
    if reason is None:
        from reprune_triton.kernels import launch

        reason = launch.why_not(layer)
    if reason and impl == "triton":
        message = f'impl="triton" cannot cluster {layer.name}: {reason}. Or use impl="auto" or "reference".'
        raise availability.refusal(message, layer.weight.device)
    return not reason


def _cut_by_triton(merges: Merges, impl: str) -> bool:
    _one_of("impl", impl, IMPLS)
    if impl == "reference" or (impl == "auto" and merges.parent.device.type != "cuda"):
        return False
    like = Layer(merges.height[:, :, None, None].transpose(0, 1), name="the dendrogram")
    return uses_triton(like, impl)


def checked(layer: Layer) -> Layer:
    """The layer with int64 index lists, if it can be clustered at all."""
    weight, name = layer.weight, layer.name
    if weight.dim() != 4:
        raise RepruneError(f"{name} has shape {tuple(weight.shape)}; it must be (n_out, n_in, kh, kw).")
    for what, index in (("filters", layer.filters), ("inputs", layer.inputs)):
        if index is not None and (not isinstance(index, Tensor) or index.dim() != 1 or index.dtype not in _INTEGERS):
            raise RepruneError(
                f"{name}: {what} must be a tensor of indices, one-dimensional and of integers "
                "(of a mask: mask.nonzero().squeeze(1))."
            )
    if 0 in (layer.n, layer.columns, layer.d):
        raise RepruneError(f"{name} has {layer.n} filters, {layer.columns} inputs and kernels of {layer.d} numbers; "
                           "at least one of each is needed to cluster.")  # fmt: skip
    working_dtype(weight, name)
    indices = [i if i is None else i.to(weight.device, torch.int64).contiguous() for i in (layer.filters, layer.inputs)]
    layer = Layer(weight.detach(), indices[0], indices[1], name)
    if weight.device.type == "cpu":
        check_indices(layer)  # on a GPU the kernels do it
    return layer


def check_indices(layer: Layer) -> None:
    for what, index, size in zip(("filters", "inputs"), layer[1:3], layer.weight.shape, strict=False):
        if index is not None and not ((index >= 0) & (index < size)).all():
            raise RepruneError(f"{layer.name}: {what} has an index outside 0 .. {size - 1}.")


def check_finite(name: str, points: Tensor) -> None:
    finite = points.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        bad = (~finite).nonzero().squeeze(1)
        raise RepruneError(
            f"{name} has NaN or infinity in problem {int(bad[0])} ({len(bad)} of {len(points)} problems). "
            "Look for a diverged layer: lower the learning rate or load an earlier checkpoint."
        )


def working_dtype(points: Tensor, name: str = "points") -> torch.dtype:
    if not points.dtype.is_floating_point:
        raise RepruneError(f"{name}: the type is {points.dtype}; convert to a floating-point type first.")
    return torch.float64 if points.dtype == torch.float64 else torch.float32


def _check_keep(keep: int, n: int) -> None:
    if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= n:
        raise RepruneError(f"keep is {keep}; it must be a whole number from 1 to {n}, the number of filters.")


def _one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise RepruneError(f"{name} is {value!r}; it must be one of {', '.join(valid)}.")
