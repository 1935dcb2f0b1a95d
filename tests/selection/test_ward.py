"""Clustering and the cut, against SciPy and against a replay of every merge."""

import zlib

import numpy as np
import pytest
import torch
from families import UNIQUE, coarse, gaussian, geometric, grid, half_zero, huge, offset, problems, simplex, tiny
from scipy.cluster.hierarchy import fcluster, is_monotonic, is_valid_linkage, linkage

from reprune_triton import ops
from reprune_triton.errors import RepruneError
from reprune_triton.selection import reference
from reprune_triton.selection.problems import scale_of

P = 3
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def seed_of(*names) -> int:
    return zlib.crc32(repr(names).encode())


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to renaming: the pairs of labels are as many as the labels of either."""
    return len(np.unique(np.stack([a, b]), axis=1).T) == len(np.unique(a)) == len(np.unique(b))


def check_forest(merges: ops.Merges) -> None:
    parent, height = merges.parent, merges.height
    P, n = parent.shape
    column = torch.arange(n)
    assert parent.dtype == torch.int32
    assert (parent[:, 0] == 0).all() and (parent[:, 1:] < column[1:]).all()
    assert (height[:, 0] == torch.inf).all() and height[:, 1:].isfinite().all() and (height >= 0).all()
    assert (height.gather(1, parent.long()) >= height).all(), "a height falls on the way to the root"


def against_scipy(points: np.ndarray, method: str, dtype: torch.dtype, what: object) -> None:
    """Sorted heights, and the partition of every cut that a gap in the heights makes well defined."""
    n = points.shape[1]
    merges = ops.ward(torch.from_numpy(points).to(dtype), method)
    assert merges.height.dtype == dtype
    check_forest(merges)
    ours = merges.to_scipy()
    tolerance = TOLERANCE[dtype]
    for p, x in enumerate(points):
        theirs = linkage(x, method)
        span = theirs[-1, 2]
        # float32 means of an offset cloud carry the offset's rounding, as the points themselves do
        limit = tolerance * max(span, np.abs(x).max())
        error = np.abs(ours[p, :, 2] - theirs[:, 2]).max()
        assert error <= limit, f"{what} problem {p}: heights differ by {error / max(span, 1e-300):.1e} of the largest"
        assert is_valid_linkage(ours[p]) and is_monotonic(ours[p]), f"{what} problem {p}"
        gaps = np.diff(theirs[:, 2])
        for t in {int(gaps.argmax()), n // 2 - 1, n - 3} if n > 3 else ():
            if gaps[t] > 4 * limit:
                level = theirs[t, 2] + gaps[t] / 2
                mine, wanted = (fcluster(Z, level, "distance") for Z in (ours[p], theirs))
                assert same_partition(mine, wanted), f"{what} problem {p}: other clusters after {t + 1} merges"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", UNIQUE, ids=lambda family: family.__name__)
def test_ward_equals_scipy(family, dtype):
    for d, sizes in {1: (1, 2, 3, 17, 64, 128), 4: (2, 3, 31), 9: (1, 2, 3, 37, 64, 128), 25: (61,), 49: (29,)}.items():
        for n in sizes:
            seed = seed_of(family.__name__, d, n)
            if n == 1:
                merges = ops.ward(torch.from_numpy(problems(family, P, 1, d, seed)).to(dtype))
                assert (merges.parent == 0).all() and (merges.height == torch.inf).all()
                assert merges.to_scipy().shape == (P, 0, 4)
            else:
                against_scipy(problems(family, P, n, d, seed), "ward", dtype, (family.__name__, n, d, seed))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("method", ["single", "complete", "average"])
def test_other_linkages_equal_scipy(method, dtype):
    for family in UNIQUE:
        for n, d in ((2, 1), (3, 9), (53, 1), (41, 9), (64, 4)):
            seed = seed_of(method, family.__name__, n, d)
            against_scipy(problems(family, P, n, d, seed), method, dtype, (method, family.__name__, n, d, seed))


def replay(points: np.ndarray, merges: ops.Merges) -> None:
    """Carry out the merges by height, in float64; each must be as cheap as the cheapest merge there is.

    Merges of one height may come in any order in which each of them is right at its turn.
    """
    n = len(points)
    parent, height = merges.parent[0].tolist(), (merges.height[0].double() * merges.scale).tolist()
    members = {i: [i] for i in range(n)}
    between = np.linalg.norm(points[:, None] - points[None], axis=2)

    def cost(a: list[int], b: list[int]) -> float:
        if merges.linkage == "ward":
            return len(a) * len(b) / (len(a) + len(b)) * ((points[a].mean(0) - points[b].mean(0)) ** 2).sum()
        pairs = between[np.ix_(a, b)]
        return {"single": pairs.min, "complete": pairs.max, "average": pairs.mean}[merges.linkage]()

    slack = 1e-9 * max(height[1:])
    left = sorted(range(1, n), key=lambda j: height[j])
    while left:
        tied = [j for j in left if height[j] <= height[left[0]] + slack]
        open_now = [j for j in tied if parent[j] in members and not any(parent[k] == j for k in left)]
        fits = [j for j in open_now if abs(cost(members[parent[j]], members[j]) - height[j]) <= slack]
        assert fits, f"no merge at height {height[left[0]]} costs what it says"
        j = fits[0]
        alive = list(members)
        cheapest = min(cost(members[a], members[b]) for x, a in enumerate(alive) for b in alive[:x])
        assert height[j] <= cheapest + slack, f"merge at {height[j]}, but one at {cheapest} was open"
        members[parent[j]] += members.pop(j)
        left.remove(j)
    assert sorted(members[0]) == list(range(n))


@pytest.mark.parametrize("method", ops.LINKAGES)
def test_ties_give_a_valid_dendrogram(method):
    for n, d in ((12, 1), (20, 1), (24, 2), (22, 9)):
        for repeat in range(3):
            seed = seed_of(method, n, d, repeat)
            points = problems(grid, 1, n, d, seed)
            merges = ops.ward(torch.from_numpy(points), method)
            check_forest(merges)
            assert is_valid_linkage(merges.to_scipy()[0])
            try:
                replay(points[0], merges)
            except AssertionError as error:
                raise AssertionError(f"{method} n {n} d {d} seed {seed}: {error}") from error


def test_replay_would_notice():
    points = problems(gaussian, 1, 12, 3, 5)
    merges = ops.ward(torch.from_numpy(points))
    replay(points[0], merges)
    wrong = merges.parent.clone()
    wrong[0, -1] = 0 if wrong[0, -1] else 1
    with pytest.raises(AssertionError):
        replay(points[0], merges._replace(parent=wrong))
    with pytest.raises(AssertionError):
        replay(points[0], merges._replace(height=merges.height * 1.01))


def test_evenly_spaced_line_takes_few_rounds():
    line = torch.arange(4096.0).view(1, -1, 1)
    check_forest(ops.ward(line))
    merges = ops.ward(line[:, :16])
    assert sorted(merges.height[0].tolist())[:8] == [0.5] * 8, "the first round pairs everyone"


@pytest.mark.parametrize("d", [1, 9])
@pytest.mark.parametrize("method", ops.LINKAGES)
def test_order_of_the_filters_does_not_matter(d, method):
    seed = seed_of(d, method)
    points = torch.from_numpy(problems(gaussian, 4, 40, d, seed))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(40))
    plain, moved = ops.ward(points, method), ops.ward(points[:, order], method)
    torch.testing.assert_close(plain.height.sort().values, moved.height.sort().values, rtol=1e-12, atol=0)
    for keep in (5, 20, 39):
        a, b = ops.cut(plain, keep), ops.cut(moved, keep)
        assert a.h == pytest.approx(b.h, rel=1e-12)
        for p in range(4):
            assert same_partition(a.labels[p][order].numpy(), b.labels[p].numpy()), f"seed {seed} keep {keep}"


@pytest.mark.parametrize("family", [gaussian, half_zero, grid, geometric])
@pytest.mark.parametrize("d", [1, 9])
def test_problems_do_not_see_each_other(family, d, monkeypatch):
    """The same bits alone, in one call, and however the call is cut into chunks and blocks."""
    seed = seed_of(family.__name__, d)
    points = torch.from_numpy(problems(family, 6, 33, d, seed)).float()
    points[3] = torch.from_numpy(problems(geometric, 1, 33, d, seed)[0])
    for method in ops.LINKAGES:
        together = ops.ward(points, method)
        for p in range(6):
            alone, part = ops.ward(points[p : p + 1], method), together.problems(p, p + 1)
            assert torch.equal(alone.parent, part.parent) and torch.equal(alone.height, part.height), f"seed {seed}"
        with monkeypatch.context() as patch:
            for name, value in (("_POINTS_PER_CHUNK", 70), ("_PAIRS_PER_CHUNK", 2500), ("_PAIRS_PER_BLOCK", 100)):
                patch.setattr(reference, name, value)
            again = ops.ward(points, method)
        assert torch.equal(again.parent, together.parent) and torch.equal(again.height, together.height)


@pytest.mark.parametrize("method", ops.LINKAGES)
@pytest.mark.parametrize("family", [coarse, simplex, grid], ids=lambda family: family.__name__)
def test_rounding_cannot_break_a_forest(family, method):
    """Where ties and rounding decide who is nearest, it is still a forest, the same however it is batched."""
    for n, d in ((200, 1), (60, 4), (120, 9)):
        seed = seed_of(family.__name__, method, n, d)
        points = torch.from_numpy(problems(family, 8, n, d, seed)).float()
        merges = ops.ward(points, method)
        check_forest(merges)
        assert all(is_valid_linkage(Z) and is_monotonic(Z) for Z in merges.to_scipy()), f"seed {seed}"
        for p in range(8):
            alone = ops.ward(points[p : p + 1], method)
            assert torch.equal(alone.parent[0], merges.parent[p]), f"seed {seed} problem {p}"
            assert torch.equal(alone.height[0], merges.height[p]), f"seed {seed} problem {p}"


@pytest.mark.parametrize("d", [1, 9])
def test_heights_stay_in_order_even_if_rounding_is_not(d, monkeypatch):
    """Exaggerated: with formulas under which merges become cheaper and cheaper."""
    monkeypatch.setattr(reference, "ward_growth", lambda squared, a, b: squared / (a + b) ** 3)
    monkeypatch.setitem(reference.LANCE_WILLIAMS, "average", lambda d_a, d_b, a, b: 0.7 * torch.minimum(d_a, d_b))
    points = torch.from_numpy(problems(gaussian, 6, 50, d, d)).float()
    for method in ("ward", "average"):
        merges = ops.ward(points, method)
        check_forest(merges)
        assert all(is_valid_linkage(Z) and is_monotonic(Z) for Z in merges.to_scipy())


def test_carried_distances_stay_symmetric(monkeypatch):
    """Bit for bit, or two clusters might each find a third one nearer, round in a circle."""
    compact = reference.Distances.compact

    def checked(self, order, empty):
        compact(self, order, empty)
        assert torch.equal(self.dist, self.dist.transpose(1, 2))

    monkeypatch.setattr(reference.Distances, "compact", checked)
    for method in reference.LANCE_WILLIAMS:
        ops.ward(torch.from_numpy(problems(gaussian, 4, 60, 9, 1)).float(), method)


def test_half_zero_kernels_do_not_take_a_round_each(monkeypatch):
    searches = []
    nearest = reference.Means.nearest
    monkeypatch.setattr(
        reference.Means, "nearest", lambda self, rows: searches.append(rows.shape) or nearest(self, rows)
    )
    ops.ward(torch.from_numpy(problems(half_zero, 2, 400, 9, 3)).float())
    assert len(searches) < 60


def test_scale_is_a_power_of_two_and_only_where_needed():
    assert scale_of(torch.zeros(1, 2, 3)) == 0
    for family, exponent in ((gaussian, 0), (offset, 0)):
        points = torch.from_numpy(problems(family, 2, 20, 9, 0)).float()
        assert scale_of(points) == exponent and ops.ward(points).scale == 1.0
    for family in (tiny, huge):
        points = torch.from_numpy(problems(family, 2, 20, 9, 0)).float()
        e = scale_of(points)
        assert e != 0 and ops.ward(points).scale == 4.0**e and ops.ward(points, "single").scale == 2.0**e
        normal = (points.double() * 2.0**-e).float()
        assert torch.equal(ops.ward(points).height, ops.ward(normal).height), "scaling is exact"
        assert ops.cut(ops.ward(points), 10).h == ops.cut(ops.ward(normal), 10).h * 4.0**e
    smallest = torch.tensor([[[1.0], [2.0], [5.0]]]) * 2.0**-149  # subnormal
    wanted = linkage([[1], [2], [5]], "ward")[:, 2] * 2.0**-149
    np.testing.assert_allclose(ops.ward(smallest).to_scipy()[0, :, 2], wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_clustered_in_float32(dtype):
    points = torch.from_numpy(problems(gaussian, 2, 30, 9, 1)).to(dtype)
    half, single = ops.ward(points), ops.ward(points.float())
    assert half.height.dtype == torch.float32
    assert torch.equal(half.parent, single.parent) and torch.equal(half.height, single.height)


@pytest.mark.parametrize("family", [gaussian, half_zero, tiny], ids=lambda family: family.__name__)
@pytest.mark.parametrize("d", [1, 9])
def test_cut_is_the_specification(family, d):
    n, seed = 48, seed_of(family.__name__, d)
    points = problems(family, 5, n, d, seed)
    merges = ops.ward(torch.from_numpy(points).float())
    theirs = [linkage(x, "ward") for x in points]
    for keep in (1, 2, 20, 24, 47):
        labels, h = ops.cut(merges, keep)
        level = max(z[n - keep - 1, 2] for z in theirs)
        assert np.sqrt(2 * h) == pytest.approx(level, rel=1e-5)
        for p in range(5):
            found = labels[p].numpy()
            assert found.max() < keep, "at most keep clusters in every channel"
            first = np.unique(found, return_index=True)[1]
            assert (np.diff(first) > 0).all(), "numbered by the lowest member"
            assert same_partition(found, fcluster(theirs[p], level * (1 + 1e-5), "distance")), f"seed {seed}, {keep}"
    labels, h = ops.cut(merges, n)
    assert h == 0 and torch.equal(labels, torch.arange(n, dtype=torch.int32).expand(5, n)), "nothing merges"


def test_memory_is_bounded():
    n, P, d = 2048, 64, 9
    for method in ops.LINKAGES:
        chunk = reference.problems_per_chunk(n, method)
        biggest = chunk * n * n if method != "ward" else max(
            (b.stop - b.start) * (s.stop - s.start) * n for b, s in reference.blocks(chunk, n, n)
        )  # fmt: skip
        assert biggest * 4 <= 1 << 25 < P * n * n * 4, method
        assert chunk * n * d * 4 <= 1 << 23
    covered = [(b, s) for b, s in reference.blocks(5, 300, 1000)]
    assert sum((min(b.stop, 5) - b.start) * (min(s.stop, 300) - s.start) for b, s in covered) == 5 * 300


def test_geometric_line_is_exact_though_slow():
    points = problems(geometric, 1, 300, 1, 0)
    against_scipy(points, "ward", torch.float64, "geometric")


@pytest.mark.parametrize("linkage", ops.LINKAGES)
@pytest.mark.parametrize("d", [1, 4])
def test_the_points_are_not_changed(linkage, d):
    points = torch.randn(3, 20, d, dtype=torch.float64)
    points[:, 10:15] = points[:, :5]
    before = points.clone()
    ops.ward(points, linkage)
    assert torch.equal(points, before)


def test_an_unfinished_dendrogram_is_refused():
    merges = ops.ward(torch.randn(1, 5, 2))
    parent = merges.parent.clone()
    parent[0, 3] = 3
    with pytest.raises(RepruneError, match="not complete"):
        merges._replace(parent=parent).to_scipy()
