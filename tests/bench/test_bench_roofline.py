"""The least time of a step: FLOPs and bytes by hand, what widths do to them, and the chains that can be pruned."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reprune_triton.bench import networks
from reprune_triton.bench.__main__ import main
from reprune_triton.bench.estimate import roofline
from reprune_triton.errors import RepruneError
from reprune_triton.running import analysis, compact


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return networks.build(name)


def step_ms(model: nn.Module, shape: tuple[int, ...], level: str) -> float:
    return roofline.total(roofline.kernels(model, shape, level), roofline.H100) * 1e3


def slim_of(model: nn.Module, shape: tuple[int, ...], share: float, round_to: int = 16) -> nn.Module:
    found = analysis.prunable(model, shape)
    widths = roofline.widths_at(found, share, round_to)
    return compact.compact(model, found.slices(roofline.choose(found, widths, seed=0)))


@pytest.mark.parametrize("level", roofline.LEVELS)
@pytest.mark.parametrize("name", ["resnet8", "resnet18", "mobilenet_v2"])
def test_flops_are_three_forwards(name, level):
    """Without the gradient of the images."""
    model, shape = on_meta(name), (4, 3, 64, 64)
    costs = analysis.prunable(model, shape).costs
    macs = sum(cost.macs for cost in costs)
    found = sum(kernel.flops for kernel in roofline.kernels(model, shape, level))
    assert found == 4 * 2 * (3 * macs - costs[0].macs)


def small(stride: int = 1, kernel: int = 1) -> nn.Module:
    """conv, BatchNorm, ReLU twice; the second conv is the one to look at."""
    second = nn.Conv2d(4, 6, kernel, stride, bias=False)
    return nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), second, nn.BatchNorm2d(6),
                         nn.ReLU(), nn.MaxPool2d(2))  # fmt: skip


def of_kind(model: nn.Module, level: str, shape=(2, 3, 8, 8)) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for kernel in roofline.kernels(model, shape, level):
        found.setdefault(kernel.kind, []).append(kernel.bytes)
    return found


def test_bytes_by_hand():
    images, X, Y, W = (2 * n for n in (2 * 3 * 64, 2 * 4 * 64, 2 * 6 * 64, 4 * 6))
    first = 2 * 3 * 4
    eager = of_kind(small(), "eager")
    assert eager["conv"] == [images + first + X, X + W + Y]
    assert eager["conv weights"] == [images + X + 2 * first, X + Y + 2 * W], "weight gradients are float32"
    assert eager["conv input"] == [Y + W + X]
    assert eager["norm"] == [3 * X, 3 * Y] and eager["norm backward"] == [5 * X, 5 * Y]
    assert eager["act"] == [2 * X, 2 * Y] and eager["act backward"] == [3 * X, 3 * Y]
    assert eager["pool"] == eager["pool backward"] == [Y + Y / 4] and "add" not in eager
    assert eager["optimizer"] == [22 * (3 * 4 + 4 * 6 + 2 * 4 + 2 * 6)]

    compiled = of_kind(small(), "compiled")
    assert compiled["norm"] == [X, 2 * X, Y, 2 * Y] and compiled["norm backward"] == [2 * X, 3 * X, 2 * Y, 3 * Y]
    assert "act" not in compiled and compiled["conv"] == eager["conv"]

    fused = of_kind(small(), "fused")
    assert fused["norm"] == [2 * Y], "conv by conv, all but what the pool reads"
    assert fused["norm backward"] == [3 * X, 2 * Y, 3 * Y]
    assert fused["conv input"] == [Y + W + 2 * X], "and the sums for the BatchNorm before"
    assert all(fused[kind] == eager[kind] for kind in ("conv", "conv weights", "pool"))

    ours = of_kind(small(), "fused 1x1")
    assert ours["conv"] == eager["conv"]
    assert ours["conv weights"] == [images + 2 * X + 2 * first, X + 2 * Y + 2 * W]
    assert ours["conv input"] == [2 * Y + W + 2 * X], "it takes its own gradient back, and sums for the one before"
    assert ours["norm"] == [2 * Y] and ours["norm backward"] == [2 * Y], "only for the pool behind it"


def test_a_strided_pointwise_conv_skips_most_of_its_input():
    X, Y, W = (2 * n for n in (2 * 4 * 64, 2 * 6 * 16, 4 * 6))
    found = of_kind(small(stride=2), "eager")
    assert found["conv"][1] == X / 4 + W + Y and found["conv input"] == [Y + W + X]
    wide = of_kind(small(stride=2, kernel=3), "eager")
    assert wide["conv"][1] == X + 9 * W + 2 * 2 * 6 * 9


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 2, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.last(F.relu(self.norm(self.conv(x)) + x))


def test_bytes_of_a_residual_by_hand():
    Y = 2 * 2 * 4 * 64
    expected = {
        "eager": ([3 * Y], [5 * Y], [3 * Y, 3 * Y]),
        "compiled": ([Y, 3 * Y], [4 * Y, 3 * Y], [3 * Y]),  # gradient, y and x in, the residual's gradient out
        "fused": ([Y, 3 * Y], [4 * Y, 3 * Y], [3 * Y]),  # no 1x1 conv is next to it
    }
    for level, (forward, backward, adds) in expected.items():
        found = of_kind(Residual(), level)
        assert (found["norm"], found["norm backward"], found["add"]) == (forward, backward, adds), level


def test_bytes_of_two_readers_by_hand():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
            self.conv, self.two = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)

        def forward(self, x):
            x = F.relu(self.one(self.stem(x)))
            return F.max_pool2d(F.relu(self.two(self.conv(x)) + x), 2)

    X, W = 2 * 2 * 4 * 64, 2 * 16
    compiled, fused = (of_kind(Two(), level) for level in ("compiled", "fused"))
    assert compiled["norm backward"] == [4 * X, 3 * X, 4 * X, 3 * X] and compiled["conv input"] == [2 * X + W]
    assert fused["norm"] == [2 * X, 3 * X] and fused["norm backward"] == [3 * X, 4 * X, 3 * X]
    assert fused["conv input"] == [4 * X + W] and "add" not in fused, "it reads x and the other gradient"


def test_resnet50_is_as_designed():
    """The figures that the design was made with; they come from another program, layer by layer by hand."""
    model, shape = on_meta("resnet50"), (256, 3, 224, 224)
    slim = slim_of(model, shape, 0.51)
    for level, dense, thin in (("eager", 42.6, 35.3), ("compiled", 32.5, 26.6), ("fused 1x1", 25.2, 20.0)):
        assert step_ms(model, shape, level) == pytest.approx(dense, abs=0.15)
        assert step_ms(slim, shape, level) == pytest.approx(thin, abs=0.15)
    kinds = roofline.by_kinds(roofline.kernels(model, shape, "eager"), roofline.H100)
    convs = sum(seconds for kind, seconds in kinds.items() if kind.startswith("conv"))
    assert convs / sum(kinds.values()) == pytest.approx(0.30, abs=0.01)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_narrower_is_never_slower(name):
    model, shape = on_meta(name), (8, 3, 64, 64)
    slims = [slim_of(model, shape, share, 8) for share in (0.0, 0.4, 0.9)]
    for level in roofline.LEVELS:
        spent = [step_ms(slim, shape, level) for slim in slims]
        assert spent == sorted(spent, reverse=True) and spent[0] == step_ms(model, shape, level) > spent[-1]
    assert all(step_ms(s, shape, "compiled") < step_ms(s, shape, "eager") for s in slims)
    assert all(step_ms(s, shape, "fused 1x1") < step_ms(s, shape, "fused") for s in slims)


def test_widths_are_rounded_up_to_whole_groups():
    found = analysis.prunable(on_meta("resnet18"), (1, 3, 32, 32))
    widths = roofline.widths_at(found, 0.9, 16)
    assert [widths[f"layer{stage}.0.conv1"] for stage in (1, 2, 3, 4)] == [16, 16, 32, 64]
    assert set(roofline.widths_at(found, 0.0, 16).values()) == {64, 128, 256, 512}
    with pytest.raises(RepruneError, match="share to leave out"):
        roofline.widths_at(found, 1.0, 16)


def test_command(tmp_path, capsys):
    arguments = "roofline --model resnet8 --batch 4 --sparsity 0 0.5 --round-to 4 --json".split()
    assert main([*arguments, str(tmp_path / "rows")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [(row["sparsity"], row["level"]) for row in rows] == [(s, x) for s in (0, 0.5) for x in roofline.LEVELS]
    for row in rows:
        assert row["estimated"] is True and row["ceilings"]["assumed"] is True and row["torch"] == torch.__version__
        assert row["roofline_ms"] == pytest.approx(sum(row["kinds_ms"].values()))
        assert (row["roofline_ms"] < row["dense_ms"]) == (row["sparsity"] > 0) and row["size"] == 32
    assert "Estimated, not measured" in capsys.readouterr().out
    assert main(["roofline", "--batch", "0"]) == 1


def test_measured_ceilings():
    found = roofline.measure("cpu")
    assert not found.assumed and found.flops > 1e8 and found.bandwidth > 1e7 and found.name
