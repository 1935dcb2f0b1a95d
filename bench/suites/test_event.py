"""A pruning event and its parts beside SciPy and fastcluster, and beside selection with Python's sets and NumPy."""

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn

from reprune_triton import REPrune, ops
from reprune_triton.bench.measure.peers import find_peers, same_partition
from reprune_triton.training import models

LAYERS = {"1x1 layer, 256 filters, 64 inputs": (256, 64, 1), "3x3 layer, 128 filters, 32 inputs": (128, 32, 3)}
LIBRARIES = ("SciPy", "fastcluster")


@functools.cache
def weight_of(layer):
    n_out, n_in, k = LAYERS[layer]
    return torch.randn(n_out, n_in, k, k, generator=torch.Generator().manual_seed(0)), n_out // 2


def by_ours(weight, keep):
    merges = ops.ward(ops.kernel_points(weight))
    return ops.cut(merges, keep).labels.numpy()


def by_library(name, weight, keep):
    """Labels (n_in, n_out) by a library's dendrograms and SciPy's cut, at one height for the layer."""
    from scipy.cluster.hierarchy import fcluster

    cluster = find_peers("ward")[name]
    points = ops.kernel_points(weight).double().numpy()
    trees = [cluster(channel) for channel in points]
    merged = len(weight) - keep
    h = max(tree[merged - 1, 2] for tree in trees) if merged else -1.0
    return np.stack([fcluster(tree, h, "distance") for tree in trees])


def by_sets(labels, keep):
    """The filters in the order in which greedy coverage takes them, the lowest on ties, with sets of clusters."""
    filters = [set(enumerate(column)) for column in labels.T.tolist()]
    covered: set[tuple[int, int]] = set()
    taken: list[int] = []
    for _ in range(keep):
        left = [i for i in range(len(filters)) if i not in taken]
        taken.append(max(left, key=lambda i: (len(filters[i] - covered), -i)))
        covered |= filters[taken[-1]]
    return taken


def by_numpy(labels, keep):
    """The same, with the gains of all filters counted at once."""
    sizes = labels.max(axis=1) + 1
    cluster = (labels + (np.cumsum(sizes) - sizes)[:, None]).T  # (filters, channels), numbered through all channels
    uncovered, left, taken = np.ones(sizes.sum(), dtype=bool), np.ones(len(cluster), dtype=bool), []
    for _ in range(keep):
        taken.append(int(np.where(left, uncovered[cluster].sum(axis=1), -1).argmax()))
        left[taken[-1]], uncovered[cluster[taken[-1]]] = False, False
    return taken


GREEDY = {"Python's sets": by_sets, "NumPy": by_numpy}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", [*LIBRARIES, "ours"])
def test_clustering_and_cut(side, layer, name):
    weight, keep = weight_of(layer)
    work = functools.partial(by_ours, weight, keep)
    if name != "ours":
        work = functools.partial(by_library, name, weight, keep)
    for own, wanted in zip(work(), by_library("SciPy", weight, keep), strict=True):
        assert same_partition(own, wanted)
    side(f"clustering and cut, {layer}", name, work, peer=name != "ours")


@pytest.mark.parametrize("name", [*GREEDY, "ours"])
def test_selection(side, name):
    (layer, *_) = LAYERS
    weight, keep = weight_of(layer)
    labels = ops.cut(ops.ward(ops.kernel_points(weight)), keep).labels

    def work():
        if name == "ours":
            return ops.cover(labels, keep, tie="index").order.tolist()
        return GREEDY[name](labels.numpy(), keep)

    assert work() == by_sets(labels.numpy(), keep)
    side(f"greedy coverage, {layer}", name, work, peer=name != "ours")


@functools.cache
def network():
    torch.manual_seed(0)
    model = models.build("resnet20", num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def new_pruner():
    example = models.example_inputs("resnet20")
    model = copy.deepcopy(network())
    return REPrune(model, None, example_inputs=example, sparsity=0.5, until=1, every=1, regrow=0.0, tie="index")


@pytest.mark.parametrize("name", ["SciPy and sets", "ours"])
def test_a_whole_event(side, name):
    pruner = new_pruner()
    event = pruner.step()
    layers = [(network().get_submodule(layer.name).weight.detach(), layer.kept) for layer in event.layers]

    def published():
        return [sorted(by_sets(by_library("SciPy", weight, keep), keep)) for weight, keep in layers]

    assert published() == [pruner.active[layer.name].tolist() for layer in event.layers]
    if name == "ours":
        side("a whole event, ResNet-20", name, REPrune.step, peer=False, fresh=new_pruner)
    else:
        side("a whole event, ResNet-20", name, published, peer=True)
