"""The method in plain PyTorch, for all problems of a layer at once. `definition` states it, merge by merge.

Read top to bottom, it follows the data:

    points -> forest (agglomerative clustering) -> cut -> labels -> cover -> order of the chosen filters

Park et al., "REPrune: Channel Pruning via Kernel Representative Selection", AAAI 2024 (arXiv:2402.17862).

Shapes: P clustering problems (one per input channel) of n points (one kernel per filter) in d = kh * kw dimensions.
Inputs are trusted here; `reprune_triton.ops` checks them and is what callers use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from reprune_triton.selection.rng import random_bits

INF = float("inf")
_POINTS_PER_CHUNK = 1 << 15  # Ward: points of the problems that go through the rounds together
_PAIRS_PER_CHUNK = 1 << 22  # other linkages: entries of the carried distance matrices, 32 MB
_PAIRS_PER_BLOCK = 1 << 17  # Ward: distances held at any one time; they should fit in a core's cache

# Merge formulas. a and b are the sizes of the clusters A and B.


def ward_growth(squared_distance: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return I(A, B) = ab / (a + b) * ||m_A - m_B||^2, by which a merge adds to the within-cluster SSE (Ward 1963)."""
    return squared_distance / (1 / a + 1 / b)


def merged_mean(m_a: torch.Tensor, m_b: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the mean of A + B, as a step from m_A: equal means stay equal, and a common offset is not lost."""
    return m_a + b / (a + b) * (m_b - m_a)


def single(d_a: torch.Tensor, d_b: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return d(A + B, C) from d(A, C) and d(B, C): the distance of the nearest two members."""
    return torch.minimum(d_a, d_b)


def complete(d_a: torch.Tensor, d_b: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return d(A + B, C) from d(A, C) and d(B, C): the distance of the farthest two members."""
    return torch.maximum(d_a, d_b)


def average(d_a: torch.Tensor, d_b: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return d(A + B, C) from d(A, C) and d(B, C): the mean distance over all pairs of members."""
    return (a * d_a + b * d_b) / (a + b)


LANCE_WILLIAMS: dict[str, Callable[..., torch.Tensor]] = {"single": single, "complete": complete, "average": average}
LINKAGES = ("ward", *LANCE_WILLIAMS)

# Clustering: points -> (parent, height), the absorption forest. Each merge kills one representative j, the higher of
# the two: parent[j] = i < j and height[j] is the merge height. The root keeps parent[r] = r, height[r] = +inf.


def problems_per_chunk(n: int, linkage: str) -> int:
    """Return how many problems of n points are clustered together, so that no temporary comes near (P, n, n)."""
    return max(1, _POINTS_PER_CHUNK // n if linkage == "ward" else _PAIRS_PER_CHUNK // (n * n))


def forest(points: torch.Tensor, linkage: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster every problem of points (P, n, d): parent (P, n) int32 and height (P, n) in the dtype of the points.

    Heights are I for `ward`, Euclidean distances for the other linkages. The arithmetic is float64 whatever the points
    are. In float32, 4 of the 16,896 problems of a fresh ResNet-50 (all 1x1) merge in another order, where only rounding
    tells two merges apart.
    """
    P, n, d = points.shape
    parent = torch.empty((P, n), dtype=torch.int32, device=points.device)
    height = torch.empty((P, n), dtype=points.dtype, device=points.device)
    step = problems_per_chunk(n, linkage)
    for p in range(0, P, step):
        chunk = slice(p, p + step)
        if linkage == "ward" and d == 1:
            parent[chunk], height[chunk] = sorted_line(points[chunk, :, 0].double())
        else:
            parent[chunk], height[chunk] = reciprocal_pairs(points[chunk].double(), linkage)
    return parent, height


def reciprocal_pairs(points: torch.Tensor, linkage: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge all reciprocal nearest neighbours at once, round after round.

    The linkages used here are reducible: a merge never brings the new cluster nearer to a third one than the nearer of
    its parts was. So two clusters that are each other's nearest neighbour stay so until they merge, whatever happens
    elsewhere, and merging all such pairs at once gives the dendrogram of the one-by-one order (Bruynooghe 1977).
    """
    B, n, _ = points.shape
    clusters = Means(points) if linkage == "ward" else Distances(points, LANCE_WILLIAMS[linkage])
    parent = torch.arange(n, device=points.device).repeat(B, 1)  # (B, n)
    height = torch.full_like(parent, INF, dtype=points.dtype)  # (B, n)

    # The living clusters stand in m columns: those of problem p in its first count[p] columns, by lowest member.
    column = torch.arange(n, device=points.device)
    count = torch.full((B, 1), n, device=points.device)
    lowest = parent.clone()  # (B, m) the lowest member, which represents the cluster in the forest
    newest = torch.zeros_like(height)  # (B, m) height of the newest merge inside the cluster
    near, dist = clusters.nearest(lowest)  # (B, m) column of the nearest neighbour, and its distance

    # Exact duplicates collapse in one go, each into the first of its kind: as pairs they could take n - 1 rounds.
    gone = (dist == 0) & (near < column)
    into = follow(torch.where(gone, near, column))
    idle = torch.zeros_like(count, dtype=torch.bool)
    for _ in range(2 * n + 2):
        p, j = gone.nonzero(as_tuple=True)
        i = into[p, j]
        # Reducible linkages are monotone, but rounding is not: the maximum keeps heights in order along every path.
        top = torch.maximum(dist[p, j], torch.maximum(newest[p, i], newest[p, j]))
        dead = lowest[p, j]
        parent[p, dead], height[p, dead], newest[p, i] = lowest[p, i], top, top
        clusters.merge(p, i, j)

        # Only clusters whose nearest neighbour merged need a new search; that includes those that merged with it.
        merged = gone.clone()
        merged[p, i] = True
        stale = merged.gather(1, near) | idle

        out = gone | (column >= count)
        count = count - gone.sum(1, keepdim=True)
        m = int(count.max())
        if m <= 1:
            return parent, height
        order = out.sort(dim=1, stable=True).indices
        moved = torch.empty_like(order).scatter_(1, order, column.expand(B, -1))  # old column -> new column
        order, column = order[:, :m], column[:m]
        empty = column >= count
        near = moved.gather(1, near).gather(1, order).clamp(max=m - 1)
        lowest, newest, dist = lowest.gather(1, order), newest.gather(1, order), dist.gather(1, order)
        stale = stale.gather(1, order) & ~empty
        clusters.compact(order, empty)

        rows = stale.sort(dim=1, descending=True, stable=True).indices[:, : int(stale.sum(1).max())]  # (B, r)
        use = stale.gather(1, rows)
        found, far = clusters.nearest(rows)
        near = near.scatter(1, rows, torch.where(use, found, near.gather(1, rows)))
        dist = dist.scatter(1, rows, torch.where(use, far, dist.gather(1, rows)))

        # Of all closest pairs take the one with the lowest i, then the lowest j: they name each other, as the lowest
        # column wins a tie and d(i, j) is bitwise d(j, i). So a full search always finds a pair to merge. Without one,
        # rounding has let a new cluster come nearer to an old one than its parts were: search that problem afresh.
        into = near
        gone = (near.gather(1, near) == column) & (near < column) & ~empty
        idle = ~gone.any(1, keepdim=True) & (count > 1)
    raise RuntimeError("clustering made no progress; are there NaNs among the points?")


def distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean distances (B, r, m) of the points x (B, r, d) and y (B, m, d).

    By differences: x^2 + y^2 - 2xy is quicker, but loses all digits for near duplicates or an offset.
    """
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


class Means:
    """Clusters for Ward: their means and sizes. Distances are computed when they are needed."""

    def __init__(self, points: torch.Tensor):
        self.mean = points.clone()  # (B, m, d)
        self.size = torch.ones_like(points[..., 0])  # (B, m)

    def nearest(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return, for the clusters in columns rows (B, r), the column of the nearest other (lowest on ties), and I."""
        near, dist = torch.empty_like(rows), torch.empty_like(rows, dtype=self.mean.dtype)
        m = self.size.shape[1]
        for block, span in blocks(rows.shape[0], rows.shape[1], m):
            row = rows[block, span]  # (q, s)
            mean, size = self.mean[block], self.size[block]  # (q, m, d), (q, m)
            own = mean.gather(1, row[:, :, None].expand(-1, -1, mean.shape[2]))
            growth = ward_growth(distances(own, mean).square_(), size.gather(1, row)[:, :, None], size[:, None, :])
            growth.scatter_(2, row[:, :, None], INF)  # not itself
            dist[block, span], near[block, span] = growth.min(dim=2)  # the first minimum, by torch's documentation
        return near, dist

    def merge(self, p: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> None:
        """Cluster j joins cluster i, in problem p."""
        a, b = self.size[p, i, None], self.size[p, j, None]
        self.mean[p, i] = merged_mean(self.mean[p, i], self.mean[p, j], a, b)
        self.size.index_put_((p, i), b[:, 0], accumulate=True)  # several duplicates may join one cluster

    def compact(self, order: torch.Tensor, empty: torch.Tensor) -> None:
        self.mean = self.mean.gather(1, order[:, :, None].expand(-1, -1, self.mean.shape[2]))
        self.mean.masked_fill_(empty[:, :, None], INF)  # out of everyone's reach
        self.size = self.size.gather(1, order)


class Distances:
    """Clusters for the other linkages: all distances, which Lance-Williams formulas update."""

    def __init__(self, points: torch.Tensor, formula: Callable[..., torch.Tensor]):
        self.formula = formula
        self.dist = distances(points, points)  # (B, m, m)
        self.dist.diagonal(dim1=1, dim2=2).fill_(INF)  # not itself
        self.size = torch.ones_like(points[..., 0])  # (B, m)

    def nearest(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `Means.nearest` does, with the distance of the linkage."""
        dist, near = self.dist.gather(1, rows[:, :, None].expand(-1, -1, self.dist.shape[2])).min(dim=2)
        return near, dist

    def merge(self, p: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> None:
        """Cluster j joins cluster i, in problem p."""
        a, b = self.size[p, i, None], self.size[p, j, None]
        self.dist[p, i] = self.formula(self.dist[p, i], self.dist[p, j], a, b)
        self.dist[p, :, i] = self.formula(self.dist[p, :, i], self.dist[p, :, j], a, b)
        # Where two new clusters meet, rows-then-columns and columns-then-rows round differently: make them one number.
        self.dist[p, i] = self.dist[p, :, i] = (self.dist[p, i] + self.dist[p, :, i]) / 2
        self.dist[p, i, i] = INF
        self.size.index_put_((p, i), b[:, 0], accumulate=True)

    def compact(self, order: torch.Tensor, empty: torch.Tensor) -> None:
        self.dist = self.dist.gather(1, order[:, :, None].expand(-1, -1, self.dist.shape[2]))
        self.dist = self.dist.gather(2, order[:, None, :].expand(-1, order.shape[1], -1))
        self.dist.masked_fill_(empty[:, None, :] | empty[:, :, None], INF)
        self.size = self.size.gather(1, order)


def blocks(B: int, r: int, m: int) -> Iterator[tuple[slice, slice]]:
    """Cut (B, r) rows of m distances each into blocks of at most _PAIRS_PER_BLOCK distances (or one row)."""
    span = max(1, min(r, _PAIRS_PER_BLOCK // m))
    block = max(1, _PAIRS_PER_BLOCK // (span * m))
    for p in range(0, B, block):
        for s in range(0, r, span):
            yield slice(p, p + block), slice(s, s + span)


def sorted_line(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ward in one dimension (1x1 convs): sort, then merge every adjacent pair whose gap is a local minimum.

    Clusters are intervals of the sorted line and nearest neighbours are always adjacent. A gap between two adjacent
    clusters only grows when either merges with someone else, so one that is smaller than both its neighbours is merged
    before they are, and all such gaps can go at once. All problems stand in one flat row, with a wall between them.
    """
    B, n = points.shape
    value, order = points.sort(dim=1, stable=True)
    start = torch.arange(0, B * n, n, device=points.device)
    value, point = value.flatten(), (order + start[:, None]).flatten()

    # Exact duplicates collapse in one go; the sort is stable, so the first of a group is its lowest.
    first = torch.ones_like(value, dtype=torch.bool)
    torch.ne(value[1:], value[:-1], out=first[1:])
    first[start] = True
    head = first.nonzero().squeeze(1)
    lowest = point[head]  # (K,) clusters from here on
    parent, height = torch.empty_like(point), torch.empty_like(value)
    number = first.cumsum(0) - 1  # which cluster a point is in
    parent[point] = lowest[number]
    height[point] = torch.where(first, INF, 0.0).to(value.dtype)
    mean, size = value[head], head.diff(append=head.new_tensor([B * n])).to(value.dtype)
    newest = torch.zeros_like(mean)
    wall = torch.zeros_like(mean, dtype=torch.bool)  # the problem ends after this cluster
    wall[number[start[1:]] - 1] = wall[-1] = True

    while True:
        gap = mean.new_full((len(mean) + 1,), INF)  # gap[k + 1] is the growth between clusters k and k + 1
        gap[1:-1] = ward_growth(mean.diff().square_(), size[:-1], size[1:]).masked_fill_(wall[:-1], INF)
        left, middle, right = gap[:-2], gap[1:-1], gap[2:]
        lead = (middle < left) & (middle < right)
        if ((middle == left) & (middle < INF)).any():
            # Equal neighbouring gaps: the cluster with an even rank in its problem goes first. A run of equal minima
            # has one in every two, so there is always a merge and an evenly spaced line takes few rounds.
            rank = torch.arange(len(mean), device=mean.device)
            begin = torch.where(wall, rank + 1, 0).cummax(0).values.roll(1).index_fill_(0, rank[:1], 0)
            even = ((rank - begin) & 1 == 0)[:-1]
            lead = ((middle < left) | (middle == left) & even) & ((middle < right) | (middle == right) & even)
            lead &= middle < INF
        i = lead.nonzero().squeeze(1)
        if len(i) == 0:
            return parent.view(B, n) - start[:, None], height.view(B, n)
        j = i + 1
        mean_i, size_i, newest_i, lowest_i = (t.index_select(0, i) for t in (mean, size, newest, lowest))
        mean_j, size_j, newest_j, lowest_j = (t.index_select(0, j) for t in (mean, size, newest, lowest))
        low, high = torch.minimum(lowest_i, lowest_j), torch.maximum(lowest_i, lowest_j)
        top = torch.maximum(middle.index_select(0, i), torch.maximum(newest_i, newest_j))
        parent.scatter_(0, high, low)
        height.scatter_(0, high, top)
        mean.scatter_(0, i, merged_mean(mean_i, mean_j, size_i, size_j))
        size.scatter_(0, i, size_i + size_j)
        newest.scatter_(0, i, top)
        lowest.scatter_(0, i, low)
        wall.scatter_(0, i, wall.index_select(0, j))
        stay = torch.ones_like(wall).index_fill_(0, j, False).nonzero().squeeze(1)
        mean, size, newest, lowest, wall = (t.index_select(0, stay) for t in (mean, size, newest, lowest, wall))


def follow(pointer: torch.Tensor) -> torch.Tensor:
    """Return where each chain of pointers (P, n) ends, by pointer jumping: log2(longest chain) steps."""
    while True:
        beyond = pointer.gather(1, pointer)
        if torch.equal(beyond, pointer):
            return pointer
        pointer = beyond


# Cut: one height for the whole layer, so that every problem has at most `keep` clusters.


def cut_height(height: torch.Tensor, keep: int) -> float:
    """Return the cut height of a layer from the merge heights (P, n) of its problems.

    With c = n - keep merges wanted and d_j(c) the c-th smallest height of problem j it is max_j d_j(c). For c = 0 it is
    -1, so that nothing merges, not even duplicates.
    """
    n = height.shape[1]
    return -1.0 if keep == n else float(height.kthvalue(n - keep, dim=1).values.max())


def labels(parent: torch.Tensor, height: torch.Tensor, h: float) -> torch.Tensor:
    """Return labels (P, n) int64: the clusters of each problem after the merges with height <= h.

    They are numbered from 0 in the order of their lowest members.
    """
    column = torch.arange(parent.shape[1], device=parent.device)
    # Heights never decrease towards the root, so a chain of merges at or under the cut has no gaps.
    root = follow(torch.where(height <= h, parent.long(), column))
    number = (root == column).cumsum(1) - 1
    return number.gather(1, root)


def cut(parent: torch.Tensor, height: torch.Tensor, keep: int) -> tuple[torch.Tensor, float]:
    """Return labels (P, n) int64 and the cut height; 0 where nothing merges."""
    h = cut_height(height, keep)
    return labels(parent, height, h), max(h, 0.0)


# Cover: take the filters that together cover the most clusters, greedily.

INDEX_BITS, TIE_BITS = 12, 31  # the sort key of a filter: gain | tie | reversed index
_TIE_BLOCK = 1 << 16  # random bits drawn ahead
SCORED = ("norm", "gamma")  # by a score of every filter, the larger first
TIES = ("random", "index", *SCORED)


def cover(
    labels: torch.Tensor, keep: int, tie: str, seed: int, score: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Take `keep` filters by greedy maximum coverage; filter i covers cluster labels[j, i] of every channel j.

    Every step takes the largest key: the gain, then the tie rule (fresh random bits, as in the paper; nothing; or the
    rank of the score), then the lowest index. Greedy covers at least (1 - 1/e) of what any `keep` filters can.

    Args:
        labels: (n_in, n_out) integer.
    Returns:
        The filters in order of choice (keep,), how many clusters each was the first to cover (keep,), the number of
        covered clusters and the number of clusters.
    """
    n_in, n_out = labels.shape
    device = labels.device

    # Members of every cluster, one cluster after the other; clusters are numbered through all channels.
    value, member = labels.sort(dim=1, stable=True)
    first = torch.ones_like(value, dtype=torch.bool)
    first[:, 1:] = value[:, 1:] != value[:, :-1]
    member, first = member.flatten(), first.flatten()
    number = (first.cumsum(0) - 1).view(n_in, n_out)
    cluster = torch.empty_like(number).scatter_(1, member.view(n_in, n_out), number).T.contiguous()  # (n_out, n_in)
    begin = first.nonzero().squeeze(1)  # where the members of each cluster begin
    size = begin.diff(append=begin.new_tensor([n_in * n_out]))
    covered = torch.zeros_like(begin, dtype=torch.bool)

    index = torch.arange(n_out, device=device)
    low_bits = (1 << INDEX_BITS) - 1 - index
    if tie in SCORED:
        assert score is not None
        low_bits += score.unique(return_inverse=True)[1] << INDEX_BITS
    steps = min(keep, max(1, _TIE_BLOCK // n_out))

    gain = torch.full((n_out,), n_in, device=device)  # clusters a filter would be first to cover; chosen ones: -1
    order = torch.empty(keep, dtype=torch.int64, device=device)
    gains = torch.empty_like(order)
    for step in range(keep):
        key = (gain << (INDEX_BITS + TIE_BITS)) | low_bits
        if tie == "random":
            if step % steps == 0:
                bits = random_bits(seed, step * n_out, steps * n_out, device).view(steps, n_out)
                bits = (bits >> (32 - TIE_BITS)) << INDEX_BITS
            key |= bits[step % steps]
        choice = key.argmax()
        order[step], gains[step] = choice, gain[choice]

        fresh = cluster[choice]
        fresh = fresh[~covered[fresh]]  # ever fewer as the steps go by
        covered[fresh] = True
        length = size[fresh]
        skip = torch.repeat_interleave(begin[fresh] - (length.cumsum(0) - length), length)
        affected = member[skip + torch.arange(len(skip), device=device)]
        gain -= torch.bincount(affected, minlength=n_out)
        gain[order[: step + 1]] = -1
    return order, gains, int(covered.sum()), len(begin)
