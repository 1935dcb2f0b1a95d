"""Time SciPy and fastcluster, and check our clustering against theirs."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from reprune_triton import ops
from reprune_triton.errors import RepruneError

TOLERANCE = 1e-5  # float32 heights against float64 ones, relative to the largest
Peer = Callable[[np.ndarray], np.ndarray]  # points (n, d) -> linkage matrix
Result = tuple[ops.Merges, ops.Clusters]


class Doubts(NamedTuple):
    """Problems in which float32 and float64 may differ with both right."""

    near_ties: set[int]  # took another merge, just as cheap
    undecided: set[int]  # the merges before and after the cut are too close to tell apart


def find_peers(linkage: str) -> dict[str, Peer]:
    """Return the other libraries that are installed, each with its quickest function for this linkage."""
    peers: dict[str, Peer] = {}
    try:
        from scipy.cluster import hierarchy

        peers["SciPy"] = lambda points: hierarchy.linkage(points, linkage)
    except ImportError:
        pass
    try:
        import fastcluster

        vector = linkage in ("ward", "single")  # the others need the distance matrix
        function = fastcluster.linkage_vector if vector else fastcluster.linkage
        peers["fastcluster"] = lambda points: function(points, linkage)
    except ImportError:
        pass
    return peers


class Peers:
    """The other libraries that are installed, their times for each layer and their results.

    They cluster all channels of a layer, or `--channels` that are drawn.
    """

    def __init__(self, layers: list[ops.Layer], args: argparse.Namespace):
        peers = find_peers(args.linkage)
        self.names, self.doubts = list(peers), Doubts(set(), set())
        self._first: dict[str, int] = {}  # the number of a layer's first problem in the network
        self._chosen: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # channels, and their points, of each layer
        self._theirs: dict[tuple[str, str], list[np.ndarray]] = {}  # linkage matrices, by layer and peer
        self._spent: dict[tuple[str, str], float] = {}
        random, first = np.random.default_rng(args.seed), 0
        for layer in layers:
            sampled = layer.problems if args.channels is None else min(args.channels, layer.problems)
            chosen = np.sort(random.choice(layer.problems, sampled, replace=False))
            points = layer.points()[torch.from_numpy(chosen).to(layer.weight.device)].double().cpu().numpy()
            self._first[layer.name], self._chosen[layer.name] = first, (chosen, points)
            first += layer.problems
            for name, peer in peers.items():
                started = time.perf_counter()
                self._theirs[layer.name, name] = [peer(x) for x in points]
                self._spent[layer.name, name] = (time.perf_counter() - started) * layer.problems / sampled

    def check(self, results: Mapping[str, Result]) -> None:
        """Raise where these results, by layer, are not theirs; see `check_same`."""
        for layer, result in results.items():
            chosen, points = self._chosen[layer]
            for name in self.names:
                doubts = check_same(f"{layer}, {name}", points, self._theirs[layer, name], chosen, *result)
                for numbers, more in zip(self.doubts, doubts, strict=True):
                    numbers.update(self._first[layer] + channel for channel in more)

    def seconds(self, layers: Sequence[ops.Layer]) -> dict[str, float]:
        """Return the seconds of each library for these layers."""
        return {
            f"{name.lower()}_s": sum(self._spent[layer.name, name] for layer in layers) for name in self.names
        }


def check_same(
    where: str, points: np.ndarray, theirs: Sequence[np.ndarray], chosen: np.ndarray, merges: ops.Merges,
    clusters: ops.Clusters,
) -> Doubts:  # fmt: skip
    """Compare the heights, and the clusters at the cut, of the channels `chosen`; raise where they differ.

    points (len(chosen), n, d) and theirs, linkage matrices, are those channels'. The cut is taken after as many merges
    in theirs as in ours.
    """
    index = torch.from_numpy(chosen).to(merges.parent.device)
    merges = merges._replace(parent=merges.parent[index].cpu(), height=merges.height[index].cpu())
    happened = (merges.height.double() * merges.scale <= clusters.h).sum(dim=1).tolist() if clusters.h else None
    labels = clusters.labels[index].cpu().numpy()
    if not (merges.parent[:, 1:] < torch.arange(1, merges.parent.shape[1])).all() or merges.parent[:, 0].any():
        raise RepruneError(f"{where}: the merges are no forest; no times are shown.")
    doubts = Doubts(set(), set())
    for number, (channel, Z, ours) in enumerate(zip(chosen.tolist(), theirs, merges.to_scipy(), strict=True)):
        if not len(Z):
            continue
        slack, k = TOLERANCE * Z[-1, 2], happened[number] if happened else 0
        if not same_partition(after(ours, k), labels[number]):
            raise RepruneError(f"{where}, channel {channel}: the cut is not that of the merges; no times are shown.")
        wrong = np.abs(Z[:, 2] - ours[:, 2]).max()
        difference = f"merge heights differ by {wrong:.2e}" if not wrong <= slack else ""
        if not difference and not same_partition(after(Z, k), labels[number]):
            if 0 < k < len(Z) and Z[k, 2] - Z[k - 1, 2] <= 2 * slack:
                doubts.undecided.add(channel)
                continue
            difference = "other clusters at the cut"
        if difference:
            objection = replay(points[number], ours, merges.linkage)
            if objection:
                raise RepruneError(f"{where}, channel {channel}: {difference}, and {objection}; no times are shown.")
            doubts.near_ties.add(channel)
    return doubts


def replay(points: np.ndarray, Z: np.ndarray, linkage: str) -> str | None:
    """Carry out the merges of a linkage matrix in float64; return what is wrong with them, or None.

    Each merge must cost what it says, and no open merge be cheaper, but for the rounding of float32. All costs are
    held, and with each cluster its cheapest merge, so that a merge takes a few passes over one row.
    """
    n = len(points)
    slack = TOLERANCE * np.abs(Z[:, 2]).max()
    mean, size = points.astype(np.float64), np.ones(n)
    square = np.zeros((n, n))
    for x in mean.T:
        square += (x[:, None] - x) ** 2
    cost = np.sqrt(square)  # in the units of Z: ward sqrt(2 I), else the distance
    np.fill_diagonal(cost, np.inf)
    near, least = cost.argmin(axis=1), cost.min(axis=1)
    place = np.zeros(2 * n - 1, dtype=np.int64)  # the row of a cluster
    place[:n] = np.arange(n)
    for t, (a, b, height, _) in enumerate(Z):
        i, j = place[int(a)], place[int(b)]
        if not abs(cost[i, j] - height) <= slack:
            return f"merge {t + 1} at {height:.6g} costs {cost[i, j]:.6g}"
        if not height <= least.min() * (1 + TOLERANCE) + slack:
            return f"merge {t + 1} at {height:.6g} came while one at {least.min():.6g} was open"
        if linkage == "ward":
            mean[i] += size[j] / (size[i] + size[j]) * (mean[j] - mean[i])
            step = mean - mean[i]
            row = np.sqrt(2 * np.einsum("ij,ij->i", step, step) / (1 / size + 1 / (size[i] + size[j])))
        elif linkage == "average":
            row = (size[i] * cost[i] + size[j] * cost[j]) / (size[i] + size[j])
        else:
            row = np.minimum(cost[i], cost[j]) if linkage == "single" else np.maximum(cost[i], cost[j])
        size[i] += size[j]
        row[cost[i] == np.inf] = np.inf  # itself and the dead
        row[j] = np.inf
        cost[i] = cost[:, i] = row
        cost[j] = cost[:, j] = np.inf
        stale = (near == i) | (near == j)
        stale[i], stale[j], least[j] = True, False, np.inf
        closer = row < least
        near[closer], least[closer] = i, row[closer]
        search = (stale & (least < np.inf)).nonzero()[0]
        near[search] = cost[search].argmin(axis=1)
        least[search] = cost[search, near[search]]
        place[n + t] = i
    return None


def after(Z: np.ndarray, k: int) -> np.ndarray:
    """Return labels (n,) of the clusters after the first k merges of a linkage matrix."""
    n = len(Z) + 1
    up = np.arange(2 * n - 1)
    up[Z[:k, :2].astype(np.int64)] = n + np.arange(k)[:, None]
    while (up[up] != up).any():
        up = up[up]
    return up[:n]


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = a.astype(np.int64) * (int(b.max()) + 1) + b
    return len(np.unique(pairs)) == len(np.unique(a)) == len(np.unique(b))
