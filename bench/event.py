"""Time one pruning event, all prunable layers: our clustering, cut and selection beside other clustering libraries.

Times are only shown once the results are the same: the heights of every merge, and the clusters at the cut.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from reprune_triton import channels, models, ops
from reprune_triton.bench import rows
from reprune_triton.errors import RepruneError

TOLERANCE = 1e-5  # float32 heights against float64 ones, relative to the largest
Peer = Callable[[np.ndarray], np.ndarray]  # points (n, d) -> linkage matrix


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet50", help="a name of reprune_triton.models (default: resnet50)")
    parser.add_argument("--sparsity", type=float, default=0.5, help="of every layer (default: 0.5)")
    parser.add_argument("--linkage", default="ward", choices=ops.LINKAGES)
    parser.add_argument("--impl", default="auto", choices=ops.IMPLS)
    parser.add_argument("--device", default="cpu", help="where our side runs; the others always use the CPU")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the others have only one (default: 1)")
    parser.add_argument("--repeat", type=int, default=3, help="our time is the median of this many runs (default: 3)")
    parser.add_argument(
        "--channels", type=int, metavar="K", help="the others cluster only K input channels per layer, extrapolated"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the ties and the sampled channels")
    parser.add_argument("--json", metavar="FILE", help="append the results to this file, one JSON row per line")


@dataclass
class Layer:
    """One layer of the event; times in seconds."""

    name: str
    weight: Tensor  # (n_out, n_in, kh, kw)
    keep: int
    cluster: float = 0.0
    select: float = 0.0  # cut and cover
    peers: dict[str, float] = field(default_factory=dict)

    @property
    def part(self) -> str:
        return "1x1" if self.weight.shape[2:] == (1, 1) else "KxK"


def run(args: argparse.Namespace) -> None:
    if args.threads < 1 or args.repeat < 1 or (args.channels is not None and args.channels < 1):
        raise RepruneError("--threads, --repeat and --channels must be at least 1.")
    console = Console(width=None if sys.stdout.isatty() else 150)  # a file or a pipe has no width to keep to
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = models.build(args.model, num_classes=10 if args.model in models.CIFAR_RESNETS else 1000)
    weights = dict(model.named_parameters())
    layers = []
    for prunable in channels.analyse(model, models.example_inputs(args.model)).prunable:
        weight = weights[f"{prunable.name}.weight"].detach().to(args.device)
        layers.append(Layer(prunable.name, weight, ops.keep_count(len(weight), args.sparsity)))
    if not layers:
        raise RepruneError(f"{args.model} has no prunable layer; name another --model.")

    found = time_ours(layers, args)
    peers = find_peers(args.linkage)
    for name in ("SciPy", "fastcluster"):
        if name not in peers:
            console.print(f"{name} is not installed: its column is left out. pip install {name.lower()}")
    undecided = 0
    random = np.random.default_rng(args.seed)
    for layer in layers:
        n_in = layer.weight.shape[1]
        sampled = n_in if args.channels is None else min(args.channels, n_in)
        chosen = np.sort(random.choice(n_in, sampled, replace=False))
        points = ops.kernel_points(layer.weight).double().cpu().numpy()[chosen]
        for name, peer in peers.items():
            started = time.perf_counter()
            theirs = [peer(x) for x in points]
            layer.peers[name] = (time.perf_counter() - started) * n_in / sampled
            undecided += check_same(f"{layer.name}, {name}", theirs, chosen, *found[layer.name])
    report(console, layers, list(peers), undecided, args)


def time_ours(layers: list[Layer], args: argparse.Namespace) -> dict[str, tuple[ops.Merges, ops.Clusters]]:
    """Cluster, cut and select, as the pruner does: layers of one shape are clustered in one call."""
    device = torch.device(args.device)

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    groups: dict[tuple[int, ...], list[Layer]] = {}
    for layer in layers:
        points = ops.kernel_points(layer.weight)
        groups.setdefault((*points.shape[1:], ops.scale_of(points)), []).append(layer)
    ops.select_filters(layers[0].weight[:, :2], layers[0].keep, linkage=args.linkage, impl=args.impl)  # warm up

    found = {}
    for group in groups.values():
        times = []
        for _ in range(args.repeat):
            started = clock()
            merges = ops.ward(torch.cat([ops.kernel_points(layer.weight) for layer in group]), args.linkage, args.impl)
            times.append(clock() - started)
        first = 0
        for layer in group:
            last = first + layer.weight.shape[1]
            layer.cluster = float(np.median(times)) * (last - first) / len(merges.parent)
            own, times_select = merges.problems(first, last), []
            for _ in range(args.repeat):
                started = clock()
                clusters = ops.cut(own, layer.keep)
                ops.cover(clusters.labels, layer.keep, seed=args.seed, impl=args.impl)
                times_select.append(clock() - started)
            layer.select = float(np.median(times_select))
            found[layer.name] = own, clusters
            first = last
    return found


def find_peers(linkage: str) -> dict[str, Peer]:
    """The other libraries that are installed, each with its quickest function for this linkage."""
    peers: dict[str, Peer] = {}
    try:
        from scipy.cluster import hierarchy

        peers["SciPy"] = lambda points: hierarchy.linkage(points, linkage)
    except ImportError:
        pass
    try:
        import fastcluster

        vector = linkage in ("ward", "single")  # the others need the distance matrix
        function = fastcluster.linkage_vector if vector else fastcluster.linkage
        peers["fastcluster"] = lambda points: function(points, linkage)
    except ImportError:
        pass
    return peers


def check_same(
    where: str, theirs: list[np.ndarray], chosen: np.ndarray, merges: ops.Merges, clusters: ops.Clusters
) -> int:
    """Compare heights and the clusters at the cut; raise where they differ.

    The cut is taken after as many merges in theirs as in ours. Returns the channels left undecided: those where
    the next merge is so close that float32 cannot tell which of the two comes first.
    """
    heights = (merges.height.double().cpu().sort(dim=1).values * merges.scale).numpy()[:, :-1]
    happened = (heights <= clusters.h).sum(axis=1) if clusters.h else np.zeros(len(heights), dtype=np.int64)
    if merges.linkage == "ward":
        heights = np.sqrt(2 * heights)
    labels = clusters.labels.cpu().numpy()
    undecided = 0
    for Z, channel in zip(theirs, chosen, strict=True):
        if not len(Z):
            continue
        slack, k = TOLERANCE * Z[-1, 2], happened[channel]
        wrong = np.abs(Z[:, 2] - heights[channel]).max()
        if not wrong <= slack:
            raise RepruneError(f"{where}, channel {channel}: merge heights differ by {wrong:.2e}; no times are shown.")
        if not _same_partition(_after(Z, k), labels[channel]):
            if 0 < k < len(Z) and Z[k, 2] - Z[k - 1, 2] <= 2 * slack:
                undecided += 1
            else:
                raise RepruneError(f"{where}, channel {channel}: other clusters at the cut; no times are shown.")
    return undecided


def _after(Z: np.ndarray, k: int) -> np.ndarray:
    """Labels (n,) of the clusters after the first k merges of a linkage matrix."""
    n = len(Z) + 1
    up = np.arange(2 * n - 1)
    for t in range(k):
        up[Z[t, :2].astype(np.int64)] = n + t
    while (up[up] != up).any():
        up = up[up]
    return up[:n]


def _same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = a.astype(np.int64) * (int(b.max()) + 1) + b
    return len(np.unique(pairs)) == len(np.unique(a)) == len(np.unique(b))


def report(console: Console, layers: list[Layer], peers: list[str], undecided: int, args: argparse.Namespace) -> None:
    settings: dict[str, Any] = rows.environment(args.device) | {
        "benchmark": "event", "model": args.model, "sparsity": args.sparsity, "linkage": args.linkage,
        "impl": args.impl, "seed": args.seed, "repeat": args.repeat, "peer_channels": args.channels,
        "extrapolated": args.channels is not None and any(args.channels < layer.weight.shape[1] for layer in layers),
        "checked": bool(peers), "undecided": undecided,
    }  # fmt: skip
    measured = "" if not settings["extrapolated"] else f", extrapolated from {args.channels} channels per layer"
    table = Table(
        title=f"One pruning event of {args.model}: {args.linkage}, sparsity {args.sparsity}, "
        f"{settings['device']}, {settings['threads']} CPU thread(s), seconds",
        caption="Clustering alone is compared; cut and selection come on top. 1x1 kernels are points on a line: that "
        "part of the gain is the algorithm's. "
        f"Other libraries{measured}: one call per input channel on {settings['cpu']}.",
    )
    table.add_column("layer")
    for column in ("n_out", "n_in", "kernel", "keep", "clustering", "cut, select", *peers):
        table.add_column(column, justify="right")
    for name in peers:
        table.add_column(f"{name} / ours", justify="right")

    def times(some: list[Layer]) -> dict[str, float]:
        spent = {"cluster_s": sum(layer.cluster for layer in some), "select_s": sum(layer.select for layer in some)}
        spent["event_s"] = spent["cluster_s"] + spent["select_s"]
        return spent | {f"{name.lower()}_s": sum(layer.peers[name] for layer in some) for name in peers}

    def line(title: str, shape: list[str], some: list[Layer]) -> None:
        spent = times(some)
        theirs = [spent[f"{name.lower()}_s"] for name in peers]
        cells = [f"{spent['cluster_s']:.4f}", f"{spent['select_s']:.4f}", *(f"{t:.4f}" for t in theirs)]
        table.add_row(title, *shape, *cells, *(f"{t / spent['cluster_s']:.2f}x" for t in theirs))

    for layer in layers:
        n_out, n_in, kh, kw = layer.weight.shape
        line(layer.name, [str(n_out), str(n_in), f"{kh}x{kw}", str(layer.keep)], [layer])
        if args.json:
            shape = {"n_out": n_out, "n_in": n_in, "kh": kh, "kw": kw, "keep": layer.keep}
            rows.append(args.json, settings | {"row": "layer", "layer": layer.name} | shape | times([layer]))
    table.add_section()
    sums = {part: [layer for layer in layers if layer.part == part] for part in ("1x1", "KxK")}
    for part, some in (*sums.items(), ("total", layers)):
        if some:
            problems = sum(layer.weight.shape[1] for layer in some)
            line(f"{part}: {len(some)} layers", ["", str(problems), "", ""], some)
            if args.json:
                count = {"layers": len(some), "problems": problems}
                rows.append(args.json, settings | {"row": part} | count | times(some))
    console.print(table)
    total = times(layers)
    others = "".join(f"; {name}'s clustering alone {total[f'{name.lower()}_s']:.2f} s" for name in peers)
    console.print(f"The whole event: {total['event_s']:.2f} s (clustering, cut, selection){others}.")
    if peers:
        console.print(
            f"Checked first: equal merge heights (to {TOLERANCE:g} of the largest) and equal clusters at the cut "
            f"in every channel compared; {undecided} had two merges at the cut too close to tell apart."
        )
    else:
        console.print("Nothing was compared. pip install scipy fastcluster")
