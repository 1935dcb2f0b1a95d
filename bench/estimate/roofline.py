"""Estimate the least time of one training step: a kernel needs max(FLOPs / peak, bytes / bandwidth), and kernels
follow each other.

Counted are the forward, the gradients of inputs and weights, and SGD with momentum. Layers and sizes come from the
model itself, whole or narrow. Four ways to cut the work into kernels, with Y the bytes of an operation's output:

    eager      one kernel an operation: BatchNorm 3 Y and 5 Y backward, ReLU 2 Y and 3 Y, addition 3 Y; where several
               operations read one tensor, their gradients are added, 3 Y each
    compiled   BatchNorm reads once for its statistics; apply, addition and activation are one kernel; backward one
               pass adds up (and writes what the residual needs), one makes the gradient
    fused      what `reprune_triton.fuse` runs if all 1x1 convs are ours. Forward they apply the BatchNorm and the
               activation before them as they read, and count the statistics for the one after as they write; backward
               they go on through that activation, add up what else reads its output, and count the sums. What is left
               of the BatchNorm is one pass that makes the gradient, 3 Y
    fused 1x1  as if the two gradients of the conv before did that pass too as they read, the activation left a bit
               for each value, and the BatchNorm in a shortcut was part of the addition. Nothing of the kind exists yet
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from reprune_triton import ops
from reprune_triton.bench import networks, rows, terminal
from reprune_triton.bench.estimate import graph
from reprune_triton.bench.measure import device as devices
from reprune_triton.errors import RepruneError
from reprune_triton.running import analysis, compact
from reprune_triton.running.channels import Channels
from reprune_triton.selection.widths import round_up
from reprune_triton.training import models

LEVELS = ("eager", "compiled", "fused", "fused 1x1")
# Bytes a parameter: weight, gradient and momentum are read, weight and momentum written in float32, a cast of the
# weight in bfloat16.
SGD = 5 * 4 + 2


class Ceilings(NamedTuple):
    """The best that a device can do."""

    name: str
    flops: float  # of matrix products, a second
    bandwidth: float  # bytes a second
    assumed: bool  # or measured


H100 = Ceilings("H100", 790e12, 3.0e12, True)


class Kernel(NamedTuple):
    """One launch."""

    kind: str
    flops: float
    bytes: float

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.flops / ceilings.flops, self.bytes / ceilings.bandwidth)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    terminal.add_options(parser, "model batch size sparsity")
    parser.add_argument("--round-to", type=int, default=16, help="widths are a multiple of this (default: 16)")
    parser.add_argument(
        "--device", default="assumed",
        help="assumed: an H100 of 790 TFLOP/s and 3.0 TB/s; else the ceilings are measured on this device",
    )  # fmt: skip
    parser.add_argument("--bytes", type=int, default=2, help="of a value (default: 2, bfloat16)")


def run(args: argparse.Namespace) -> None:
    terminal.check_at_least_one(args, "batch size round-to bytes")
    console = terminal.console(150)
    shape = (args.batch, 3, *[args.size or models.image_size(args.model)] * 2)
    ceilings = H100 if args.device == "assumed" else measure(args.device)
    with torch.device("meta"):
        model = networks.build(args.model)
    channels = analysis.prunable(model, shape)
    settings: dict[str, Any] = rows.environment("cpu" if ceilings.assumed else args.device) | {
        "benchmark": "roofline", "estimated": True, "model": args.model, "batch": args.batch, "size": shape[-1],
        "round_to": args.round_to, "value_bytes": args.bytes, "ceilings": ceilings._asdict(),
    }  # fmt: skip
    table = terminal.table(
        f"Estimated, not measured: one training step of {args.model}, {args.batch} images of {shape[-1]}x"
        f"{shape[-1]}, ms (times faster than dense)",
        ("sparsity", "FLOPs cut", *LEVELS, "GB moved"),
        caption=f"If every kernel reached {ceilings.flops / 1e12:.4g} TFLOP/s or {ceilings.bandwidth / 1e12:.3g} TB/s "
        f"({'assumed for an H100' if ceilings.assumed else f'measured on {ceilings.name}'}), whichever it needs "
        "longer for, and nothing else took time.",
    )
    dense = {level: total(kernels(model, shape, level, args.bytes), ceilings) for level in LEVELS}
    lines: list[tuple[str, dict[str, float]]] = []
    for share in args.sparsity:
        widths = widths_at(channels, share, args.round_to)
        slim = compact.compact(model, channels.slices(choose(channels, widths, seed=0)))
        cells, moved = [], []
        for level in LEVELS:
            found = kernels(slim, shape, level, args.bytes)
            spent = total(found, ceilings)
            cells.append(f"{spent * 1e3:.1f} ({dense[level] / spent:.2f}x)")
            moved.append(sum(kernel.bytes for kernel in found))
            by_kind = by_kinds(found, ceilings)
            lines.append((f"{share:g}, {level}", by_kind))
            figures = {"roofline_ms": spent * 1e3, "dense_ms": dense[level] * 1e3, "bytes": moved[-1],
                       "flops": sum(kernel.flops for kernel in found),
                       "kinds_ms": {kind: seconds * 1e3 for kind, seconds in by_kind.items()}}  # fmt: skip
            about = {"row": "step", "level": level, "sparsity": share, "flops_left": channels.flops(widths)}
            rows.append(args.json, settings | about | figures)
        left = f"{1 - channels.flops(widths):.1%}"
        table.add_row(f"{share:g}", left, *cells, " / ".join(f"{count / 1e9:.0f}" for count in moved))
    groups, left = ("conv", "norm", "act", "add"), "sparsity, kernels"
    shares = terminal.table(
        "Where the time goes", (left, *groups, "rest"), (left,), "In fused 1x1, part of norm is done by the convs."
    )
    for name, by_kind in lines:
        parts = [sum(s for kind, s in by_kind.items() if kind.split()[0] == group) for group in groups]
        whole = sum(by_kind.values())
        shares.add_row(name, *(f"{part / whole:.0%}" for part in (*parts, whole - sum(parts))))
    console.print(table)
    console.print(shares)


def widths_at(channels: Channels, share: float, round_to: int) -> dict[str, int]:
    """Return the width of every prunable layer without this share of its channels."""
    if not 0 <= share < 1:
        raise RepruneError(f"--sparsity must be in [0, 1), the share to leave out; got {share}")
    some = channels.prunable
    return {x.name: round_up(ops.keep_count(x.n_out, share), x.n_out, round_to, 1) for x in some}


def choose(channels: Channels, widths: dict[str, int], seed: int) -> dict[str, torch.Tensor]:
    """Draw channels of every layer, as many as its width."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {x.name: torch.randperm(x.n_out, generator=generator) for x in channels.prunable}
    return {name: order[: widths[name]].sort().values for name, order in drawn.items()}


def total(found: Sequence[Kernel], ceilings: Ceilings) -> float:
    """Return the seconds of all kernels, one after the other."""
    return sum(kernel.seconds(ceilings) for kernel in found)


def by_kinds(found: Sequence[Kernel], ceilings: Ceilings) -> dict[str, float]:
    """Return the seconds of each kind of kernel."""
    spent: dict[str, float] = {}
    for kernel in found:
        spent[kernel.kind] = spent.get(kernel.kind, 0.0) + kernel.seconds(ceilings)
    return spent


def kernels(model: nn.Module, shape: tuple[int, ...], level: str, size: int = 2) -> list[Kernel]:
    """Return the kernels of one training step.

    Args:
        shape: of the images, (B, C, H, W).
        level: one of LEVELS.
        size: bytes of a value.
    """
    step = _Step(graph.operations(model, shape, fused=level != "eager"), level, size)
    found = [kernel for number in range(len(step.ops)) for kernel in step.of(number)]
    count = sum(p.numel() for p in model.parameters())
    return [*found, Kernel("optimizer", 0, count * SGD)]


def measure(device: str | torch.device) -> Ceilings:
    """Measure the ceilings of this device: one large matrix product, and one large copy."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    n, count = (8192, 2**30) if cuda else (1024, 2**25)
    dtype = torch.bfloat16 if cuda else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(count, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    works = (lambda: a @ b, lambda: target.copy_(source))
    product, copied = (statistics.median(devices.time_each(work, 12, device, wait=True)[2:]) / 1e3 for work in works)
    name = rows.environment(device)["device" if cuda else "cpu"]
    return Ceilings(name, 2 * n**3 / product, 2 * count / copied, False)


class _Step:
    """The kernels of each operation, forward and backward, at one level."""

    def __init__(self, some: list[graph.Op], level: str, size: int):
        self.ops, self.level, self.size = some, level, size
        self.readers: list[list[int]] = [[] for _ in some]
        for number, op in enumerate(some):
            for source in op.sources:
                if source != graph.IMAGES:
                    self.readers[source].append(number)
        trained = list[bool]()  # does a gradient flow back to this operation?
        for op in some:
            trained.append(bool(op.weights) or any(s != graph.IMAGES and trained[s] for s in op.sources))
        self.trained = trained

    def of(self, number: int) -> list[Kernel]:
        op = self.ops[number]
        Y, inputs = op.output * self.size, sum(op.inputs) * self.size
        found = self.adding(number)
        if op.kind in ("conv", "linear"):
            return self.conv(number) + found
        if op.kind == "norm":
            return self.norm(number) + found
        if op.kind == "view":
            return found
        back = {"add": 0, "act": 2 * Y + inputs, "mul": Y + 2 * inputs}.get(op.kind, Y + inputs)
        found.append(Kernel(op.kind, 0, inputs + Y))
        if back and any(s != graph.IMAGES and self.trained[s] for s in op.sources):
            found.append(Kernel(f"{op.kind} backward", 0, back))
        return found

    def adding(self, number: int) -> list[Kernel]:
        """Return the kernels that add up the gradients of all that read this tensor."""
        op = self.ops[number]
        if op.kind == "norm" and (self.level == "compiled" or self.twice(number)):
            return []  # as BatchNorm's backward reads them
        if self.ours_reads(number) is not None:
            return []  # as the 1x1 conv writes its own
        return [Kernel("add", 0, 3 * op.output * self.size)] * (op.users - 1)

    def conv(self, number: int) -> list[Kernel]:
        op, size = self.ops[number], self.size
        kind = op.kind if op.kind == "linear" else "conv"
        X, Y, W, flops = op.inputs[0] * size, op.output * size, op.weights * size, 2.0 * op.macs
        seen = op.seen * X
        # Ours reads the output again beside its gradient, to take the latter back through the BatchNorm after it.
        again = Y if self.whole and self.ours(number) and self.norm_of(number) is not None else 0
        found = [Kernel(kind, flops, seen + W + Y)]
        found.append(Kernel(f"{kind} weights", flops, seen + Y + again + 4 * op.weights))
        source = op.sources[0]
        if source != graph.IMAGES and self.trained[source]:
            found.append(Kernel(f"{kind} input", flops, Y + again + W + X + self.epilogue(number)))
        return found

    def epilogue(self, number: int) -> float:
        """Return the bytes that ours reads for the BatchNorm before it, as it writes the gradient of its input."""
        source = self.ops[number].sources[0]
        if self.ours_reads(source) != number:
            return 0
        before, X = self.ops[source], self.ops[number].inputs[0] * self.size
        extra = float(before.users - 1) * X  # the gradients of the others that read it
        if before.kind == "norm":
            extra += X + self.active(before)
            joined = before.sources[-1] if before.residual else graph.IMAGES
            if joined != graph.IMAGES and self.unwritten(joined):
                extra += X  # of the BatchNorm in the shortcut, which has the same gradient
        return extra

    def norm(self, number: int) -> list[Kernel]:
        op = self.ops[number]
        Y = op.output * self.size
        back = op.sources[0] != graph.IMAGES and self.trained[op.sources[0]]
        if self.level == "eager":
            return [Kernel("norm", 0, 3 * Y), Kernel("norm backward", 0, 5 * Y if back else 2 * Y)]
        from_y = op.residual and op.act  # whether the activation was active shows in the output only
        found = self.forward(number)
        if self.ours_reads(number) is None and not self.joins(number):
            # Where gradients are added up, or the residual has one of its own, that is written and read in their place.
            readers = 1 + self.twice(number) if self.level == "fused" else op.users
            written = readers > 1 or from_y
            found.append(Kernel("norm backward", 0, (readers + 1 + written) * Y + self.active(op)))
        if not (self.whole and self.ours(op.sources[0])):
            found.append(Kernel("norm backward", 0, 3 * Y))
        return found

    def forward(self, number: int) -> list[Kernel]:
        """Return the kernel of statistics, unless the conv before has counted them, and one for the rest."""
        op = self.ops[number]
        Y = op.output * self.size
        found = [] if self.ours(op.sources[0]) and self.norm_of(op.sources[0]) == number else [Kernel("norm", 0, Y)]
        if not self.unwritten(number):
            found.append(Kernel("norm", 0, (2 + op.residual) * Y + (self.active(op) if self.whole else 0)))
        return found

    def twice(self, number: int) -> bool:
        """Whether this BatchNorm's backward adds the gradients of two readers."""
        op, readers = self.ops[number], self.readers[number]
        known = all(self.ops[r].kind == "conv" or self.ops[r].residual for r in readers)
        return op.kind == "norm" and op.users == len(readers) == 2 and known

    def ours(self, number: int) -> bool:
        """Whether this is a convolution by our kernels."""
        return self.level.startswith("fused") and number != graph.IMAGES and self.ops[number].pointwise

    def norm_of(self, number: int) -> int | None:
        """Return the number of the BatchNorm after a conv, if nothing else reads that."""
        readers = self.readers[number]
        return readers[0] if len(readers) == 1 and self.ops[readers[0]].kind == "norm" else None

    def unwritten(self, number: int) -> bool:
        """Whether the output of this BatchNorm is only made as the one operation that needs it reads."""
        op = self.ops[number]
        if op.kind != "norm" or op.residual or op.users != 1 or not self.readers[number]:
            return False
        return self.ours(self.readers[number][0]) or self.joins(number)

    def ours_reads(self, number: int) -> int | None:
        """Return our conv that adds up the gradients of this tensor, and does the first pass of its BatchNorm."""
        readers = self.readers[number]
        if self.whole:
            return next((reader for reader in readers if self.ours(reader)), None)
        known = self.ops[number].kind == "norm" and (self.ops[number].users == 1 or self.twice(number))
        return readers[0] if known and readers and self.ours(readers[0]) else None

    def active(self, op: graph.Op) -> float:
        """Return the bytes that say where the activation after a residual was active: bits, or the output."""
        return op.output * (1 / 8 if self.whole else self.size) if op.residual and op.act else 0

    @property
    def whole(self) -> bool:
        """Whether all of the backward is inside the convs."""
        return self.level == "fused 1x1"

    def joins(self, number: int) -> bool:
        """Whether this BatchNorm stands in a shortcut, just before an addition that another one has taken in."""
        op, readers = self.ops[number], self.readers[number]
        plain = op.users == 1 and not op.act and not op.residual and len(readers) == 1
        return self.whole and plain and self.ops[readers[0]].residual and self.ops[readers[0]].sources[-1] == number
