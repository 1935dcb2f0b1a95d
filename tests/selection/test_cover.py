"""Greedy coverage, its ties, the random bits behind them, and merge counts."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from reprune_triton import ops
from reprune_triton.selection import reference
from reprune_triton.selection.rng import derive_seed, derive_seeds, philox, random_bits


def random_labels(n_in: int, n_out: int, clusters: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, clusters, (n_in, n_out)))


def sets_of(labels: torch.Tensor) -> list[set]:
    return [{(j, int(label)) for j, label in enumerate(column)} for column in labels.T]


# In a process with a GPU the kernels are compiled, and take no tensors of the CPU: see test_coverage.
IMPLS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="compiled"))]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tie", ops.TIES)
def test_greedy_replayed_with_sets(tie, impl):
    for seed, (n_in, n_out, clusters, keep) in enumerate(
        [(1, 1, 1, 1), (1, 9, 4, 9), (3, 5, 9, 1), (8, 16, 6, 8), (20, 37, 12, 18), (64, 64, 20, 32), (5, 20, 3, 20)]
    ):
        labels = random_labels(n_in, n_out, clusters, seed)
        score = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, n_out)).float()  # with equal scores
        cover = ops.cover(labels, keep, tie, seed, impl, score)
        filters, seen, gains = sets_of(labels), set(), []
        assert len(set(cover.order.tolist())) == keep
        for step, choice in enumerate(cover.order.tolist()):
            left = [i for i in range(n_out) if i not in cover.order[:step].tolist()]
            best = max(len(filters[i] - seen) for i in left)
            tied = [i for i in left if len(filters[i] - seen) == best]
            if tie == "index":
                assert choice == tied[0], f"seed {seed} step {step}"
            elif tie != "random":
                assert choice == max(tied, key=lambda i: (score[i].item(), -i)), f"seed {seed} step {step}"
            assert choice in tied, f"seed {seed} step {step}"
            gains.append(best)
            seen |= filters[choice]
        assert cover.gains.tolist() == gains and gains == sorted(gains, reverse=True)
        assert cover.order.dtype == cover.gains.dtype == torch.int32
        assert cover.covered == len(seen) == sum(gains)
        assert cover.clusters == len(set().union(*filters))
        assert cover.coverage == len(seen) / cover.clusters


@pytest.mark.parametrize("impl", IMPLS)
def test_at_least_63_percent_of_the_best_cover(impl):
    for seed in range(30):
        labels = random_labels(4, 9, 4, seed)
        filters = sets_of(labels)
        for keep in (2, 3, 4):
            best = max(len(set().union(*chosen)) for chosen in itertools.combinations(filters, keep))
            covered = ops.cover(labels, keep, seed=seed, impl=impl).covered
            assert (1 - 1 / math.e) * best <= covered <= best, f"seed {seed} keep {keep}"


def test_labels_may_be_any_integers():
    labels = random_labels(6, 20, 5, 1)
    plain = ops.cover(labels, 10, seed=3)
    for other in (labels * 1000 - 7, labels.to(torch.int8), labels.to(torch.int32).T.contiguous().T):
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b))
                   for a, b in zip(plain, ops.cover(other, 10, seed=3), strict=True))  # fmt: skip


def test_when_everything_is_covered_the_rest_ties():
    labels = torch.zeros(3, 8, dtype=torch.int64)
    assert ops.cover(labels, 8, "index").order.tolist() == list(range(8))
    assert ops.cover(labels, 8, "index").gains.tolist() == [3] + [0] * 7
    seconds = {int(ops.cover(labels, 3, seed=seed).order[1]) for seed in range(60)}
    assert len(seconds) == 8
    assert ops.cover(labels, 2).coverage == 1.0


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2).sum() / expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_random_ties_are_uniform_at_every_step(impl):
    n, seeds = 6, 1500 if impl == "reference" else 300
    labels = torch.arange(n).expand(2, n)  # all alike: every step ties among all that are left
    picks = np.array([ops.cover(labels, 3, seed=seed, impl=impl).order.tolist() for seed in range(seeds)])
    for step in range(3):
        assert chi_square(np.bincount(picks[:, step], minlength=n)) < 25.7, "5 degrees of freedom, p = 1e-4"
    pairs = np.unique(picks[:, 0] * n + picks[:, 1], return_counts=True)[1]
    assert len(pairs) == n * (n - 1) and chi_square(pairs) < 66, "29 degrees of freedom, p = 1e-4"


def test_same_seed_same_picks():
    labels = random_labels(10, 300, 4, 0)
    first = ops.cover(labels, 250, seed=2**62 + 5)
    assert torch.equal(first.order, ops.cover(labels, 250, seed=2**62 + 5).order)
    assert not torch.equal(first.order, ops.cover(labels, 250, seed=5).order), "the high bits of a seed count"


@pytest.mark.parametrize(("n", "keep"), [(50, 50), (700, 200)])  # the second needs more bits than one block holds
def test_random_ties_use_the_documented_bits(n, keep):
    seed = 99
    order = ops.cover(torch.arange(n).expand(1, n), keep, seed=seed).order.tolist()
    left = list(range(n))
    for step, choice in enumerate(order):
        bits = random_bits(seed, step * n, n) >> 1
        assert choice == max(left, key=lambda i: (int(bits[i]), -i))
        left.remove(choice)


def test_all_31_bits_decide_a_tie(monkeypatch):
    labels = torch.arange(4).expand(1, 4)
    for bits, first in (([0, 2, 0, 0], 1), ([0, 0, 1 << 31, 2], 2), ([4, 4, 5, 4], 0), ([4, 4, 6, 6], 2)):
        monkeypatch.setattr(reference, "random_bits", lambda *given, bits=bits: torch.tensor(bits))
        assert ops.cover(labels, 1).order.tolist() == [first], bits


def test_philox_known_answers():
    """The vectors that Random123 publishes for philox4x32-10."""
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    for given, wanted in (
        ((0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        c0, c1, c2, c3, k0, k1 = given
        assert philox(c0, c1, c2, c3, k0, k1) == wanted
        tensors = [torch.tensor([c]) for c in given[:4]]
        assert tuple(int(word) for word in philox(*tensors, k0, k1)) == wanted


@triton.jit
def _randint(out_ptr, seed, start, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.randint(seed, start + offs))


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**40 + 12345, 2**63 - 1])
def test_random_bits_are_those_of_triton(seed):
    device = "cuda" if torch.cuda.is_available() and not triton.knobs.runtime.interpret else "cpu"
    for start in (0, 1 << 20, (1 << 24) - 256):
        out = torch.empty(256, dtype=torch.int32, device=device)
        _randint[(1,)](out, seed, start, BLOCK=256)
        assert torch.equal(out.cpu().long() & 0xFFFFFFFF, random_bits(seed, start, 256)), start


def test_random_bits_do_not_depend_on_the_blocks():
    whole = random_bits(7, 5, 150_000)
    assert torch.equal(whole[70_000:70_100], random_bits(7, 70_005, 100))
    assert whole.min() >= 0 and whole.max() < 2**32
    assert abs(whole.double().mean().item() / 2**32 - 0.5) < 5 / math.sqrt(12 * len(whole))
    assert len(whole.unique()) > 149_990


def test_derived_seeds_differ():
    names = [(a, b) for a in range(20) for b in range(20)] + [(a,) for a in range(20)] + [(2**40, 1), (-1, 0)]
    seeds = {derive_seed(0, *name) for name in names}
    assert len(seeds) == len(names) and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, 1, 2) != derive_seed(0, 2, 1) != derive_seed(1, 2, 1)
    assert derive_seed(5, 1, 2) == derive_seed(5, 1, 2)


def test_seeds_of_all_layers_are_those_of_each():
    for seed, epoch in ((0, 1), (2**40 + 3, 179), (2**63 - 1, 0)):
        wanted = [[derive_seed(seed, epoch, layer, stream) for stream in range(2)] for layer in range(70)]
        assert derive_seeds(seed, epoch, 70, 2).tolist() == wanted
    assert derive_seed(7, 2, 3, 1) == 7597340813229092902, "a change of these numbers changes every run"


def test_keep_count_is_exact_where_floats_are_not():
    wrong = 0
    for percent in range(100):
        s = percent / 100
        for n in range(1, 2049):
            exact = n - -(-percent * n // 100)
            assert ops.keep_count(n, s) == exact, (n, s)
            wrong += math.ceil((1 - s) * n) != n - math.floor(Fraction(percent, 100) * n)
    assert wrong > 1000, "the float formula for the same rounding misses often"
    assert ops.keep_count(100, 0.07) == 93 and 100 - math.ceil(0.07 * 100) == 92
    assert ops.keep_count(10, "0.3") == ops.keep_count(10, Fraction(3, 10)) == 7


@pytest.mark.parametrize("linkage", ops.LINKAGES)
@pytest.mark.parametrize("kernel", [1, 3])
def test_select_filters_chains_the_steps(linkage, kernel):
    weight = torch.randn(24, 7, kernel, kernel, generator=torch.Generator().manual_seed(kernel)).requires_grad_()
    for keep in (1, 11, 24):
        cover, clusters = ops.select_filters(weight, keep, linkage=linkage, seed=4)
        points = weight.detach().permute(1, 0, 2, 3).reshape(7, 24, -1)
        wanted = ops.cut(ops.ward(points, linkage), keep)
        assert torch.equal(clusters.labels, wanted.labels) and clusters.h == wanted.h
        assert torch.equal(cover.order, ops.cover(wanted.labels, keep, seed=4).order)
        assert len(cover.order) == keep and 0 < cover.coverage <= 1
    norms = weight.detach().flatten(1).norm(dim=1)
    by_norm, _ = ops.select_filters(weight, 11, tie="norm")
    by_gamma, _ = ops.select_filters(weight, 11, tie="gamma", score=norms)
    assert torch.equal(by_norm.order, by_gamma.order)
    assert int(by_norm.order[0]) == int(norms.argmax()), "every filter covers as much at the first step"


def test_no_merge_covers_in_any_order():
    cover, clusters = ops.select_filters(torch.randn(8, 3, 3, 3), 8)
    assert clusters.h == 0 and cover.coverage == 1 and sorted(cover.order.tolist()) == list(range(8))
