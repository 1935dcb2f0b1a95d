"""Bad input is refused in words that say what to do."""

import pytest
import torch

from reprune_triton import ops
from reprune_triton.errors import RepruneError

POINTS = torch.randn(3, 6, 4)
LABELS = torch.zeros(3, 6, dtype=torch.int64)
WEIGHT = torch.randn(6, 3, 2, 2)


def with_value(value: float) -> torch.Tensor:
    points = POINTS.clone()
    points[1, 2, 3] = value
    return points


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.ward(with_value(float("nan"))), "NaN or infinity in problem 1 .1 of 3"),
        (lambda: ops.ward(with_value(float("-inf"))), "NaN or infinity in problem 1 .*diverged"),
        (lambda: ops.ward(POINTS[0]), "must be .problems, points, dimensions"),
        (lambda: ops.ward(POINTS[:, :0]), "at least one of each"),
        (lambda: ops.ward(POINTS.int()), "int32; convert to a floating-point type"),
        (lambda: ops.ward(POINTS, "centroid"), "'centroid'; it must be one of ward, single, complete, average"),
        (lambda: ops.ward(POINTS, impl="cuda"), "one of auto, reference, triton"),
        (lambda: ops.ward(POINTS.double() * 1e300), "rescale"),
        (lambda: ops.ward(POINTS, "single", algorithm="reciprocal"), "is for Ward; .* use"),
        (lambda: ops.ward(POINTS, algorithm="chain"), "is for impl=.triton"),
        (lambda: ops.ward(POINTS, algorithm="fast"), "one of auto, chain, reciprocal"),
        (lambda: ops.ward_network([ops.Layer(WEIGHT, torch.tensor([0, 6]), name="stem")]), "stem: filters .* 0 .. 5"),
        (lambda: ops.ward_network([ops.Layer(WEIGHT, WEIGHT[:, 0, 0, 0] > 0)]), "filters must be a tensor of indices"),
        (lambda: ops.ward_network([ops.Layer(WEIGHT, torch.ones(2, 2).long())]), "one-dimensional and of integers"),
        (lambda: ops.ward_network([ops.Layer(WEIGHT, None, [0, 1])]), "inputs must be a tensor of indices"),
        (lambda: ops.ward_network([ops.Layer(WEIGHT, None, torch.tensor([-1]))]), "inputs has an index outside 0 .. 2"),
        (lambda: ops.ward_network([ops.Layer(WEIGHT, torch.tensor([]).long())]), "0 filters.* at least one of each"),
        (lambda: ops.ward_network([ops.Layer(WEIGHT), ops.Layer(WEIGHT / 0, name="fc")]), "fc has NaN or infinity"),
        (lambda: ops.cluster_network([ops.Layer(WEIGHT)], []), "1 layers and 0 numbers to keep"),
        (lambda: ops.cluster_network([ops.Layer(WEIGHT)], [7]), "keep is 7; it must be a whole number from 1 to 6"),
        (lambda: ops.cut(ops.ward(POINTS), 0), "keep is 0; it must be a whole number from 1 to 6"),
        (lambda: ops.cut(ops.ward(POINTS), 7), "keep is 7"),
        (lambda: ops.cut(ops.ward(POINTS), 2.0), "keep is 2.0"),
        (lambda: ops.cover(LABELS, 0), "keep is 0"),
        (lambda: ops.cover(LABELS, 7), "keep is 7"),
        (lambda: ops.cover(LABELS[0], 1), r"\(input channels, filters\)"),
        (lambda: ops.cover(LABELS[:0], 1), r"\(input channels, filters\)"),
        (lambda: ops.cover(LABELS.float(), 1), "must be integers"),
        (lambda: ops.cover(LABELS, 2, "first"), "'first'; it must be one of random, index, norm, gamma"),
        (lambda: ops.cover(LABELS, 2, "norm"), "needs score"),
        (lambda: ops.cover(LABELS, 2, "gamma", score=torch.ones(5)), r"it must be \(6,\)"),
        (lambda: ops.cover(LABELS, 2, "gamma", score=torch.full((6,), torch.nan)), "score has NaN"),
        (lambda: ops.cover(LABELS, 2, impl="fast"), "one of auto, reference, triton"),
        (lambda: ops.cover(torch.zeros(1, 4097, dtype=torch.int32), 2), "4097 filters.* at most 4096"),
        (lambda: ops.select_filters(WEIGHT, 9), "keep is 9"),
        (lambda: ops.select_filters(WEIGHT[0], 1), r"\(n_out, n_in, kh, kw\)"),
        (lambda: ops.select_filters(WEIGHT[:0], 1), "no filters"),
        (lambda: ops.select_filters(WEIGHT, 3, tie="gamma"), "needs score"),
        (lambda: ops.keep_count(10, 1.0), "less than 1"),
        (lambda: ops.keep_count(10, -0.1), "at least 0"),
        (lambda: ops.keep_count(10, "half"), "half"),
        (lambda: ops.keep_count(10, float("nan")), "nan"),
    ],
)
def test_refused(call, message):
    with pytest.raises(RepruneError, match=message):
        call()


def test_the_largest_layer_that_fits():
    labels = torch.arange(4096).expand(2, 4096)
    assert ops.cover(labels, 3, "index").order.tolist() == [0, 1, 2]


def test_triton_is_never_replaced_in_silence():
    """Where the kernels cannot run, asking for them by name must not run something else."""
    with pytest.raises(RepruneError, match="points: it is torch.float64, and the kernels read float32"):
        ops.ward(POINTS.double(), impl="triton")
    with pytest.raises(RepruneError, match="4097 filters of 4 numbers"):
        ops.ward(torch.zeros(1, 4097, 4), impl="triton")
    with pytest.raises(RepruneError, match="5 filters of 122 numbers"):
        ops.ward(torch.zeros(1, 5, 122), impl="triton")
    with pytest.raises(RepruneError, match="float64"):
        ops.cut(ops.ward(POINTS.double()), 2, impl="triton")
