"""Models by name: the CIFAR ResNets of He et al. (CVPR 2016), and all that torchvision or timm have.

The CIFAR ResNets have depth 6 n + 2: a 3x3 stem, three stages of n basic blocks with 16, 32 and 64 channels, global
average pooling and one linear layer. The shortcut that changes shape is a 1x1 conv with BatchNorm.
"""

import torch
from torch import nn

from reprune_triton.errors import RepruneError

CIFAR_RESNETS = {f"resnet{depth}": depth for depth in (8, 20, 32, 44, 56, 110)}


class BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, C_in, H, W) -> (B, C, H / stride, W / stride)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    def __init__(self, depth: int, num_classes: int, in_channels: int = 3):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.stage1 = _stage(blocks, 16, 16, stride=1)
        self.stage2 = _stage(blocks, 16, 32, stride=2)
        self.stage3 = _stage(blocks, 32, 64, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, C_in, H, W) -> (B, num_classes)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(self.pool(x).flatten(1))


def _stage(blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def build(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """Return a freshly initialised model; `timm:NAME` and `torchvision:NAME` name its source.

    Raises:
        RepruneError: for an unknown name or source, or a number of channels that the model does not take.
    """
    source, _, plain = name.rpartition(":")
    if source not in ("", "timm", "torchvision"):
        raise RepruneError(f"unknown model source {source!r} in {name!r}: use timm:NAME or torchvision:NAME")
    if not source and plain in CIFAR_RESNETS:
        return CifarResNet(CIFAR_RESNETS[plain], num_classes, in_channels)

    missing = []
    if source in ("", "torchvision"):
        try:
            from torchvision import models as vision
        except ImportError:
            missing.append("torchvision")
        else:
            if plain in vision.list_models(module=vision):
                if in_channels != 3:
                    raise RepruneError(
                        f"torchvision's {plain} takes 3 channels, the data has {in_channels}: use timm:{plain} "
                        f"or one of {', '.join(CIFAR_RESNETS)}"
                    )
                return vision.get_model(plain, weights=None, num_classes=num_classes)
    if source in ("", "timm"):
        try:
            import timm
        except ImportError:
            missing.append("timm")
        else:
            if timm.is_model(plain):
                return timm.create_model(plain, pretrained=False, num_classes=num_classes, in_chans=in_channels)

    away = f" ({' and '.join(missing)} not installed: pip install 'reprune-triton[train]')" if missing else ""
    raise RepruneError(
        f"unknown model {name!r}. Built in: {', '.join(CIFAR_RESNETS)}. Any other name is looked up in torchvision, "
        f"then in timm{away}; torchvision.models.list_models() and timm.list_models() print what they have"
    )


def image_size(name: str) -> int:
    """Return the side of the images that a model is usually trained on: 32 for ours, 224 for all others."""
    return 32 if name in CIFAR_RESNETS else 224


def example_inputs(name: str, in_channels: int = 3, size: int | None = None) -> torch.Tensor:
    """Return a batch (2, C, H, W) float32 for the analysis of the model; the same values at every call."""
    side = size or image_size(name)
    return torch.randn(2, in_channels, side, side, generator=torch.Generator().manual_seed(0))
