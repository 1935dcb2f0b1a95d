"""Time what the host does in a training step, with nothing left for a device to do.

A GPU that has finished what it was given waits for the host. So an eager step takes at least as long as Python, PyTorch
and Triton need to ask for its operations, whatever the GPU; a CUDA graph is what takes that away. Here that is measured
without a GPU:

    network     all its modules, but with one in DIVIDE of its channels and on tiny images: what PyTorch computes on the
                CPU takes little beside calling it
    kernels     launched through Triton's own code up to the call of the driver, where nothing is compiled or launched;
                what they would have written is left as it was allocated
    choices     the kernels win every measurement, which is the way with the most calls

    dense, narrow, fused, narrow-fused   as in `bench step`, narrow at half of the prunable channels

What is counted is the processor time of this process, in turns, so that others who use the machine do little harm.
Times of PyTorch's operations are of the CPU's dispatch; those of CUDA take a few microseconds more each (a launch, an
allocation), so the ratio to the dense step says more than the milliseconds do.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import nn

from reprune_triton import availability, fuse
from reprune_triton.bench import rows, terminal
from reprune_triton.bench.measure.step import TWO_BY_TWO
from reprune_triton.bench.measure.variants import Task, Variant, parse, sgd, train_step
from reprune_triton.errors import RepruneError
from reprune_triton.fused import dispatch
from reprune_triton.running import analysis, compact, layers, narrow
from reprune_triton.training import models

DIVIDE = 16
AMP = {"off": None, "bf16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    terminal.add_options(parser, "model batch size seed", batch=2, size=32)
    parser.add_argument("--variants", nargs="+", metavar="NAME", default=TWO_BY_TWO, help="default: all four")
    parser.add_argument(
        "--amp", choices=AMP, default="off", help="autocast, as on a GPU; but the CPU multiplies bf16 slowly"
    )
    parser.add_argument("--warmup", type=int, default=5, help="steps that are not timed (default: 5)")
    parser.add_argument("--steps", type=int, default=50, help="steps of each variant, in turns (default: 50)")


def run(args: argparse.Namespace) -> None:
    console = Console()
    torch.set_num_threads(1)
    settings = rows.environment() | {
        "benchmark": "host", "model": args.model, "batch": args.batch, "size": args.size, "amp": args.amp,
        "seed": args.seed, "divide": DIVIDE, "steps": args.steps,
    }  # fmt: skip
    wanted = check(args.variants)
    with no_device() as launches:
        steps, launched = variants(args, wanted), {}
        for _ in range(max(1, args.warmup)):
            for step in steps.values():
                step()
        spent: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(args.steps):
            for name, step in steps.items():
                launches.clear()
                begun = time.process_time()
                step()
                spent[name].append((time.process_time() - begun) * 1e3)
                launched[name] = len(launches)
    found = {name: statistics.median(each) for name, each in spent.items()}
    columns = ("variant", "ms", "fastest", "of dense", "launches of kernels")
    table = terminal.table(f"Host time of a step: {args.model}, autocast {args.amp}", columns, ("variant",))
    for name, ms in found.items():
        ratio = ms / found["dense"] if "dense" in found else None
        figures = [f"{ms:.2f}", f"{min(spent[name]):.2f}", "" if ratio is None else f"{ratio:.2f}x"]
        table.add_row(name, *figures, str(launched[name]))
        row = {"variant": name, "host_ms": ms, "fastest_ms": min(spent[name]), "ratio": ratio}
        rows.append(args.json, settings | row | {"launches": launched[name]})
    console.print(table)


def check(names: Sequence[str]) -> dict[str, Variant]:
    found = {name: parse(name) for name in names}
    for name, variant in found.items():
        if variant.net not in ("dense", "narrow") or variant.backend != "eager":
            raise RepruneError(f"the host's time is taken of {', '.join(TWO_BY_TWO)}; got {name!r}")
    return found


def variants(args: argparse.Namespace, wanted: dict[str, Variant]) -> dict[str, Callable[[], object]]:
    """Return a step of each."""
    torch.manual_seed(args.seed)
    model = shrink(models.build(args.model, num_classes=1000)).to(memory_format=torch.channels_last)
    images = torch.randn(args.batch, 3, args.size, args.size).contiguous(memory_format=torch.channels_last)
    channels = analysis.analyse(model, images[:1])
    task = Task(model, model, channels, images, torch.zeros(args.batch, dtype=torch.int64), AMP[args.amp])
    half = {layer.name: torch.arange(max(1, layer.n_out // 2)) for layer in channels.prunable}
    found: dict[str, Callable[[], object]] = {}
    for name, variant in wanted.items():
        own = copy.deepcopy(model)
        if variant.fused:
            fuse(own)
        optimizer = sgd(own)
        if variant.net == "narrow":
            narrow.Narrowing(own, optimizer, impl="triton").set(task.slices(half))
        found[name] = functools.partial(train_step, task, own, optimizer)
    return found


def shrink(model: nn.Module) -> nn.Module:
    """Leave one in DIVIDE of all channels, but for the images'; in place."""
    for module in model.modules():
        if not isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)):
            continue
        full = dict(layers.tensors_of(module))
        sizes = {key: [_few(n) if i < 2 else n for i, n in enumerate(t.shape)] for key, t in full.items() if t.dim()}
        parts = {key: full[key].detach()[tuple(map(slice, size))].clone() for key, size in sizes.items()}
        compact.resize(module, parts)
        for name in ("in_channels", "out_channels", "in_features", "out_features", "num_features"):
            if hasattr(module, name):
                setattr(module, name, _few(getattr(module, name)))
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.groups = _few(module.groups)
    return model


def _few(channels: int) -> int:
    return channels if channels <= 3 else max(1, channels // DIVIDE)


@contextlib.contextmanager
def no_device() -> Iterator[list[str]]:
    """Take CPU tensors for a GPU's: Triton launches kernels on them, as far as its driver. Gives their names."""
    import triton
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    from reprune_triton.kernels import probe

    if probe.INTERPRETED:
        raise RepruneError("Triton interprets kernels in this process: unset TRITON_INTERPRET to time their launches")

    launches: list[str] = []

    class Empty(CompiledKernel):
        """A kernel without code."""

        def __init__(self, source: Any, *_: Any, **__: Any):
            self.src, self.name, self.packed_metadata = source, source.fn.__name__, ()
            self.module = self.function = 1  # loaded
            self._run = lambda *arguments: launches.append(self.name)

        def __del__(self) -> None:
            """There is nothing to unload."""

    choices = dispatch.Table(None, lambda run: 0.0)
    before = driver._active, torch._C._get_mkldnn_enabled()
    driver.set_active(_Driver())
    availability._tried.cache_clear()
    torch._C._set_mkldnn_enabled(False)  # setting its convolutions up takes longer than computing them
    try:
        with (
            mock.patch.object(triton.compiler, "compile", Empty),
            mock.patch.object(probe, "INTERPRETED", True),
            mock.patch.object(dispatch, "_now", lambda: True),
            mock.patch.object(dispatch.Table, "_measure", lambda self, case, candidates: "triton"),
            mock.patch.dict(dispatch._TABLES, {torch.device("cpu"): choices}),
        ):
            yield launches
    finally:
        driver._active = before[0]
        torch._C._set_mkldnn_enabled(before[1])
        availability._tried.cache_clear()


class _Driver:
    """The driver of a GPU that does nothing, as Triton sees it."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)
