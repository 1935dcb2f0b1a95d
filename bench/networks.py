"""The layers of a network that a benchmark clusters."""

from __future__ import annotations

import argparse

import torch
from torch import nn

from reprune_triton import ops
from reprune_triton.errors import RepruneError
from reprune_triton.running import analysis
from reprune_triton.training import models

RULES = ("prunable", "resnet", "all")


def choose(args: argparse.Namespace) -> list[ops.Layer]:
    """The layers of the event, freshly initialised, on the device."""
    model = build(args)
    if args.layers == "all":
        names = [name for name, conv in model.named_modules() if isinstance(conv, nn.Conv2d) and conv.groups == 1]
    elif args.layers == "resnet":
        names = resnet_rule(model)
    else:
        found = analysis.analyse(model, models.example_inputs(args.model)).prunable
        names = [layer.name for layer in found if layer.norm]  # the scales share out a global sparsity
    if not names:
        raise RepruneError(f"{args.model} has no such layer; name another --model, or --layers all.")
    weights = [model.get_parameter(f"{name}.weight").detach().to(args.device) for name in names]
    inputs = [torch.arange(min(args.inputs, w.shape[1]), device=w.device) if args.inputs else None for w in weights]
    return [ops.Layer(weight, None, index, name) for weight, index, name in zip(weights, inputs, names, strict=True)]


def build(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(args.seed)
    return models.build(args.model, num_classes=10 if args.model in models.CIFAR_RESNETS else 1000)


def resnet_rule(model: nn.Module) -> list[str]:
    """The convs that the paper prunes in a ResNet: all but the last of every block."""
    names = []
    for name, block in model.named_modules():
        children = [getattr(block, f"conv{number}", None) for number in (1, 2, 3)]
        convs = [conv for conv in children if isinstance(conv, nn.Conv2d)]
        if len(convs) > 1 and all(conv.groups == 1 for conv in convs):
            names += [f"{name}.conv{number}" for number in range(1, len(convs))]
    return names
