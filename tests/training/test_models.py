"""Models by name: shapes, sizes known from the paper, and errors that say what to do."""

import sys

import pytest
import torch

from reprune_triton.errors import RepruneError
from reprune_triton.training import models


@pytest.mark.parametrize("name", models.CIFAR_RESNETS)
def test_depth_counts_the_weighted_layers(name):
    model = models.build(name, 10)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    shortcuts = [m for m in layers if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1)]
    assert len(layers) - len(shortcuts) == int(name.removeprefix("resnet"))
    assert len(shortcuts) == 2


def test_resnet56_has_the_published_size():
    # 853,018 with parameter-free shortcuts; ours add two 1x1 convs and their BatchNorms.
    shortcuts = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert sum(p.numel() for p in models.build("resnet56", 10).parameters()) == 853_018 + shortcuts


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_takes_the_images_of_each_data_set(channels, size):
    model = models.build("resnet8", 7, in_channels=channels)
    out = model(models.example_inputs("resnet8", channels, size))
    assert out.shape == (2, 7)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_seed_decides_the_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in models.build("resnet8", 10).parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_example_inputs_are_the_same_at_every_call():
    assert models.example_inputs("resnet8").shape == (2, 3, 32, 32)
    assert models.example_inputs("resnet50").shape == (2, 3, 224, 224)
    state = torch.get_rng_state()
    assert torch.equal(models.example_inputs("resnet8"), models.example_inputs("resnet8"))
    assert torch.equal(state, torch.get_rng_state())


def test_torchvision_and_timm_by_name():
    vision = pytest.importorskip("torchvision")
    timm = pytest.importorskip("timm")
    ours = models.build("resnet18", 10)
    assert isinstance(ours, vision.models.ResNet) and ours.fc.out_features == 10
    forced = models.build("timm:resnet18", 10, in_channels=1)
    assert isinstance(forced, timm.models.ResNet) and forced.conv1.in_channels == 1
    assert isinstance(models.build("mobilenetv3_small_050", 10), timm.models.MobileNetV3)  # only timm has it


def test_errors_say_what_there_is(monkeypatch):
    with pytest.raises(RepruneError, match="resnet8, resnet20.*torchvision.*timm"):
        models.build("resnet9000", 10)
    with pytest.raises(RepruneError, match="timm:NAME"):
        models.build("keras:resnet18", 10)
    with pytest.raises(RepruneError, match="unknown model 'timm:resnet8'"):
        models.build("timm:resnet8", 10)
    with pytest.raises(RepruneError, match="has 1: use timm:resnet18"):
        models.build("resnet18", 10, in_channels=1)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RepruneError, match="torchvision and timm not installed: pip install"):
        models.build("resnet18", 10)
