"""The project's kernels: the same bits in every order of their warps, and what is found when a barrier is missing."""

import contextlib

import pytest
import torch

from ptxemu import driver
from reprune_triton import ops
from reprune_triton.kernels.clustering import chain, coverage, launch, reciprocal

ORDERS = [(driver.ANY_WARP, 8), (driver.ANY_WARP, 0), (driver.FIRST_WARP, 8), (driver.LAST_WARP, 8)]  # and quantum


def weight(family, n, columns, k):
    w = torch.randn(n, columns, k, k, generator=torch.Generator().manual_seed(n))
    if family == "half zero":
        w[::2] = 0
    if family == "zero":
        w.zero_()
    if family == "grid":
        w = (w * 1.5).round()
    if family == "duplicated":
        w = w[torch.arange(n) % 5]
    return w


def layers(n, k):
    return [ops.Layer(weight(family, n, 2, k)) for family in ("gaussian", "half zero", "zero", "grid", "duplicated")]


def event(some, linkage, algorithm):
    """All the launches of an event, and what they say."""
    planned = launch.prepare(some, linkage, algorithm, seeds=[(5, 7)] * len(some))
    keep = torch.tensor([max(1, layer.n // 2) for layer in some], dtype=torch.int32)
    forests = launch.cluster(planned)
    launch.cut_height(planned, forests, keep)
    labels, clusters = launch.label(planned, forests)
    members = launch.membership(planned, forests.report, labels)
    covers = launch.cover(planned, forests.report, members, keep, None)
    return [*forests, labels, clusters, members.totals, covers.kept, covers.totals]


@pytest.mark.parametrize(
    ("algorithm", "linkage", "n", "k"),
    [("reciprocal", "ward", 130, 2), ("chain", "ward", 65, 2), ("auto", "average", 70, 2), ("auto", "ward", 150, 1)],
)
def test_the_same_bits_in_every_order(algorithm, linkage, n, k, monkeypatch):
    some = layers(n, k)
    first = None
    for seed, (policy, quantum) in enumerate(ORDERS):
        for name, value in (("seed", driver.settings.seed + seed), ("policy", policy), ("max_quantum", quantum)):
            monkeypatch.setattr(driver.settings, name, value)
        found = event(some, linkage, algorithm)
        first = first or found
        assert all(map(torch.equal, first, found)), f"policy {policy}, quantum {quantum}"


def cover_some():
    for columns, n, clusters in ((7, 40, 5), (130, 600, 9)):
        labels = torch.randint(0, clusters, (columns, n), dtype=torch.int32)
        launch.cover_layer(labels, 30, 7, None)


CASES = {
    "reciprocal": (reciprocal.reciprocal_kernel, lambda: event(layers(70, 3), "ward", "reciprocal")),
    "chain": (chain.chain_kernel, lambda: event(layers(70, 3), "ward", "chain")),
    "membership": (coverage.membership_kernel, cover_some),
    "cover": (coverage.cover_kernel, cover_some),
}


@pytest.fixture
def restored():
    """Kernels whose source a test changes; they get it back."""
    sources = {}

    def change(kernel, old, new):
        sources.setdefault(kernel, kernel.src)
        assert old in kernel.src
        kernel._unsafe_update_src(kernel.src.replace(old, new))
        kernel.device_caches.clear()

    yield change
    for kernel, source in sources.items():
        kernel._unsafe_update_src(source)
        kernel.device_caches.clear()
    driver.clear()


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_without_its_barriers_is_found(name, restored, monkeypatch):
    kernel, run = CASES[name]
    monkeypatch.setattr(driver.settings, "budget", 3_000_000)  # it may go round in circles
    restored(kernel, "tl.debug_barrier()", "pass")
    with contextlib.suppress(driver.EmulatorError):
        run()
    assert any("race" in found.kind for found in driver.findings if found.kernel == kernel.__name__)


def test_a_store_beside_a_tensor_is_found(restored):
    restored(coverage.bits_kernel, "tl.store(", "tl.store(1024 + ")
    some = [ops.Layer(torch.randn(40, 2, 1, 1))]
    launch.draw_bits(launch.prepare(some, seeds=[(5, 7)]))
    assert {found.kind for found in driver.findings} == {"oob-global-write"}


def test_a_read_of_what_nothing_wrote_is_found():
    some = layers(20, 2)
    planned = launch.prepare(some, seeds=[(5, 7)] * 5)
    forests = launch.cluster(planned)._replace(height=torch.empty(20 * 2 * 5))
    driver.clear()
    launch.cut_height(planned, forests, torch.full((5,), 3, dtype=torch.int32))
    assert {found.kind for found in driver.findings} == {"uninit-global"}
    driver.clear()

