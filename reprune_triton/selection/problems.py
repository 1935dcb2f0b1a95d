"""Clustering problems and their results, with checks of layers, and who clusters them.

    Layer -> P problems of n points -> Merges -> Clusters
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reprune_triton import availability
from reprune_triton.errors import RepruneError

IMPLS = ("auto", "reference", "triton")
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
        """Number of filters, active or not."""
        return self.weight.shape[0]

    @property
    def n(self) -> int:
        """Number of points in every problem: active filters."""
        return (self.weight if self.filters is None else self.filters).shape[0]

    @property
    def problems(self) -> int:
        """Number of problems, P: active input channels."""
        return self.weight.shape[1] if self.inputs is None else self.inputs.shape[0]

    @property
    def d(self) -> int:
        """Dimension of the points: kh * kw."""
        return self.weight.shape[2] * self.weight.shape[3]

    def points(self) -> Tensor:
        """Return the points of all problems (P, n, d): a copy if only some channels are active."""
        weight = self.weight.detach()
        if self.filters is not None:
            weight = weight[self.filters]
        if self.inputs is not None:
            weight = weight[:, self.inputs]
        return kernel_points(weight)

    def rows(self) -> Tensor:
        """Return all filters over the active input channels, one a row (n_out, P d): a copy if only some are active."""
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
        """Return the merges of problems start .. stop - 1 alone."""
        return self._replace(parent=self.parent[start:stop], height=self.height[start:stop])

    def to_scipy(self) -> np.ndarray:
        """Return SciPy's linkage matrices, (P, n - 1, 4) float64, with SciPy's heights (ward: sqrt(2 I)).

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
    """The clusters of every problem of a layer at the cut."""

    labels: Tensor  # (P, n) int32: equal label = same cluster; numbered from 0 by the lowest member
    h: float  # cut height, in true units (I for ward)


def kernel_points(weight: Tensor) -> Tensor:
    """Return the points (n_in, n_out, kh * kw) of all problems of a conv weight (n_out, n_in, kh, kw)."""
    if weight.dim() != 4:
        raise RepruneError(f"weight has shape {tuple(weight.shape)}; it must be (n_out, n_in, kh, kw).")
    return weight.detach().flatten(2).transpose(0, 1)


def grouped(layers: Sequence[Layer], impl: str) -> dict[tuple[bool, torch.device], list[int]]:
    """Group the layers' numbers by (whether Triton works on them, their device)."""
    parts: dict[tuple[bool, torch.device], list[int]] = {}
    for number, layer in enumerate(layers):
        parts.setdefault((uses_triton(layer, impl), layer.weight.device), []).append(number)
    return parts


def uses_triton(layer: Layer, impl: str) -> bool:
    """Whether Triton clusters this layer; the reference does otherwise. impl="auto" alone leaves the choice.

    Raises:
        RepruneError: for impl="triton" where the kernels cannot run.
    """
    if impl == "reference" or (impl == "auto" and layer.weight.device.type != "cuda"):
        return False
    reason = availability.why_not(layer.weight.device)
    if reason is None:
        from reprune_triton.kernels.clustering import launch

        reason = launch.why_not(layer)
    if reason and impl == "triton":
        message = f'impl="triton" cannot cluster {layer.name}: {reason}. Or use impl="auto" or "reference".'
        raise availability.refusal(message, layer.weight.device)
    return not reason


def checked(layer: Layer) -> Layer:
    """Return the layer with its index lists in int64.

    Raises:
        RepruneError: if it cannot be clustered.
    """
    weight, name = layer.weight, layer.name
    if weight.dim() != 4:
        raise RepruneError(f"{name} has shape {tuple(weight.shape)}; it must be (n_out, n_in, kh, kw).")
    for what, index in (("filters", layer.filters), ("inputs", layer.inputs)):
        if index is not None and (not isinstance(index, Tensor) or index.dim() != 1 or index.dtype not in _INTEGERS):
            raise RepruneError(
                f"{name}: {what} must be a tensor of indices, one-dimensional and of integers "
                "(of a mask: mask.nonzero().squeeze(1))."
            )
    if 0 in (layer.n, layer.problems, layer.d):
        raise RepruneError(f"{name} has {layer.n} filters, {layer.problems} inputs and kernels of {layer.d} numbers; "
                           "at least one of each is needed to cluster.")  # fmt: skip
    working_dtype(weight, name)
    indices = [i if i is None else i.to(weight.device, torch.int64).contiguous() for i in (layer.filters, layer.inputs)]
    layer = Layer(weight.detach(), indices[0], indices[1], name)
    if weight.device.type == "cpu":
        check_indices(layer)  # on a GPU the kernels do it
    return layer


def check_indices(layer: Layer) -> None:
    """Raise RepruneError if an index is out of range; waits for the device."""
    for what, index, size in zip(("filters", "inputs"), layer[1:3], layer.weight.shape, strict=False):
        if index is not None and not ((index >= 0) & (index < size)).all():
            raise RepruneError(f"{layer.name}: {what} has an index outside 0 .. {size - 1}.")


def check_finite(name: str, points: Tensor) -> None:
    """Raise RepruneError if points (P, n, d) hold NaN or infinity; waits for the device."""
    finite = points.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        bad = (~finite).nonzero().squeeze(1)
        raise RepruneError(
            f"{name} has NaN or infinity in problem {int(bad[0])} ({len(bad)} of {len(points)} problems). "
            "Look for a diverged layer: lower the learning rate or load an earlier checkpoint."
        )


def working_dtype(points: Tensor, name: str = "points") -> torch.dtype:
    """Return the dtype of the heights: float64 for float64 points, float32 for the other floating-point types."""
    if not points.dtype.is_floating_point:
        raise RepruneError(f"{name}: the type is {points.dtype}; convert to a floating-point type first.")
    return torch.float64 if points.dtype == torch.float64 else torch.float32


def scale_of(points: Tensor) -> int:
    """Return the exponent e by which points are scaled to points * 2^-e before they are clustered.

    It is 0 unless max|x| is so tiny or huge that squares would leave the normal range.
    """
    largest = points.detach().abs().max().to(torch.float64).item() if points.numel() else 0.0
    low, high = _SAFE_EXPONENTS[working_dtype(points)]
    exponent = math.frexp(largest)[1]
    return 0 if largest == 0 or not math.isfinite(largest) or low <= exponent <= high else exponent
