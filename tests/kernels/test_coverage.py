"""The coverage kernels choose what the reference chooses, bit for bit: interpreted, or on a GPU where there is one."""

import numpy as np
import pytest
import torch

from reprune_triton import ops
from reprune_triton.kernels.clustering import coverage, launch, table
from reprune_triton.selection import reference, rng


def labels_of(n_in: int, n_out: int, clusters: int, seed: int, device: str = "cpu") -> torch.Tensor:
    """Random clusters, numbered in every channel by their lowest member, as the cut does."""
    found = np.random.default_rng(seed).integers(0, clusters, (n_in, n_out))
    rows = []
    for row in found:
        _, first, number = np.unique(row, return_index=True, return_inverse=True)
        rows.append(np.argsort(np.argsort(first))[number])
    return torch.tensor(np.array(rows), dtype=torch.int32, device=device)


SIZES = [  # input channels, filters, clusters at most, filters to keep
    (1, 1, 1, 1), (1, 9, 4, 9), (3, 5, 9, 1), (8, 16, 6, 8), (20, 37, 12, 18), (3, 20, 2, 20), (2, 40, 1, 3),
    (5, 33, 33, 33), (40, 70, 5, 20), (1, 17, 17, 17),
]  # fmt: skip
LARGE = [(3, 600, 300, 4), (1100, 6, 4, 3), (2, 513, 2, 2)]  # several blocks of filters, of columns, of members
COMPILED = [(2048, 512, 240, 256), (64, 4096, 900, 2048), (5000, 40, 9, 40), (300, 1000, 30, 500)]


@pytest.mark.parametrize("tie", ops.TIES)
def test_the_kernel_chooses_what_the_reference_chooses(tie, device):
    # Of the large ones, which the interpreter takes long for, one order by bits and one by scores.
    sizes = SIZES + (LARGE if tie in ("random", "norm") else []) + (COMPILED if device == "cuda" else [])
    for seed, (n_in, n_out, clusters, keep) in enumerate(sizes):
        labels = labels_of(n_in, n_out, clusters, seed, device)
        score = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, n_out)).float().to(device)  # some are equal
        ours = ops.cover(labels, keep, tie, 2**40 + seed, "triton", score)
        theirs = ops.cover(labels.cpu(), keep, tie, 2**40 + seed, "reference", score.cpu())
        where = f"seed {seed}"
        assert ours.order.tolist() == theirs.order.tolist() and ours.gains.tolist() == theirs.gains.tolist(), where
        assert ours.order.dtype == ours.gains.dtype == torch.int32
        assert (ours.covered, ours.clusters) == (theirs.covered, theirs.clusters), where


def test_all_bits_decide_a_tie(device):
    """Of so many filters that tie, several have the upper bits of the largest key, and the lower ones decide."""
    labels = torch.arange(4096, dtype=torch.int32, device=device)[None]
    ours = ops.cover(labels, 12, "random", 3, "triton")
    assert ours.order.tolist() == ops.cover(labels.cpu(), 12, "random", 3, "reference").order.tolist()


def test_labels_may_be_any_integers(device):
    labels = labels_of(6, 20, 5, 1, device)
    plain = ops.cover(labels, 10, seed=3, impl="triton")
    for other in (labels.long() * 1000 - 7, labels.to(torch.int8), labels.T.contiguous().T, 4 - labels):
        found = ops.cover(other, 10, seed=3, impl="triton")
        assert torch.equal(found.order, plain.order) and found[2:] == plain[2:]


def test_nothing_depends_on_memory_that_was_not_written(device):
    """Memory is full of other numbers each time."""
    labels = labels_of(20, 37, 12, 0, device)
    found = []
    for poison in (False, True):
        torch.use_deterministic_algorithms(poison)  # fills what is allocated
        try:
            found.append(ops.cover(labels, 18, seed=1, impl="triton"))
        finally:
            torch.use_deterministic_algorithms(False)
    assert torch.equal(found[0].order, found[1].order) and found[0][2:] == found[1][2:]


class Network:
    """Three layers with active filters and inputs, and labels of their clusters, as a cut leaves them."""

    def __init__(self, device: str):
        generator = torch.Generator().manual_seed(0)
        self.layers, self.labels = [], []
        for number, (n_out, n_in) in enumerate(((9, 4), (20, 6), (13, 1))):
            filters = torch.randperm(n_out, generator=generator)[: n_out - number].sort().values.to(device)
            inputs = None if number else torch.arange(1, n_in).to(device)
            weight = torch.randn(n_out, n_in, 1, 2, generator=generator).to(device)
            self.layers.append(ops.Layer(weight, filters, inputs, f"conv{number}"))
            self.labels.append(labels_of(self.layers[-1].problems, self.layers[-1].n, 5, number, device))
        self.flat = torch.cat([own.flatten() for own in self.labels])
        self.keep = torch.tensor([4, 20, 1], dtype=torch.int32, device=device)  # of the second more than there are
        self.seeds = [(11, 2**35), (2**50, 0), (7, 2**62)]

    def cover(self, bad: int | None = None, **options) -> launch.Covers:
        prepared = launch.prepare(self.layers, seeds=self.seeds, **options)
        report = torch.zeros(3, table.REPORT.value, dtype=torch.int32, device=self.flat.device)
        if bad is not None:
            report[bad, table.MAGNITUDE.value] = table.INFINITY_BITS.value
        return launch.cover(prepared, report, launch.membership(prepared, report, self.flat), self.keep, None)

    def expected(self, number: int) -> tuple[list[int], list[int]]:
        """Kept filters by their own number, and the counts."""
        layer, keep = self.layers[number], min(int(self.keep[number]), self.layers[number].n)
        order, _, *counts = reference.cover(self.labels[number].cpu(), keep, "random", self.seeds[number][0], None)
        return sorted(layer.filters.cpu()[order].tolist()), counts


def kept_of(found: launch.Covers, network: Network) -> list[list[int]]:
    parts = found.kept.cpu().split([layer.n_out for layer in network.layers])
    assert all(set(part.tolist()) <= {0, 1} for part in parts)
    return [part.nonzero().flatten().tolist() for part in parts]


def test_all_layers_in_one_launch(device):
    network = Network(device)
    found = network.cover()
    wanted = [network.expected(number) for number in range(3)]
    assert kept_of(found, network) == [kept for kept, _ in wanted]
    assert found.totals.tolist() == [counts for _, counts in wanted]


@pytest.mark.parametrize("chosen", [[1], [0, 2], []])
def test_only_the_layers_of_this_process_are_touched(chosen, device):
    network = Network(device)
    found = network.cover(chosen=chosen)
    wanted = [network.expected(number) if number in chosen else ([], [0, 0]) for number in range(3)]
    assert kept_of(found, network) == [kept for kept, _ in wanted]
    assert found.totals.tolist() == [counts for _, counts in wanted]


def test_a_layer_that_was_not_clustered_is_left_alone(device):
    network = Network(device)
    first, (_, *rest) = network.labels[0].numel(), network.labels
    network.flat[:first] = 2**30  # such labels would lead anywhere
    assert rest
    found = network.cover(bad=0)
    assert kept_of(found, network) == [[], network.expected(1)[0], network.expected(2)[0]]
    assert found.totals[0].tolist() == [0, 0]


def test_members_places_and_words_describe_the_clusters(device):
    network = Network(device)
    prepared = launch.prepare(network.layers)
    report = torch.zeros(3, table.REPORT.value, dtype=torch.int32, device=device)
    found = launch.membership(prepared, report, network.flat)
    start = 0
    for layer, labels in zip(network.layers, network.labels, strict=True):
        stop = start + layer.n * layer.problems
        words, members = (
            part[start:stop].view(layer.problems, layer.n).tolist() for part in (found.cluster, found.member)
        )
        places = found.place[start:stop].view(layer.n, layer.problems).tolist()
        for j, row in enumerate(labels.tolist()):
            for i, label in enumerate(row):
                others = {k for k, other in enumerate(row) if other == label}
                at = places[i][j]
                size = words[j][at] & coverage.SIZE.value
                assert words[j][at] >> 16 == coverage.NEVER.value and size == len(others)
                assert set(members[j][at : at + size]) == others
        start = stop
    assert found.totals[:, 1].tolist() == [sum(int(row.max()) + 1 for row in own) for own in network.labels]


def test_bits_are_those_of_every_layer(device):
    network = Network(device)
    bits = launch.draw_bits(launch.prepare(network.layers, seeds=network.seeds)).long() & 0xFFFFFFFF
    wanted = [rng.random_bits(seed, 0, x.n_out) for x, (_, seed) in zip(network.layers, network.seeds, strict=True)]
    assert torch.equal(bits.cpu(), torch.cat(wanted))


def test_two_shares_are_the_whole(device):
    """Of each layer's problems the first ones here, the others there: heights by the maximum, labels by the sum."""
    network = Network(device)

    def cut(plan, report=None):
        forests = launch.cluster(plan)
        launch.cut_height(plan, forests, keep)
        if report is not None:
            forests.report.copy_(torch.maximum(forests.report, report))
        return forests.report.clone(), launch.label(plan, forests)[0]

    keep = torch.tensor([4, 9, 6], dtype=torch.int32, device=device)
    whole = launch.prepare(network.layers)
    report, labels = cut(whole)
    columns = [layer.problems for layer in network.layers]
    shares = [[(0, 2), (0, 6), (0, 0)], [(2, columns[0]), (6, 6), (0, 1)]]
    parts = [launch.prepare(network.layers, shares=share) for share in shares]
    both = torch.maximum(*(cut(part)[0] for part in parts))
    assert torch.equal(both, report)
    assert torch.equal(sum(cut(part, both)[1] for part in parts), labels)
    assert launch.read_report(report)[0].h > 0


def test_twice_the_same_bits(device):
    size = (512, 512, 200, 256) if device == "cuda" else (9, 30, 8, 15)
    labels = labels_of(*size[:3], 0, device)
    first, second = (ops.cover(labels, size[3], seed=5, impl="triton") for _ in range(2))
    assert torch.equal(first.order, second.order) and torch.equal(first.gains, second.gains) and first[2:] == second[2:]
