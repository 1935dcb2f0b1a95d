"""Prints what a training step and an event launch that `make gpu` has not compiled before. In a process of its own,
whose kernels are not interpreted."""

import argparse
import copy
from unittest import mock

import torch
import triton

from reprune_triton import fuse, ops
from reprune_triton.bench import gpu
from reprune_triton.bench.measure import host, variants
from reprune_triton.kernels import compiled
from reprune_triton.kernels.clustering import coverage, launch
from reprune_triton.running import narrow

known, found = set(), set()


def key(source, options):
    return source.fn.__name__, str(source.signature), str(source.constants), str(source.attrs), str(options)


def event() -> None:
    sizes = ((64, 1), (64, 3), (128, 3), (256, 1), (512, 3), (2048, 1))
    layers = [ops.Layer(torch.zeros(n, 16, k, k)) for n, k in sizes]
    whole = launch.prepare(layers)
    forests = launch.cluster(whole)
    keep = torch.ones(len(layers), dtype=torch.int32)
    launch.cut_height(whole, forests, keep)
    labels, _ = launch.label(whole, forests)
    for order in (None, launch.draw_bits(whole)):
        launch.cover(whole, forests.report, launch.membership(whole, forests.report, labels), keep, order)


def step() -> None:
    args = argparse.Namespace(model="resnet50", size=128, batch=8, seed=0, round_to=16)
    task = variants.make_task(args, torch.device("cpu"))._replace(amp=torch.bfloat16)
    dense = task.dense.to(memory_format=torch.channels_last)
    task = task._replace(images=task.images.contiguous(memory_format=torch.channels_last))
    for share in (0.0, 0.51):
        model = fuse(copy.deepcopy(dense))
        optimizer = variants.sgd(model)
        slices = task.slices(variants.active_at(task.channels, share, args))
        if share:
            narrow.Narrowing(model, optimizer, impl="triton").set(slices)
        variants.train_step(task, model, optimizer)


with host.no_device() as launches:
    empty, into = triton.compiler.compile, known

    def record(source, target=None, options=None, **more):
        into.add(key(source, options))
        return empty(source)

    with mock.patch.object(triton.compiler, "compile", record):
        for job in gpu.jobs("bench"):
            compiled.warm(*job)
        for name in ("device_caches",):  # what was warmed up must be asked for again
            for job in gpu.jobs("bench"):
                getattr(job[0].kernel, name).clear()
        into = found
        event()
        step()
assert launches and coverage
print(len(known), len(found))
for missing in sorted(found - known):
    print(*missing)
