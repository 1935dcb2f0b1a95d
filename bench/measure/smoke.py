"""Check every kernel on the shapes of a network, against PyTorch or the reference: in seconds, before the rest.

Activations are bfloat16, channels_last, with channels in multiples of 16 but for the images': what real training runs
is compiled for these alone. What PyTorch computes in float64 is taken for exact; a kernel may be as far from it as
PyTorch's own operations in bfloat16 are, times ROUNDING, and one rounding more. So one wrong number is seen.

The kernels are in families, each checked by a process of its own, all at the same time: what breaks the device for
one of them breaks it for no other.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as conv_gradients

from reprune_triton import ops
from reprune_triton.bench import networks, rows, terminal
from reprune_triton.bench.estimate import roofline
from reprune_triton.bench.measure import device as devices
from reprune_triton.bench.measure import peers
from reprune_triton.errors import RepruneError
from reprune_triton.fused.conv import _by_constants
from reprune_triton.running import analysis, compact, layers
from reprune_triton.running.pack import Pack
from reprune_triton.selection import steps
from reprune_triton.training import models

OPTIONS = ("model", "batch", "size", "device", "shapes", "columns", "seed", "json")  # what a family's process is given
ROUNDING = 2
ONE_MORE = {torch.bfloat16: 2**-7, torch.float32: 2**-13}  # relative to the largest number
SPARSITY, ROUND_TO = 0.51, 16
EPS = 1e-5
Found = tuple[float, float]  # how far from exact, and how far is allowed, relative to the largest number


class Check(NamedTuple):
    """A check of one kernel, for one shape."""

    kernel: str
    shape: str
    measure: Callable[[], Found]


class Conv(NamedTuple):
    """A convolution of the network."""

    x: tuple[int, ...]  # (B, CI, H, W)
    w: tuple[int, ...]  # (CO, CI, R, S)
    y: tuple[int, ...]  # (B, CO, P, Q)
    stride: tuple[int, int]
    padding: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.w[1]} -> {self.w[0]}, {self.w[2]}x{self.w[3]} / {self.stride[0]}, {self.x[2]}x{self.x[3]}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    terminal.add_options(parser, "model batch size device seed", batch=32)
    parser.add_argument("--shapes", type=int, help="only the first so many of each kind (default: all)")
    parser.add_argument("--columns", type=int, default=8, help="input channels that are clustered (default: 8)")
    parser.add_argument(
        "--family", nargs="+", choices=FAMILIES, help="only these; a single one in this process (default: all)"
    )


def run(args: argparse.Namespace) -> None:
    args.size = args.size or models.image_size(args.model)
    terminal.check_at_least_one(args, "batch size shapes columns")
    families = list(args.family or FAMILIES)
    if len(families) == 1:
        bad = check(families[0], args)
    else:
        given = {key: getattr(args, key) for key in OPTIONS}
        options = [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]
        words = [sys.executable, "-m", "reprune_triton.bench", "smoke", *options, "--family"]
        processes = {family: subprocess.Popen([*words, family]) for family in families}
        bad = [family for family, process in processes.items() if process.wait()]
    if bad:
        raise RepruneError(f"not right: {', '.join(bad)}")


def check(family: str, args: argparse.Namespace) -> list[str]:
    """Print and write a line for every kernel of the family; return the names of those that are not right."""
    devices.use(args.device)
    settings = rows.environment(args.device) | {
        "benchmark": "smoke", "model": args.model, "batch": args.batch, "size": args.size, "seed": args.seed,
        "sparsity": SPARSITY,
    }  # fmt: skip
    bad = []
    for kernel, some in itertools.groupby(FAMILIES[family](args), key=lambda check: check.kernel):
        started = time.perf_counter()
        line = settings | {"kernel": kernel} | worst(list(some)) | {"seconds": time.perf_counter() - started}
        rows.append(args.json, line)
        why = f": {line['why']}" if line["why"] else ""
        figures = f"{line['error']:.1e} from exact, {line['allowed']:.1e} allowed" if line["allowed"] else "exact"
        about = figures if line["result"] == "right" else f"{line['shape']}{why}"
        print(f"{kernel}: {line['result']} for {line['shapes']} shapes ({about})", flush=True)
        if line["result"] != "right":
            bad.append(kernel)
    return bad


def worst(checks: list[Check]) -> dict[str, Any]:
    """Return the shape for which a kernel is furthest off."""
    found = {"error": 0.0, "allowed": 0.0, "shape": "", "result": "right", "why": "", "shapes": len(checks)}
    most = -1.0
    for check in checks:
        try:
            error, allowed = check.measure()
        except Exception as failure:  # whatever it is, the other kernels are checked too
            why = f"{type(failure).__name__}: {failure}"[:300]
            return found | {"shape": check.shape, "result": "failed", "why": why}
        off = error / allowed if allowed else error
        if not off <= most:  # NaN is the furthest
            most = off if off >= 0 else math.inf
            found |= {"error": error, "allowed": allowed, "shape": check.shape}
        if not error <= allowed:
            found |= {"result": "wrong", "why": f"{error:.2e} from exact, and may be {allowed:.2e}"}
            break
    return found


def apart(ours: Tensor, exact: Tensor, plain: Tensor) -> Found:
    """Compare ours, and PyTorch's result in the same type, with the exact one (float64)."""
    largest = exact.abs().max()
    error, own = (float((x.double() - exact).abs().max() / largest) for x in (ours, plain))
    return error, ROUNDING * own + ONE_MORE[ours.dtype]


def furthest(*some: Found) -> Found:
    return max(some, key=lambda found: found[0] / found[1] if found[0] <= found[1] else math.inf)


def differ(*pairs: tuple[Tensor, Tensor]) -> Found:
    """Return the share of numbers that are not the same; none may be."""
    return max(float((a.cpu() != b.cpu()).double().mean()) for a, b in pairs), 0.0


# ---------------------------------------------------------------------- the shapes


def convolutions(args: argparse.Namespace) -> list[Conv]:
    """Return all different convs, without grouped ones, of the network without SPARSITY of its prunable channels."""
    shape = (args.batch, 3, args.size, args.size)
    with torch.device("meta"):
        model = networks.build(args.model)
    channels = analysis.prunable(model, shape)
    widths = roofline.widths_at(channels, SPARSITY, ROUND_TO)
    slim = compact.compact(model, channels.slices(roofline.choose(channels, widths, args.seed)))
    found: dict[Conv, None] = {}

    def note(conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        sizes = (tuple(inputs[0].shape), tuple(conv.weight.shape), tuple(output.shape))
        found[Conv(*sizes, conv.stride, conv.padding)] = None  # type: ignore[arg-type]

    for module in slim.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            module.register_forward_hook(note)
    slim.eval()(torch.empty(shape, device="meta"))
    return list(found)[: args.shapes]


class Numbers:
    """Draws numbers on the device."""

    def __init__(self, args: argparse.Namespace):
        self._device = torch.device(args.device)
        self._generator = torch.Generator(self._device).manual_seed(args.seed)

    def __call__(self, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        """Draw normal numbers, bfloat16, channels_last."""
        drawn = torch.randn(shape, generator=self._generator, device=self._device) * scale
        return drawn.to(torch.bfloat16, memory_format=torch.channels_last)

    def whole(self, low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=self._generator, device=self._device).double()

    def norm(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw mean, rstd, gamma and beta (count,), float32.

        The x that they take to zero lies between two bfloat16 numbers, and all else is exact: float32 and float64 agree
        about every sign.
        """
        mean, rstd = self.whole(-8, 9, count) / 8, 2.0 ** self.whole(-1, 2, count)
        gamma = (1 + self.whole(0, 8, count) / 8) * (2 * self.whole(0, 2, count) - 1)
        crossing = (1 + (2 * self.whole(0, 128, count) + 1) / 256) / 2 * (2 * self.whole(0, 2, count) - 1)
        return tuple(x.float() for x in (mean, rstd, gamma, -(crossing - mean) * rstd * gamma))  # type: ignore[return-value]


def column(vector: Tensor) -> Tensor:
    return vector.double()[:, None, None]


def normal(x: Tensor, norm: tuple[Tensor, ...]) -> Tensor:
    """Return (x - mean) * rstd, float64."""
    return (x.double() - column(norm[0])) * column(norm[1])


def normalised(x: Tensor, norm: tuple[Tensor, ...]) -> Tensor:
    """Return x normalised, before the activation; float64."""
    return normal(x, norm) * column(norm[2]) + column(norm[3])


# ---------------------------------------------------------------------- the families


def forward(args: argparse.Namespace) -> Iterator[Check]:
    from reprune_triton.kernels.step import masked_conv

    draw, convs = Numbers(args), convolutions(args)

    def plain(conv: Conv) -> Found:
        x, w = draw(conv.x), draw(conv.w, math.prod(conv.w[1:]) ** -0.5)
        ours, _ = masked_conv.forward(x, w, None, conv.stride, conv.padding, (1, 1), None)
        exact = F.conv2d(x.double(), w.double(), None, conv.stride, conv.padding)
        return apart(ours, exact, F.conv2d(x, w, None, conv.stride, conv.padding))

    def with_norm(conv: Conv) -> Found:
        x, w = draw(conv.x), draw(conv.w, math.prod(conv.w[1:]) ** -0.5)
        norm = draw.norm(conv.x[1])
        ours, stats = masked_conv.forward(
            x, w, masked_conv.Prologue(*norm, "relu"), conv.stride, conv.padding, (1, 1), EPS
        )
        assert stats is not None
        exact = F.conv2d(normalised(x, norm).relu(), w.double(), None, conv.stride, conv.padding)
        other = F.conv2d(_by_constants(x, *norm).relu(), w, None, conv.stride, conv.padding)
        return furthest(apart(ours, exact, other), *same_statistics(stats, ours))

    for conv in convs:
        yield Check("forward_kernel", str(conv), lambda conv=conv: plain(conv))  # type: ignore[misc]
        yield Check("forward_kernel", f"{conv}, normalised", lambda conv=conv: with_norm(conv))  # type: ignore[misc]


def same_statistics(ours: tuple[Tensor, Tensor, Tensor], x: Tensor) -> list[Found]:
    """Compare mean, 1 / sqrt(variance + EPS) and unbiased variance of x (B, C, H, W) or (M, C)."""

    def statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        variance, mean = torch.var_mean(x, [dim for dim in range(x.dim()) if dim != 1], correction=0)
        count = x.numel() // x.shape[1]
        return mean, (variance + EPS).rsqrt(), variance * (count / (count - 1))

    return [apart(*three) for three in zip(ours, statistics(x.double()), statistics(x.float()), strict=True)]


def gradients(args: argparse.Namespace) -> Iterator[Check]:
    from reprune_triton.kernels.step import masked_conv

    draw, convs = Numbers(args), convolutions(args)

    def of_input(conv: Conv, before: bool, from_y: bool) -> Found:
        grad, w = draw(conv.y), draw(conv.w, math.prod(conv.w[1:]) ** -0.5)
        wanted = (conv.stride, conv.padding)
        exact, other = (
            conv_gradients.conv2d_input(conv.x, w.to(t), grad.to(t), *wanted) for t in (torch.float64, torch.bfloat16)
        )
        if not before:
            ours, _ = masked_conv.input_gradient(grad, w, conv.x[2:], *wanted, (1, 1))
            return apart(ours, exact, other)
        x, second, y = (draw(conv.x) for _ in range(3))
        norm = draw.norm(conv.x[1])
        past = masked_conv.Before(masked_conv.Prologue(*norm, "relu"), x, y if from_y else None, second)
        ours, sums = masked_conv.input_gradient(grad, w, conv.x[2:], *wanted, (1, 1), past)
        assert sums is not None
        let_through = (y if from_y else normalised(x, norm)) > 0
        exact, other = (exact + second.double()) * let_through, (other + second) * let_through
        both = (torch.stack([(g.double() * normal(x, norm)).sum((0, 2, 3)), g.double().sum((0, 2, 3))])
                for g in (exact, other))  # fmt: skip
        return furthest(apart(ours, exact, other), apart(sums, *both))

    def of_weight(conv: Conv, before: bool) -> Found:
        grad, x, wanted = draw(conv.y), draw(conv.x), (conv.stride, conv.padding)
        norm = draw.norm(conv.x[1]) if before else None
        prologue = None if norm is None else masked_conv.Prologue(*norm, "relu")
        ours = masked_conv.weight_gradient(grad, x, prologue, conv.w[2:], *wanted, (1, 1))
        read = x.double() if norm is None else normalised(x, norm).relu()
        read_too = x if norm is None else _by_constants(x, *norm).relu()
        exact = conv_gradients.conv2d_weight(read, conv.w, grad.double(), *wanted)
        return apart(ours, exact, conv_gradients.conv2d_weight(read_too, conv.w, grad, *wanted))

    for conv in convs:
        for before, from_y in ((False, False), (True, False), (True, True)):
            name = f"{conv}{', normalised' * before}{', with a residual' * from_y}"
            yield Check("input_gradient_kernel", name, lambda c=conv, b=before, y=from_y: of_input(c, b, y))  # type: ignore[misc]
    for conv in convs:
        for before in (False, True):
            name = f"{conv}{', normalised' * before}"
            yield Check("weight_gradient_kernel", name, lambda c=conv, b=before: of_weight(c, b))  # type: ignore[misc]


def norms(args: argparse.Namespace) -> Iterator[Check]:
    from reprune_triton.kernels.step import norm_act

    draw = Numbers(args)
    shapes = list(dict.fromkeys(conv.y for conv in convolutions(args)))

    def rounded(exact: Tensor) -> Tensor:
        return exact.float().to(torch.bfloat16)

    def applied(shape: tuple[int, ...], residual: bool) -> Found:
        x, norm, added = draw(shape), draw.norm(shape[1]), draw(shape) if residual else None
        ours = norm_act.apply(x, added, *norm, "relu")
        exact = (normalised(x, norm) + (0 if added is None else added.double())).relu()
        return apart(ours, exact, rounded(exact))

    def summed(shape: tuple[int, ...], from_y: bool) -> Found:
        grad, other, x, y = (draw(shape) for _ in range(4))
        norm = draw.norm(shape[1])
        g, sums = norm_act.sums(grad, other if from_y else None, x, y if from_y else None, *norm, "relu")
        exact = (grad.double() + (other.double() if from_y else 0)) * ((y if from_y else normalised(x, norm)) > 0)
        both = [torch.stack([(e * n).sum((0, 2, 3)), e.sum((0, 2, 3))]) for e, n in (
            (exact, normal(x, norm)), (exact.float(), normal(x, norm).float()))]  # fmt: skip
        found = apart(sums, *both)
        return found if g is None else furthest(found, apart(g, exact, rounded(exact)))

    def gradient(shape: tuple[int, ...]) -> Found:
        grad, x, norm = draw(shape), draw(shape), draw.norm(shape[1])
        g, hat = grad.double() * (normalised(x, norm) > 0), normal(x, norm)
        sums = torch.stack([(g * hat).sum((0, 2, 3)), g.sum((0, 2, 3))])
        ours = norm_act.gradient(grad, x, *norm, sums.float(), "relu", True)
        with_normal, alone = (column(s / (x.numel() // x.shape[1])) for s in sums)
        exact = column(norm[2]) * column(norm[1]) * (g - alone - hat * with_normal)
        return apart(ours, exact, rounded(exact))

    def merged(chunks: int, each: int = 4, C: int = 64) -> Found:
        """Merge the statistics of chunks of rows, the last of which is shorter."""
        x = draw((chunks * each, C, 1, 1))[:-1, :, 0, 0].double() + 3
        some = [torch.var_mean(part, 0, correction=0) for part in x.split(each)]
        partial = torch.stack([torch.stack([mean, variance * len(part)])
                               for (variance, mean), part in zip(some, x.split(each), strict=True)])  # fmt: skip
        return furthest(*same_statistics(norm_act.merge(partial.float(), len(x), each, EPS), x))

    def statistics(shape: tuple[int, ...]) -> Found:
        x = draw(shape) + 3
        return furthest(*same_statistics(norm_act.statistics(x, EPS), x))

    cases: dict[str, Callable[[tuple[int, ...]], list[Found]]] = {
        "statistics_kernel": lambda shape: [statistics(shape)],
        "apply_kernel": lambda shape: [applied(shape, residual) for residual in (False, True)],
        "sums_kernel": lambda shape: [summed(shape, from_y) for from_y in (False, True)],
        "gradient_kernel": lambda shape: [gradient(shape)],
    }
    for kernel, case in cases.items():
        for shape in shapes:
            yield Check(kernel, "x".join(map(str, shape)), lambda s=shape, c=case: furthest(*c(s)))  # type: ignore[misc]
    yield Check("merge_kernel", "7 chunks", lambda: merged(7))
    many = norm_act.CHUNKS + 44
    yield Check("combine_kernel", f"{many} chunks", lambda: merged(many))


def clustering(args: argparse.Namespace) -> Iterator[Check]:
    """Check clusterings of as many filters as the prunable layers have, for few of their input channels."""
    from reprune_triton.kernels.clustering import launch, table

    generator = torch.Generator().manual_seed(args.seed)
    with torch.device("meta"):
        model = networks.build(args.model)
    prunable = analysis.prunable(model, (1, 3, args.size, args.size)).prunable
    shapes = list(dict.fromkeys(tuple(model.get_submodule(x.name).weight.shape) for x in prunable))  # type: ignore[arg-type]
    sizes = list(dict.fromkeys((n, min(m, args.columns), kh, kw) for n, m, kh, kw in shapes))[: args.shapes]
    sizes += [] if args.shapes else [(2048, 2, 1, 1), (130, 2, 5, 5)]
    layers = [
        ops.Layer(torch.randn(size, generator=generator).to(args.device), name="x".join(map(str, size)))
        for size in sizes
    ]
    seeds = [(number, number + 1) for number in range(len(layers))]

    @functools.cache
    def wanted(name: str) -> tuple[Any, list[Any]]:
        """Return the points of a layer, and their linkage matrices by the reference."""
        (layer,) = (layer for layer in layers if layer.name == name)
        on_cpu = layer._replace(weight=layer.weight.cpu())
        (merges,) = ops.ward_network([on_cpu], "ward", "reference")
        return on_cpu.points().double().numpy(), list(merges.to_scipy())

    def clustered(layer: ops.Layer, algorithm: str) -> Found:
        (found,) = ops.cluster_network([layer], [(layer.n + 1) // 2], "ward", "triton", algorithm)
        points, theirs = wanted(layer.name)
        peers.check_same(layer.name, points, theirs, np.arange(layer.problems), *found)
        return 0.0, 0.0

    def magnitude(layer: ops.Layer) -> Found:
        report = launch.cluster(launch.prepare([layer])).report[0, table.MAGNITUDE.value]
        return differ((report, layer.weight.abs().max().view(torch.int32)))

    def cut(layer: ops.Layer) -> Found:
        (merges,) = ops.ward_network([layer], "ward", "triton")
        keep = (layer.n + 1) // 2
        ours, other = (ops.cut(merges, keep, impl) for impl in ("triton", "reference"))
        return differ((ours.labels, other.labels), (torch.tensor(ours.h), torch.tensor(other.h)))

    def covered(layer: ops.Layer) -> Found:
        labels = ops.cluster_network([layer], [(layer.n + 1) // 2], "ward", "triton")[0][1].labels
        found = []
        for tie in ("random", "index"):
            ours, wanted = (ops.cover(x, (layer.n + 1) // 2, tie, 3, impl) for x, impl in (
                (labels, "triton"), (labels.cpu(), "reference")))  # fmt: skip
            counts = (torch.tensor(ours[2:]), torch.tensor(wanted[2:]))
            found.append(differ((ours.order, wanted.order), (ours.gains, wanted.gains), counts))
        return max(found)

    def bits() -> Found:
        work = steps.Work(layers, seeds=seeds)
        return differ((steps.Triton(work).bits(), steps.Reference(work).bits()))

    found = [Check("bits_kernel", f"{len(layers)} layers", bits)]
    for layer in layers:
        for algorithm in ops.ALGORITHMS:
            kernel = launch.configuration(layer.n, layer.d, "ward", algorithm).kernel.__name__
            name = f"{layer.name}, {algorithm}"
            found.append(Check(kernel, name, lambda x=layer, a=algorithm: clustered(x, a)))  # type: ignore[misc]
        for kernels, case in ((("magnitude_kernel",), magnitude), (("cut_height_kernel", "label_kernel"), cut),
                              (("membership_kernel", "cover_kernel"), covered)):  # fmt: skip
            found += [Check(kernel, layer.name, lambda x=layer, c=case: c(x)) for kernel in kernels]  # type: ignore[misc]
    yield from sorted(found, key=lambda check: check.kernel)


def copies(args: argparse.Namespace) -> Iterator[Check]:
    draw, convs = Numbers(args), convolutions(args)

    def copied() -> Found:
        """Copy a narrow network's parameters on their way forward, and their gradients on the way back."""
        generator = torch.Generator().manual_seed(args.seed)
        tensors, cuts = [], list[list[tuple[int, Tensor]]]()
        for conv in convs:
            for shape in (conv.w, conv.w[:1]):
                drawn = draw((*shape, 1, 1, 1)[:4]).float().reshape(shape)
                tensors.append(drawn.requires_grad_())
                half = [torch.randperm(n, generator=generator)[: (n + 1) // 2].sort().values for n in shape[:2]]
                cuts.append([(dim, index.to(drawn.device)) for dim, index in enumerate(half)])
        dtypes = [torch.bfloat16 if tensor.dim() == 4 else torch.float32 for tensor in tensors]
        ours = Pack(cuts, impl="triton").gather(tensors, dtypes)
        assert ours is not None
        wanted = [layers.gather(t, cut).to(dtype) for t, cut, dtype in zip(tensors, cuts, dtypes, strict=True)]
        backs = [torch.ones_like(x) * (number + 1) for number, x in enumerate(wanted)]
        both = (torch.autograd.grad(some, tensors, backs) for some in (ours, wanted))
        return differ(*zip(ours, wanted, strict=True), *zip(*both, strict=True))

    yield Check("copy_kernel", f"{2 * len(convs)} tensors", copied)


FAMILIES: dict[str, Callable[[argparse.Namespace], Iterator[Check]]] = {
    "forward": forward, "gradients": gradients, "norms": norms, "clustering": clustering, "copies": copies,
}  # fmt: skip
