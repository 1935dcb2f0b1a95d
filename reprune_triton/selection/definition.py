"""The method as it is defined, for one layer: no batches, no shortcuts, and slow. docs/method.md has the equations.

    kernels of an input channel -> merges -> clusters; clusters of all channels -> kept filters

`reference` computes the same for whole layers and is tested against this. The Triton kernels are tested against both.

Ties. A cluster is named by its lowest member. Of equally cheap merges the one with the lowest cluster goes first, then
the one with the lowest partner. `reference` and the kernels merge many pairs at once: a cluster merges with the lowest
of its nearest neighbours. Kernels of one number (1x1) lie on a line; there every second one of equal gaps closes in the
same round, so that evenly spaced kernels take few rounds. So merges that cost exactly the same may come in another
order than here, but each is a cheapest one when its turn comes.

Park et al., "REPrune: Channel Pruning via Kernel Representative Selection", AAAI 2024 (arXiv:2402.17862).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations, product

Point = Sequence[float]
Merge = tuple[float, int, int]  # height, the cluster that stays, the one that joins it


def height(a: Sequence[Point], b: Sequence[Point], linkage: str) -> float:
    """Return what merging the clusters A and B costs: I(A, B) for ward, a Euclidean distance for the others."""
    if linkage == "ward":  # the growth of the sum of squared distances to the mean (Ward 1963)
        means = [[math.fsum(x) / len(cluster) for x in zip(*cluster, strict=True)] for cluster in (a, b)]
        return len(a) * len(b) / (len(a) + len(b)) * math.dist(*means) ** 2
    between = [math.dist(x, y) for x, y in product(a, b)]
    if linkage == "average":
        return math.fsum(between) / len(between)
    return {"single": min, "complete": max}[linkage](between)


def merges(points: Sequence[Point], linkage: str = "ward") -> list[Merge]:
    """Merge the two clusters that cost the least, until one is left: n - 1 merges of n points."""
    clusters = {i: [point] for i, point in enumerate(points)}
    found = []
    while len(clusters) > 1:
        found.append(min((height(clusters[i], clusters[j], linkage), i, j) for i, j in combinations(clusters, 2)))
        _, i, j = found[-1]
        clusters[i] += clusters.pop(j)
    return found


def cut(channels: Sequence[Sequence[Merge]], n: int, keep: int) -> tuple[list[list[set[int]]], float]:
    """Return the clusters of every channel, and the cut height: the lowest that leaves no channel more than `keep`."""
    if keep == n:
        return [[{i} for i in range(n)] for _ in channels], 0.0
    h = max(sorted(cost for cost, _, _ in channel)[n - keep - 1] for channel in channels)
    found = []
    for channel in channels:
        clusters = {i: {i} for i in range(n)}
        for cost, i, j in channel:
            if cost <= h:
                clusters[i] |= clusters.pop(j)
        found.append(list(clusters.values()))
    return found, h


def cover(channels: Sequence[Sequence[set[int]]], n: int, keep: int, tie: Callable[[int, int], float]) -> list[int]:
    """Take `keep` of n filters, each time the one that covers the most clusters not covered yet.

    tie: maps (step, filter) to a number. Of equally good filters the one with the largest goes first, then the lowest.
    """
    clusters = [cluster for channel in channels for cluster in channel]
    covers = [{number for number, cluster in enumerate(clusters) if i in cluster} for i in range(n)]
    covered: set[int] = set()
    order: list[int] = []
    for step in range(keep):
        left = [i for i in range(n) if i not in order]
        order.append(max(left, key=lambda i: (len(covers[i] - covered), tie(step, i), -i)))
        covered |= covers[order[-1]]
    return order


def select(
    weight: Sequence[Sequence[Point]], keep: int, tie: Callable[[int, int], float], linkage: str = "ward"
) -> list[int]:
    """Return the kept filters of a layer in the order of choice. weight[i][j] is filter i's kernel of channel j."""
    clusters, _ = cut([merges(kernels, linkage) for kernels in zip(*weight, strict=True)], len(weight), keep)
    return cover(clusters, len(weight), keep, tie)
