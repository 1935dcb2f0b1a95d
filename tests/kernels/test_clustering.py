"""The Triton kernels compute what the reference says: interpreted where there is no GPU, compiled where there is one.

Kernels work in float32, the reference in float64. So heights are compared up to rounding, and clusters at cuts that no
rounding can move; inputs with exact ties at a distance other than zero have no one answer: theirs must be a valid one.
What must not depend on rounding, like the company a layer has in a launch, is compared bit for bit.
"""

import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from families import (
    UNIQUE,
    all_zero,
    clustered,
    coarse,
    duplicated,
    gaussian,
    geometric,
    grid,
    half_zero,
    heavy_tailed,
    problems,
    simplex,
)  # fmt: skip
from scipy.cluster.hierarchy import is_monotonic, is_valid_linkage, linkage
from selection.test_ward import check_forest, same_partition, seed_of

from reprune_triton import ops
from reprune_triton.bench.measure import peers
from reprune_triton.errors import RepruneError
from reprune_triton.kernels.clustering import chain, launch, line, reciprocal
from reprune_triton.kernels.configuration import Configuration
from reprune_triton.selection.problems import scale_of

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.cuda.is_available()
ALGORITHMS = {  # name: linkage, algorithm, d
    "chain": ("ward", "chain", 4),
    "reciprocal": ("ward", "reciprocal", 4),
    "line": ("ward", "auto", 1),
    "single": ("single", "auto", 4),
    "complete": ("complete", "auto", 4),
    "average": ("average", "auto", 4),
}  # fmt: skip


def points_of(family, P: int, n: int, d: int, seed: int, device: str) -> torch.Tensor:
    return torch.from_numpy(problems(family, P, n, d, seed)).float().to(device)


def same_bits(a: ops.Merges, b: ops.Merges) -> bool:
    return torch.equal(a.parent, b.parent) and torch.equal(a.height, b.height) and a[2:] == b[2:]


def valid(merges: ops.Merges) -> None:
    merges = merges._replace(parent=merges.parent.cpu(), height=merges.height.cpu())
    check_forest(merges)
    if merges.parent.shape[1] > 1:
        assert all(is_valid_linkage(Z) and is_monotonic(Z) for Z in merges.to_scipy())


def rounding(n: int, span: float, largest: float) -> float:
    """How far a float32 height may be from SciPy's, which is in the units of a distance: 2e-6 is 32 half-units in the
    last place, for a sum of d squares, a mean and a root; means of an offset cloud carry the offset's rounding, and an
    error of means adds up as the root of the merges behind it."""
    return 2e-6 * max(1.0, (n / 64) ** 0.5) * max(span, largest)


def against_scipy_and_reference(points: torch.Tensor, method: str, algorithm: str, what: object) -> None:
    n = points.shape[1]
    ours, wanted = ops.ward(points, method, "triton", algorithm), ops.ward(points, method, "reference")
    valid(ours)
    assert ours.height.dtype == torch.float32 and ours[2:] == wanted[2:], what
    if n == 1:
        return
    near_ties = False
    for p, x in enumerate(points.double().cpu().numpy()):
        theirs, own = linkage(x, method)[:, 2], ours.problems(p, p + 1).to_scipy()[0]
        error, limit = np.abs(own[:, 2] - theirs).max(), rounding(n, theirs[-1], np.abs(x).max())
        if error > limit:  # another merge, which float64 must find as cheap
            objection = peers.replay(x, own, method)
            assert not objection, f"{what} problem {p}: heights differ by {error:.2e}, not {limit:.2e}: {objection}"
            near_ties = True
    if near_ties:
        return
    heights = wanted.height.double()
    heights = heights[heights.isfinite()]
    slack = 2e-5 * float(heights.max())
    compared = 0
    for keep in {1, 2, n // 4, n // 2, n - n // 4, n - 1, n} & set(range(1, n + 1)):
        own, other = (ops.cut(merges, keep, "reference") for merges in (ours, wanted))
        assert own.h == pytest.approx(other.h, rel=2e-5, abs=slack * wanted.scale), f"{what} keep {keep}"
        above = heights[heights > other.h / wanted.scale]
        if len(above) == 0 or keep == n or float(above.min()) > other.h / wanted.scale + slack:
            compared += 1
            assert torch.equal(own.labels, other.labels), f"{what} keep {keep}: other clusters"
    assert compared >= 2, f"{what}: rounding could move nearly every cut"


# Filters and numbers of a kernel, for the families in turn. The interpreter takes about 5 ms for a block of distances.
INTERPRETED = {
    "auto": ((17, 1), (12, 9), (37, 1), (9, 25), (65, 1)),
    "chain": ((13, 4), (13, 1), (11, 9), (9, 25), (7, 49)),
    "reciprocal": ((23, 9), (19, 4), (11, 49), (29, 1), (17, 25)),
}
COMPILED = (
    *((n, d) for n in (1, 2, 3, 17, 64, 65, 127, 300) for d in (1, 4, 9, 25, 49, 121)),
    (512, 1), (512, 9), (1000, 4), (1025, 1), (2048, 9),
)  # fmt: skip


@pytest.mark.parametrize("algorithm", ops.ALGORITHMS)
@pytest.mark.parametrize("family", UNIQUE, ids=lambda family: family.__name__)
def test_ward(family, algorithm, device):
    cases = INTERPRETED[algorithm]
    sizes = COMPILED if device == "cuda" else (cases[UNIQUE.index(family) % len(cases)],)
    for n, d in sizes:
        if family is geometric and n > 600:  # its squares leave float32
            continue
        P, seed = 4 if device == "cuda" else 1, seed_of(family.__name__, algorithm, n, d)
        points = points_of(family, P, n, d, seed, device)
        against_scipy_and_reference(points, "ward", algorithm, (family.__name__, algorithm, n, d, seed))


@pytest.mark.parametrize("method", sorted(chain.LINKAGES.keys() - {"ward"}))
@pytest.mark.parametrize("family", UNIQUE, ids=lambda family: family.__name__)
def test_other_linkages(family, method, device):
    cases = ((13, 9), (11, 1), (17, 4), (7, 49))
    sizes = [case for case in COMPILED if case[0] <= 300] if device == "cuda" else (cases[UNIQUE.index(family) % 4],)
    for n, d in sizes:
        P, seed = 4 if device == "cuda" else 1, seed_of(family.__name__, method, n, d)
        against_scipy_and_reference(points_of(family, P, n, d, seed, device), method, "auto", (method, n, d, seed))


@pytest.mark.parametrize(
    ("n", "d", "algorithm", "family"),
    [
        (64, 2, "auto", clustered), (65, 4, "auto", clustered), (65, 1, "chain", clustered),
        (65, 2, "chain", gaussian), (65, 4, "chain", half_zero), (65, 9, "chain", gaussian),
        (67, 1, "reciprocal", heavy_tailed), (64, 9, "reciprocal", clustered), (65, 25, "reciprocal", clustered),
        (131, 2, "reciprocal", half_zero), (127, 1, "auto", gaussian), (130, 1, "auto", heavy_tailed),
        (257, 1, "auto", clustered),
    ],
)  # fmt: skip
def test_more_filters_than_a_block_holds(n, d, algorithm, family, device):
    seed = seed_of(n, d, algorithm)
    points = points_of(family, 1, n, d, seed, device)
    against_scipy_and_reference(points, "ward", algorithm, (family.__name__, n, d, algorithm, seed))


@pytest.mark.parametrize("method", sorted(chain.LINKAGES.keys() - {"ward"}))
def test_more_filters_than_a_block_holds_in_other_linkages(method, device):
    n = 300 if device == "cuda" else 65
    against_scipy_and_reference(points_of(gaussian, 1, n, 3, n, device), method, "auto", method)


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ops.ALGORITHMS)
@pytest.mark.parametrize("family", [gaussian, heavy_tailed, half_zero, all_zero], ids=lambda family: family.__name__)
@pytest.mark.skipif(not CUDA, reason="needs a GPU: too much for the interpreter")
def test_the_largest_layers(family, algorithm):
    for P, n, d in ((2, launch.MAX_FILTERS, launch.MAX_AREA), (4, 4096, 9), (4, 4095, 1), (400, 257, 9), (3000, 64, 9)):
        points = points_of(family, P, n, d, n + d, "cuda")
        ours = ops.ward(points, "ward", "triton", algorithm)
        valid(ours.problems(0, 4))
        wanted = ops.ward(points, "ward", "reference").height.double().sort(dim=1).values[:, :-1]
        found = ours.height.double().sort(dim=1).values[:, :-1]
        span, largest = float(wanted.max()) ** 0.5, float(points.abs().max())
        assert float((found.sqrt() - wanted.sqrt()).abs().max()) <= rounding(n, span, largest), f"{P}, {n}, {d}"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_two_and_three_filters(name, device):
    method, algorithm, d = ALGORITHMS[name]
    for n in (1, 2, 3):
        against_scipy_and_reference(points_of(gaussian, 1, n, d, n, device), method, algorithm, (name, n))
        valid(ops.ward(torch.ones(1, n, d, device=device), method, "triton", algorithm))


def replay(points: np.ndarray, merges: ops.Merges, slack: float) -> None:
    """Carry out the merges by height, in float64: each costs what it says, and nothing was cheaper, but for rounding.

    Among merges as good as equal, any order in which each is right at its turn will do.
    """
    n = len(points)
    parent, height = merges.parent[0].tolist(), merges.height[0].tolist()
    slack *= max(height[1:])
    between = np.linalg.norm(points[:, None] - points[None], axis=2)
    members = {i: [i] for i in range(n)}

    def cost(a: list[int], b: list[int]) -> float:
        if merges.linkage == "ward":
            return len(a) * len(b) / (len(a) + len(b)) * ((points[a].mean(0) - points[b].mean(0)) ** 2).sum()
        pairs = between[np.ix_(a, b)]
        return {"single": pairs.min, "complete": pairs.max, "average": pairs.mean}[merges.linkage]()

    left = sorted(range(1, n), key=lambda j: height[j])
    while left:
        tied = [j for j in left if height[j] <= height[left[0]] + slack and not any(parent[k] == j for k in left)]
        fits = [j for j in tied if abs(cost(members[parent[j]], members[j]) - height[j]) <= slack]
        assert fits, f"no merge at height {height[left[0]]} costs what it says"
        alive = list(members.values())
        cheapest = min(cost(a, b) for x, a in enumerate(alive) for b in alive[:x])
        assert height[fits[0]] <= cheapest + slack, f"merge at {height[fits[0]]}, but one at {cheapest} was open"
        members[parent[fits[0]]] += members.pop(fits[0])
        left.remove(fits[0])


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("family", [grid, simplex], ids=lambda family: family.__name__)
def test_ties_give_a_valid_dendrogram(family, name, device):
    method, algorithm, d = ALGORITHMS[name]
    for n in (16, 21) if device == "cuda" else (16,):
        seed = seed_of(family.__name__, name, n)
        points = points_of(family, 1, n, d, seed, device)
        merges = ops.ward(points, method, "triton", algorithm)
        valid(merges)
        replay(points[0].double().cpu().numpy(), merges, 2e-6)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_rounding_cannot_break_a_forest(name, device):
    """Next to the resolution of float32 a merged cluster may come nearer to a third one than its parts were."""
    method, algorithm, d = ALGORITHMS[name]
    P, n = (64, 700) if device == "cuda" else (1, 40)
    valid(ops.ward(points_of(coarse, P, n, d, seed_of(name), device), method, "triton", algorithm))


@pytest.mark.parametrize("algorithm", ["chain", "reciprocal"])
def test_heights_stay_in_order_even_if_rounding_is_not(algorithm, device):
    """Two of the few inputs, found by search, for which a merge costs less than one inside of it."""
    for seed in (42, 87):
        valid(ops.ward(points_of(coarse, 1, 30, 3, seed, device), "ward", "triton", algorithm))


@pytest.mark.parametrize(
    ("n", "d", "width", "far", "seed"), [(13, 4, 4, 2.0**20, 176829499), (21, 3, 7, 2.0**18, 1210978343)]
)
def test_rounds_go_on_where_rounding_leaves_no_pair(n, d, width, far, seed, device):
    """Found by search: no two clusters are each other's nearest any more, until all of them are searched again."""
    points = far + np.random.default_rng(seed).integers(0, width, (1, n, d)) * far / 2**23
    valid(ops.ward(torch.from_numpy(points).float().to(device), "ward", "triton", "reciprocal"))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_ties_go_as_the_docstrings_say(name, device):
    """Points 2, 3, 1 side by side at equal gaps; 0 is far away."""
    method, algorithm, d = ALGORITHMS[name]
    points = torch.zeros(1, 4, d, device=device)
    points[0, :, 0] = torch.tensor([0.0, 9.0, 5.0, 7.0])
    merges = ops.ward(points, method, "triton", algorithm)
    by_chain = algorithm == "chain" or (algorithm == "auto" and d > 1)
    # A chain that comes from 0 through 2 to 3 stays with 2. Rounds take the lowest of equals, a line every second gap.
    assert merges.parent[0].tolist() == [0, 0, 1, 2 if by_chain else 1], name


@pytest.mark.parametrize("name", ALGORITHMS)
def test_distances_that_underflow(name, device):
    """Differences whose squares are no float32 numbers, or hardly: some of them count as copies and some do not."""
    method, algorithm, d = ALGORITHMS[name]
    P, n = (64, 300) if device == "cuda" else (1, 20)
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(P, n, d, generator=generator)
    points *= 10 ** -torch.empty(P, n, 1).uniform_(17, 26, generator=generator)
    points[:, 5] = 1
    merges = ops.ward(points.to(device), method, "triton", algorithm)
    valid(merges)
    top = merges.height[:, 1:].max(dim=1).values.cpu()
    growth = d * (n - 1) / n if method == "ward" else d**0.5  # to merge the point far away, if sizes add up
    assert merges.scale == 1 and torch.allclose(top, torch.full_like(top, growth), rtol=1e-5)
    assert int((merges.height > 0.1).sum()) == 2 * P, "the root is infinite"


def test_an_evenly_spaced_line_takes_few_rounds(device):
    n = 4096 if device == "cuda" else 200
    layer = ops.Layer(torch.arange(float(n), device=device).view(n, 1, 1, 1))
    forests = launch.cluster(launch.prepare([layer]))
    assert forests.work[0, 0] <= 2 * n.bit_length()
    assert int((forests.height - 0.5).abs().lt(1e-6).sum()) == n // 2, "the first round pairs everyone"


def test_signed_zeros_are_equal(device):
    points = points_of(half_zero, 1, 24, 1, 0, device)
    signed = torch.where((points == 0) & (torch.arange(24, device=device)[None, :, None] % 3 > 0), -points, points)
    assert (signed == points).all() and not torch.equal(signed.signbit(), points.signbit())
    for name in ("line", "chain", "reciprocal"):
        method, algorithm, _ = ALGORITHMS[name]
        plain, other = (ops.ward(x, method, "triton", algorithm) for x in (points, signed))
        valid(other)
        assert torch.equal(plain.height.sort().values, other.height.sort().values)
        assert torch.equal(ops.cut(plain, 12, "triton").labels, ops.cut(other, 12, "triton").labels)


# Copies of a point


def rounds(points: torch.Tensor, algorithm: str = "reciprocal") -> int:
    layer = ops.Layer(points.transpose(0, 1).unsqueeze(2))
    return int(launch.cluster(launch.prepare([layer], "ward", algorithm)).work[:, 0].max())


def test_copies_do_not_take_a_round_each(device):
    n = 2048 if device == "cuda" else 130
    assert rounds(points_of(all_zero, 2, n, 4, 0, device)) <= 2
    assert rounds(points_of(half_zero, 1, n, 4, 0, device)) <= (60 if device == "cuda" else 20)
    few = points_of(gaussian, 1, 3, 4, 0, device)
    assert rounds(few[:, torch.arange(n, device=device) % 3]) <= 4, "three points, over and over"


@pytest.mark.parametrize("name", ["chain", "reciprocal", "line"])
def test_copies_count(name, device):
    """Four points of very different weight: what 29, 7, 3 and 1 copies cost to merge says that they were counted."""
    method, algorithm, d = ALGORITHMS[name]
    which = torch.repeat_interleave(torch.arange(4), torch.tensor([29, 7, 3, 1]))
    which = which[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    points = points_of(gaussian, 1, 4, d, 0, device)[:, which.to(device)]
    merges = ops.ward(points, method, "triton", algorithm)
    valid(merges)
    assert int((merges.height == 0).sum()) == 36
    wanted = linkage(points[0].double().cpu().numpy(), "ward")[:, 2]
    np.testing.assert_allclose(merges.to_scipy()[0, :, 2], wanted, rtol=2e-6)
    copies = ops.cut(merges, 4, "triton")
    assert copies.h == 0 and same_partition(copies.labels[0].cpu().numpy(), which.numpy())
    first = torch.tensor([int((which == which[j]).nonzero()[0]) for j in range(40)], dtype=torch.int32)
    if name == "reciprocal":  # all join the first of them at once
        zero = merges.height[0].cpu() == 0
        assert torch.equal(merges.parent[0].cpu()[zero], first[zero])


# Many layers in one call


def network(device: str) -> list[ops.Layer]:
    """Layers of all shapes, types, memory formats and magnitudes, some of them with few of their filters active."""
    generator = torch.Generator().manual_seed(7)

    def weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    reverse = torch.arange(9, -1, -1, device=device)
    some = torch.tensor([8, 3, 7, 0, 2], dtype=torch.int32, device=device)
    layers = [
        ops.Layer(weight(9, 2, 3, 3)),
        ops.Layer(weight(9, 2, 3, 2, dtype=torch.float16).contiguous(memory_format=torch.channels_last)),
        ops.Layer(weight(20, 2, 1, 1, dtype=torch.bfloat16)),
        ops.Layer(weight(11, 5, 2, 3)[:, ::2, :, 1:], None, torch.tensor([2, 0], device=device)),
        ops.Layer(weight(3, 9, 2, 4).transpose(0, 1).permute(0, 1, 3, 2), some, torch.tensor([2], device=device)),
        ops.Layer(weight(9, 1, 3, 1).expand(9, 2, 3, 3), some),
        ops.Layer(weight(10, 3, 2, 2, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last), reverse,
                  torch.tensor([2, 1], dtype=torch.int32, device=device)),
        ops.Layer(weight(9, 4, 1, 1) * 1e-30, some, torch.tensor([3, 1, 0], device=device)),
        ops.Layer(weight(7, 1, 3, 3) * 1e25),
        ops.Layer(weight(66, 1, 2, 2, dtype=torch.float16)),
        ops.Layer(torch.zeros(5, 1, 3, 3, device=device)),
    ]  # fmt: skip
    return [layer._replace(name=f"layer {i}") for i, layer in enumerate(layers)]


def test_a_layer_is_the_same_in_any_company(device):
    """Bit for bit what its kernels, gathered and as float32, give alone; and the clusters that the reference finds."""
    layers = network(device)
    keeps = [max(1, layer.n * (i + 1) // 12) for i, layer in enumerate(layers)]
    found = ops.cluster_network(layers, keeps, impl="triton")
    reference = ops.cluster_network(layers, keeps, impl="reference")
    for layer, keep, (merges, clusters), (_, wanted) in zip(layers, keeps, found, reference, strict=True):
        alone = ops.ward(layer.points().float().clone(), impl="triton")
        assert same_bits(merges, alone), layer.name
        labels, h = ops.cut(alone, keep, "triton")
        assert torch.equal(clusters.labels, labels) and clusters.h == h, layer.name
        assert torch.equal(clusters.labels, wanted.labels), layer.name
        assert clusters.h == pytest.approx(wanted.h, rel=1e-5), layer.name
        if layer.weight.dtype == torch.float32:
            assert merges.scale == 4.0 ** scale_of(layer.points()), layer.name
    assert {merges.scale == 1 for merges, _ in found} == {True, False}


def test_other_linkages_in_company(device):
    layers = [layer for layer in network(device) if layer.n < 15]
    for layer, merges in zip(layers, ops.ward_network(layers, "average", "triton"), strict=True):
        assert same_bits(merges, ops.ward(layer.points().float(), "average", "triton")), layer.name


@pytest.mark.parametrize("name", ALGORITHMS)
def test_problems_do_not_see_each_other(name, device):
    """Alone, together, and with what torch.empty gives filled with NaN and the largest integers: the same bits."""
    method, algorithm, d = ALGORITHMS[name]
    P, n = (300, 200) if device == "cuda" else (3, 10)
    points = points_of(gaussian, P, n, d, 1, device)
    points[1] = points_of(half_zero, 1, n, d, 1, device)[0]
    points[2] = points_of(grid, 1, n, d, 1, device)[0]
    together = ops.ward(points, method, "triton", algorithm)
    for p in range(3):
        alone = ops.ward(points[p : p + 1], method, "triton", algorithm)
        assert same_bits(alone, together.problems(p, p + 1)), f"problem {p}"
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=device).isnan().all(), "torch fills memory with NaN"
        poisoned = ops.ward(points, method, "triton", algorithm)
        labels, h = ops.cut(poisoned, n // 2, "triton")
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert same_bits(poisoned, together)
    plain = ops.cut(together, n // 2, "triton")
    assert torch.equal(labels, plain.labels) and h == plain.h
    for _ in range(5 if device == "cuda" else 0):  # a race would show
        assert same_bits(ops.ward(points, method, "triton", algorithm), together)


@pytest.mark.parametrize("name", ["chain", "reciprocal", "line", "average"])
def test_little_memory_means_more_launches(name, device, monkeypatch):
    method, algorithm, d = ALGORITHMS[name]
    layers = [
        ops.Layer(points_of(gaussian, 3, n, d, n, device).transpose(0, 1).unsqueeze(2), name=str(n)) for n in (5, 7)
    ]
    plain = ops.ward_network(layers, method, "triton", algorithm)
    runs = []
    run = Configuration.run
    monkeypatch.setattr(
        Configuration, "run", lambda self, programs, *arguments: (
            runs.append((self.kernel.__name__, programs, arguments[-2].numel() + arguments[-1].numel())),
            run(self, programs, *arguments),
        )
    )  # fmt: skip
    kernel = launch.configuration(7, d, method, algorithm).kernel
    each = {n: sum(launch.scratch(kernel, n, d, method)) for n in (5, 7)}
    launches = {}
    for words in (1, 2 * each[7], 3 * each[7] + each[5], 10**6):
        monkeypatch.setattr(launch, "SCRATCH_BYTES", 4 * words)
        runs.clear()
        again = ops.ward_network(layers, method, "triton", algorithm)
        assert all(same_bits(a, b) for a, b in zip(again, plain, strict=True)), f"{words} numbers"
        clustering = [(programs, memory) for kernel, programs, memory in runs if kernel != "magnitude_kernel"]
        assert sum(programs for programs, _ in clustering) == 6
        assert all(memory <= max(words, each[7]) for _, memory in clustering)
        launches[words] = len(clustering)
    assert list(launches.values())[0] == 6 and list(launches.values())[2:] == [2, 1]
    assert 3 <= launches[2 * each[7]] <= 4


@pytest.mark.parametrize("name", ALGORITHMS)
def test_order_of_the_filters_does_not_matter(name, device):
    method, algorithm, d = ALGORITHMS[name]
    P, n = (64, 150) if device == "cuda" else (1, 19)
    seed = seed_of(name, "order")
    points = points_of(gaussian, P, n, d, seed, device)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(device)
    plain, moved = (ops.ward(x, method, "triton", algorithm) for x in (points, points[:, order]))
    torch.testing.assert_close(plain.height.sort().values, moved.height.sort().values, rtol=1e-5, atol=0)
    for p in range(P):
        a, b = (ops.cut(m.problems(p, p + 1), n // 3, "triton") for m in (plain, moved))
        assert same_partition(a.labels[0][order].cpu().numpy(), b.labels[0].cpu().numpy()), f"seed {seed} problem {p}"


# The cut


def made_up(P: int, n: int, seed: int, device: str) -> ops.Merges:
    """Any forest: parents are lower and heights fall from the root on; many of them equal, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    height = torch.randint(0, n, (P, n), generator=generator).sort(dim=1, descending=True).values * 0.37
    height[:, 0] = torch.inf
    below = torch.rand(P, n, generator=generator)
    parent = (below * torch.arange(n)).int()
    parent[0] = (torch.arange(n) - 1).clamp(min=0)  # a path
    return ops.Merges(parent.to(device), height.to(device), "ward")


@pytest.mark.parametrize("P, n", [(1, 1), (3, 2), (2, 127), (2, 128), (2, 300)])
def test_cut_is_the_specification(P, n, device):
    merges = made_up(P, n, n, device)
    valid(merges)
    for keep in {1, 2, n // 3, n // 2, n - 2, n - 1, n} & set(range(1, n + 1)):
        found, wanted = ops.cut(merges, keep, "triton"), ops.cut(merges, keep, "reference")
        assert torch.equal(found.labels, wanted.labels) and found.h == wanted.h, f"keep {keep}"
        assert found.labels.dtype == torch.int32 and int(found.labels.max()) < keep


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU: too much for the interpreter")
def test_cut_of_many_large_problems():
    merges = made_up(700, 4096, 0, "cuda")
    for keep in (1, 1000, 4095, 4096):
        found, wanted = ops.cut(merges, keep, "triton"), ops.cut(merges, keep, "reference")
        assert torch.equal(found.labels, wanted.labels) and found.h == wanted.h, f"keep {keep}"


def test_an_event_keeps_what_it_reads(device):
    """Launches may come long after the plan: weights and index lists must be there, even if no one else has them."""

    def layers():
        weight = points_of(gaussian, 3, 9, 4, 0, device).transpose(0, 1).unsqueeze(2)
        return [ops.Layer(weight, torch.arange(1, 8, device=device), torch.arange(2, device=device))]

    kept = layers()
    read = [weakref.ref(tensor) for tensor in kept[0][:3]]
    wanted = launch.cluster(launch.prepare(kept))
    plan = launch.prepare(kept)
    del kept
    assert all(tensor() is not None for tensor in read)
    assert torch.equal(launch.cluster(plan).height, wanted.height)
    del plan
    assert not any(tensor() is not None for tensor in read), "and not longer than it can be launched"


def test_nothing_merges_if_all_are_kept(device):
    points = points_of(duplicated, 2, 12, 4, 0, device)
    layer = ops.Layer(points.transpose(0, 1).unsqueeze(2))
    (merges, (labels, h)), (_, (others, low)) = ops.cluster_network([layer, layer], [12, 11], impl="triton")
    assert (merges.height == 0).any()
    assert h == 0 and torch.equal(labels, torch.arange(12, dtype=torch.int32, device=device).expand(2, 12))
    assert low == 0 and int(others.max()) < 11, "with one less the copies do"
    assert ops.cut(merges, 12, "triton").h == 0


def test_cut_of_some_problems_of_a_network(device):
    """Views that begin anywhere in a larger buffer; every layer with its own number to keep."""
    layers = [
        ops.Layer(points_of(family, P, n, d, n, device).transpose(0, 1).unsqueeze(2), name=str(n))
        for family, P, n, d in ((gaussian, 3, 11, 4), (clustered, 2, 13, 1), (half_zero, 3, 7, 9), (gaussian, 1, 1, 4))
    ]
    keeps = [3, 9, 2, 1]
    found = ops.cluster_network(layers, keeps, impl="triton")
    prepared = launch.prepare(layers)
    forests = launch.cluster(prepared)
    launch.cut_height(prepared, forests, torch.tensor(keeps, dtype=torch.int32, device=device))
    labels, clusters = launch.label(prepared, forests)
    assert torch.equal(labels, torch.cat([own.labels.flatten() for _, own in found]))
    counted = [len(row.unique()) for _, own in found for row in own.labels]
    assert clusters.tolist() == counted
    for keep, (merges, own) in zip(keeps, found, strict=True):
        wanted = ops.cut(merges, keep, "reference")
        assert torch.equal(own.labels, wanted.labels) and own.h == wanted.h
    merges = found[2][0].problems(1, 3)  # begins at 2 * 13 + 3 * 11 + 7
    assert merges.height.storage_offset() % 4 != 0, "not aligned to 16 bytes"
    for part in (merges, merges._replace(parent=merges.parent.T.contiguous().T)):
        for keep in (1, 4, 7):
            one, other = ops.cut(part, keep, "triton"), ops.cut(part, keep, "reference")
            assert torch.equal(one.labels, other.labels) and one.h == other.h


def test_the_cut_is_in_true_units(device):
    points = points_of(gaussian, 1, 10, 4, 0, device)
    for e in (-70, 60):
        merges, scaled = (ops.ward(x, impl="triton") for x in (points, points * 2.0**e))
        assert scaled.scale != 1 and np.allclose(scaled.to_scipy(), merges.to_scipy() * [1, 1, 2.0**e, 1])
        assert ops.cut(scaled, 5, "triton").h == pytest.approx(ops.cut(merges, 5, "triton").h * 4.0**e, rel=1e-6)
        layer = ops.Layer((points * 2.0**e).transpose(0, 1).unsqueeze(2))
        ((_, clusters),) = ops.cluster_network([layer], [5], impl="triton")
        assert clusters.h == ops.cut(scaled, 5, "triton").h


# What can go wrong


@pytest.mark.parametrize(
    ("value", "dtype"),
    [("nan", torch.float32), ("inf", torch.float32), ("-inf", torch.float32), ("-inf", torch.float16),
     ("nan", torch.bfloat16)], ids=str,
)  # fmt: skip
def test_a_weight_that_is_not_finite_is_named(value, dtype, device):
    weight = torch.randn(4, 3, 2, 3, device=device).to(dtype)
    bad = weight.clone()
    bad[3, 2, 1, 2] = float(value)
    layers = [ops.Layer(weight, name="stem"), ops.Layer(bad, name="body"), ops.Layer(weight, name="head")]
    with pytest.raises(RepruneError, match="body has NaN or infinity in problem 2"):
        ops.ward_network(layers, impl="triton")
    forests = launch.cluster(launch.prepare(layers))
    assert [report.clustered for report in launch.read_report(forests.report)] == [True, False, True]
    pruned = ops.Layer(bad, torch.arange(3, device=device)), ops.Layer(bad, None, torch.tensor([1, 0], device=device))
    assert len(ops.ward_network(pruned, impl="triton")) == 2, "a filter that is not active may be anything"


NAN_IN_CLUSTER_NETWORK = """
import os
import sys
import torch
if sys.argv[1] == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
from reprune_triton import ops

empty = torch.empty


def rubbish(*shape, **options):
    memory = empty(*shape, **options)
    return memory.fill_(1 << 30 if memory.dtype == torch.int32 else 0)


torch.empty = rubbish
weight = torch.ones(5, 2, 2, 2, device=sys.argv[1])
layers = [ops.Layer(weight, name="stem"), ops.Layer(weight / 0, name="body"), ops.Layer(weight, name="head")]
ops.cluster_network(layers, [3, 3, 3], impl="triton")
"""


def test_the_cut_does_not_follow_what_was_not_clustered(device):
    """In a process of its own, which following parents that were never written ends."""
    done = subprocess.run(
        [sys.executable, "-c", NAN_IN_CLUSTER_NETWORK, device], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert "RepruneError: body has NaN or infinity" in done.stderr, f"{done.returncode}\n{done.stderr[-600:]}"


@pytest.mark.parametrize("index", [-1, 6, 1 << 40])
def test_an_index_that_does_not_exist_is_named_and_not_followed(index, device):
    weight = torch.randn(6, 6, 1, 2, device=device)
    wrong = torch.tensor([0, index], device=device)
    right = torch.tensor([0, 5], device=device)
    for filters, inputs in ((wrong, None), (None, wrong), (wrong, right)):
        layers = [ops.Layer(weight, right, right), ops.Layer(weight, filters, inputs, "body")]
        with pytest.raises(RepruneError, match="body: (filters|inputs) has an index outside 0 .. 5"):
            ops.ward_network(layers, impl="triton")
        forests = launch.cluster(launch.prepare(layers))  # without the check that ops makes for the CPU
        assert [report.clustered for report in launch.read_report(forests.report)] == [True, False]


def without_magnitudes(monkeypatch) -> None:
    """NaN reaches the clustering: its kernel lets everything pass."""

    class Blind:
        def run(self, programs: int, *arguments: torch.Tensor) -> None: ...

    monkeypatch.setattr(launch, "MAGNITUDE", Blind())


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, as the interpreter
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("bad", ["all", "one", "infinities"])
def test_every_loop_ends(bad, name, device, monkeypatch):
    """Even if no distance is a number. What comes out is no forest, but it points nowhere else."""
    method, algorithm, d = ALGORITHMS[name]
    good = points_of(gaussian, 1, 9, d, 0, device)
    points = good.clone()
    if bad == "all":
        points[:] = torch.nan
    elif bad == "one":
        points[0, 4] = torch.nan
    else:
        points[0, 2:4] = torch.inf
    layers = [ops.Layer(x.transpose(0, 1).unsqueeze(2)) for x in (good, points)]
    without_magnitudes(monkeypatch)
    prepared = launch.prepare(layers, method, algorithm)
    forests = launch.cluster(prepared)
    assert ((forests.parent >= 0) & (forests.parent < 9)).all()
    assert (forests.work[:, 0] <= 9 * 10).all()
    launch.cut_height(prepared, forests, torch.tensor([5, 5], dtype=torch.int32, device=device))
    labels, _ = launch.label(prepared, forests)
    assert ((labels >= 0) & (labels < 9)).all(), "what reads them next may follow them"
    first, second = launch.read_report(forests.report)
    assert first.finished and first.clustered and second.clustered
    if name in ("reciprocal", "line") and bad == "all":
        assert not second.finished


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_what_does_not_come_to_an_end_is_named(device, monkeypatch):
    good = points_of(gaussian, 1, 5, 4, 0, device)
    layers = [ops.Layer(x.transpose(0, 1).unsqueeze(2), name=name) for x, name in ((good, "stem"), (good / 0, "body"))]
    without_magnitudes(monkeypatch)
    with pytest.raises(RepruneError, match="body: the clustering did not come to an end. .*impl=.reference"):
        ops.ward_network(layers, "ward", "triton", "reciprocal")


# The plan of an event


def resnet50() -> list[ops.Layer]:
    """The convs of a ResNet-50 that REPrune prunes: the first two of each block. Weights without memory."""
    layers, n_in = [], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for _ in range(blocks):
            for shape in ((width, n_in, 1, 1), (width, width, 3, 3)):
                layers.append(ops.Layer(torch.empty(1).expand(shape)))
            n_in = 4 * width
    return layers


def test_memory_of_a_resnet50_event():
    layers = resnet50()
    assert sum(layer.problems for layer in layers) == 16896
    for method, algorithm in (("ward", "auto"), ("ward", "reciprocal"), ("ward", "chain"), ("average", "auto")):
        _, launches = launch.rows_and_launches(layers, method, algorithm)
        assert max(part.floats + part.ints for part in launches) * 4 <= 256 * 10**6 * 1.05, (method, algorithm)
        programs = sum(end - begin for one in launches for _, begin, end in one.parts)
        assert programs == 16896
    rows, launches = launch.rows_and_launches(layers)
    assert len(launches) <= 7 and len(rows) == len(layers)


def test_one_launch_for_each_kernel_and_area_largest_first():
    shapes = [
        (100, 3, 3), (300, 2, 3), (64, 5, 3), (65, 1, 3), (40, 2, 5), (50, 4, 3), (200, 2, 5), (90, 3, 1), (130, 2, 1),
        (70, 1, 1),
    ]  # n, columns, k
    layers = [ops.Layer(torch.empty(1).expand(n, columns, k, k)) for n, columns, k in shapes]
    rows, launches = launch.rows_and_launches(layers, seeds=[(number, 2**40 + number) for number in range(10)])
    assert len(rows) == len(layers)
    numbers = [[row for row, _, _ in one.parts] for one in launches]
    assert list(zip((one.configuration.kernel.__name__ for one in launches), numbers, strict=True)) == [
        ("reciprocal_kernel", [1, 0, 3]), ("chain_kernel", [2, 5]), ("chain_kernel", [4]), ("reciprocal_kernel", [6]),
        ("line_kernel", [7, 9]), ("line_kernel", [8]),
    ]  # fmt: skip
    assert sorted(number for some in numbers for number in some) == list(range(10))
    for one in launches:
        assert one.parts == [(number, 0, shapes[number][1]) for number, _, _ in one.parts]
        at = 0
        for number, _, _ in one.parts:  # side by side
            assert rows[number].floats == at
            at += rows[number].floats_each * rows[number].columns
        assert at == one.floats
    assert [row.problem for row in rows] == list(np.cumsum([0] + [columns for _, columns, _ in shapes[:-1]]))
    assert [row.forest for row in rows] == list(np.cumsum([0] + [n * columns for n, columns, _ in shapes[:-1]]))
    assert [row.filter for row in rows] == list(np.cumsum([0] + [n for n, _, _ in shapes[:-1]]))
    assert [row.tie_seed for row in rows] == [row.layer for row in rows] == list(range(10))
    assert [row.draw_seed - 2**40 for row in rows] == list(range(10))
    assert [(row.n, row.columns, row.d, row.kernel_w) for row in rows] == [
        (n, columns, k * k, k) for n, columns, k in shapes
    ]


def test_a_layer_in_parts_has_a_row_for_each(monkeypatch):
    layer = ops.Layer(torch.empty(1).expand(100, 10, 3, 3))
    each = sum(reciprocal.scratch(100, 9))
    monkeypatch.setattr(launch, "SCRATCH_BYTES", 4 * 4 * each)
    rows, launches = launch.rows_and_launches([layer])
    assert [one.parts for one in launches] == [[(0, 0, 4)], [(1, 4, 8)], [(2, 8, 10)]]
    for row, one in zip(rows, launches, strict=True):
        floats_each, ints_each = reciprocal.scratch(100, 9)
        ((_, begin, end),) = one.parts
        assert row.floats + begin * floats_each == 0 == row.ints + begin * ints_each, "where the first one's begins"
        assert (one.floats, one.ints) == ((end - begin) * floats_each, (end - begin) * ints_each)


def test_scratch_memory_is_what_the_docstrings_say():
    assert launch.scratch(chain.chain_kernel, 10, 9, "ward") == (110, 10)
    assert launch.scratch(chain.chain_kernel, 10, 9, "average") == (210, 10)
    assert launch.scratch(line.line_kernel, 10, 1, "ward") == (120, 30)
    assert launch.scratch(reciprocal.reciprocal_kernel, 33, 9, "ward") == (64 * 26, 64 * 6)
