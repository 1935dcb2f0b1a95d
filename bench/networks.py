"""The layers of a network that a benchmark clusters."""

from __future__ import annotations

import argparse

import torch
from torch import nn

from reprune_triton import ops
from reprune_triton.errors import RepruneError
from reprune_triton.running import analysis
from reprune_triton.training import models

RULES = ("prunable", "all")


def choose(args: argparse.Namespace) -> list[ops.Layer]:
    """Return the layers of the event, freshly initialised, on the device."""
    model = build(args.model, args.seed)
    if args.layers == "all":
        names = [name for name, conv in model.named_modules() if isinstance(conv, nn.Conv2d) and conv.groups == 1]
    else:
        found = analysis.analyse(model, models.example_inputs(args.model)).prunable
        names = [layer.name for layer in found if layer.norm]  # the scales share out a global sparsity
    if not names:
        raise RepruneError(f"{args.model} has no such layer; name another --model, or --layers all.")
    weights = [model.get_parameter(f"{name}.weight").detach().to(args.device) for name in names]
    inputs = [torch.arange(min(args.inputs, w.shape[1]), device=w.device) if args.inputs else None for w in weights]
    return [ops.Layer(weight, None, index, name) for weight, index, name in zip(weights, inputs, names, strict=True)]


def build(name: str, seed: int | None = None) -> nn.Module:
    """Return a freshly initialised classifier, in training."""
    if seed is not None:
        torch.manual_seed(seed)
    return models.build(name, num_classes=10 if name in models.CIFAR_RESNETS else 1000).train()
