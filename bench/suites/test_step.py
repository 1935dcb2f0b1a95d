"""A training step of ResNet-20, narrow, beside the dense network's; `bench step` has checked what is timed."""

import argparse
import functools

import pytest
import torch

from reprune_triton.bench.measure import step, variants

SPARSITY = 0.5


@functools.cache
def prepared():
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    args = parser.parse_args(["--model", "resnet20", "--batch", "64", "--size", "32", "--round-to", "1"])
    task = variants.make_task(args, torch.device("cpu"))
    actives = {share: variants.active_at(task.channels, share, args) for share in (0.0, SPARSITY)}
    return task, actives, {share: variants.wanted_step(task, active) for share, active in actives.items()}


@pytest.mark.parametrize("name", ["dense", "narrow", "compact"])
def test_step(side, name):
    task, actives, wanted = prepared()
    share = 0.0 if name == "dense" else SPARSITY
    runner = variants.Runner(task, variants.parse(name), share, actives[share])
    assert runner.attempt(lambda: runner.prepare(wanted[share], warmup=1)), runner.why
    side("a training step, ResNet-20, half of its channels", name, runner.step, peer=name == "dense")
