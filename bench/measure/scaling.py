"""Time clustering and cut of random Gaussian points against the size of a problem, and against how many there are.

As in `event`, times are only shown for results that are those of SciPy, on a few problems of every size.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from rich.table import Table

from reprune_triton import ops
from reprune_triton.bench import rows, terminal
from reprune_triton.bench.measure import device as devices
from reprune_triton.bench.measure import peers
from reprune_triton.errors import RepruneError
from reprune_triton.selection import problems

DEFAULTS = {
    "cuda": {"sizes": [2**k for k in range(4, 13)], "problems": 1024, "size": 256, "counts": [4**k for k in range(8)]},
    "cpu": {"sizes": [2**k for k in range(4, 9)], "problems": 16, "size": 64, "counts": [4**k for k in range(5)]},
}
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--d", type=int, nargs="+", default=[1, 9, 25], help="dimensions (default: 1 9 25)")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="points (default: 16 .. 4096; CPU .. 256)")
    parser.add_argument("--problems", type=int, metavar="P", help="at every size (default: 1024; CPU 16)")
    parser.add_argument("--counts", type=int, nargs="+", metavar="P", help="problems (default: 1 .. 16384; CPU .. 256)")
    parser.add_argument("--size", type=int, metavar="N", help="points, at every count (default: 256; CPU 64)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each cell, ours and SciPy's (default: 2)")
    terminal.add_options(parser, "linkage impl device threads seed", device="cpu")


def run(args: argparse.Namespace) -> None:
    console = terminal.console(150)
    device = devices.use(args.device)
    for name, value in DEFAULTS["cuda" if device.type == "cuda" else "cpu"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    terminal.check_at_least_one(args, "d sizes problems size counts threads")
    if args.seconds <= 0:
        raise RepruneError(f"--seconds must be positive; got {args.seconds}")
    torch.set_num_threads(args.threads)
    sweeps = {
        f"{args.problems} problems, by size": [(n, args.problems) for n in sorted(args.sizes)],
        f"{args.size} points, by number of problems": [(args.size, count) for count in sorted(args.counts)],
    }
    settings = rows.environment(device) | {"benchmark": "scaling", "linkage": args.linkage, "seed": args.seed}
    found: dict[str, list[Row]] = {}
    notes: list[str] = []
    for title, cells in sweeps.items():
        for d in args.d:
            for line in measure(cells, d, args, notes):
                found.setdefault(title, []).append(line)
                rows.append(args.json, settings | {"sweep": title} | line)
    for title, lines in found.items():
        console.print(table(f"{title}; {args.linkage} on {settings['device']}, {args.threads} CPU thread(s)", lines))
    for note in notes:
        console.print(note, markup=False)
    console.print(
        "Times are of clustering and cut. SciPy: one call per problem, clustering alone, on the CPU. A problem "
        "counts as n^2 pairs, whatever is computed."
    )


def measure(cells: list[tuple[int, int]], d: int, args: argparse.Namespace, notes: list[str]) -> Iterator[Row]:
    """Measure a row for every cell (n, P) and algorithm.

    Cells are in order of size, and where one would take too long the larger ones are left out.
    """
    last: dict[str, tuple[float, int]] = {}  # seconds and pairs of the cell before, by algorithm
    scipy_seconds, scipy_n = 0.0, 0
    for n, count in cells:
        generator = torch.Generator().manual_seed(args.seed)
        side = math.isqrt(d)
        shape = (side, side) if side * side == d else (1, d)
        weight = torch.randn(n, count, *shape, generator=generator).to(args.device)
        layer, keep = ops.Layer(weight, name=f"{count} problems of {n} points"), (n + 1) // 2
        impl = "triton" if problems.uses_triton(layer, args.impl) else "reference"
        results, mine = {}, []
        for algorithm in ops.ALGORITHMS if impl == "triton" and args.linkage == "ward" else ("auto",):
            pairs = n * n * count
            if algorithm in last and last[algorithm][0] * pairs / last[algorithm][1] > args.seconds:
                notes.append(f"Left out, beyond --seconds: {algorithm}, d = {d}, n = {n}, {count} problems.")
                continue
            spent, results[algorithm] = time_cell(layer, keep, algorithm, args)
            last[algorithm] = spent, pairs
            mine.append({"n": n, "d": d, "problems": count, "impl": impl, "algorithm": algorithm, "cluster_s": spent,
                         "problem_s": spent / count, "pairs_per_s": pairs / spent,
                         "rounds": rounds(layer, algorithm, args) if impl == "triton" else None})  # fmt: skip
        if not mine:
            continue
        if scipy_n and scipy_seconds * (n / scipy_n) ** 2 > args.seconds:
            notes.append(f"SciPy left out, and ours not checked: d = {d}, n = {n}, {count} problems.")
            each, checked, near_ties = None, 0, 0
        else:
            each, checked, near_ties = against_scipy(layer, results, args)
            scipy_seconds, scipy_n = each or 0.0, n
        for line in mine:
            yield line | {"scipy_problem_s": each, "checked": checked, "near_ties": near_ties}


def time_cell(
    layer: ops.Layer, keep: int, algorithm: str, args: argparse.Namespace
) -> tuple[float, tuple[ops.Merges, ops.Clusters]]:
    """Return the median seconds of clustering and cut, and their result, of as many runs as fit, from 1 to 20.

    On a GPU the first one, which compiles, does not count.
    """
    cuda, spent = layer.weight.is_cuda, list[float]()
    begun = time.perf_counter()
    while len(spent) < 20 + cuda and (len(spent) <= cuda or time.perf_counter() - begun < args.seconds):
        started = time.perf_counter()
        (result,) = ops.cluster_network([layer], [keep], args.linkage, args.impl, algorithm)
        if cuda:
            torch.cuda.synchronize(layer.weight.device)
        spent.append(time.perf_counter() - started)
        if len(spent) == 1:
            begun = time.perf_counter()
    return statistics.median(spent[cuda:]), result


def rounds(layer: ops.Layer, algorithm: str, args: argparse.Namespace) -> float:
    from reprune_triton.kernels.clustering import launch

    return float(launch.cluster(launch.prepare([layer], args.linkage, algorithm)).work[:, 0].cpu().double().median())


def against_scipy(
    layer: ops.Layer, results: dict[str, tuple[ops.Merges, ops.Clusters]], args: argparse.Namespace
) -> tuple[float | None, int, int]:
    """Return SciPy's seconds for one problem, how many problems were checked, and how many of them were near ties."""
    peer = peers.find_peers(args.linkage).get("SciPy")
    if peer is None:
        return None, 0, 0
    order = np.random.default_rng(args.seed).permutation(layer.problems)[:8]
    spent: list[float] = []
    near_ties: set[int] = set()
    while len(spent) < len(order) and sum(spent) < args.seconds:
        channel = order[len(spent) : len(spent) + 1]
        index = torch.from_numpy(channel).to(layer.weight.device)
        points = layer._replace(inputs=index).points().double().cpu().numpy()
        started = time.perf_counter()
        Z = peer(points[0])
        spent.append(time.perf_counter() - started)
        for algorithm, result in results.items():
            where = f"{layer.name}, d = {layer.d}, {algorithm}, SciPy"
            near_ties |= peers.check_same(where, points, [Z], channel, *result).near_ties
    return statistics.median(spent), len(spent), len(near_ties)


def table(title: str, lines: list[Row]) -> Table:
    made = terminal.table(title, ("d", "points", "problems", "algorithm", "ms", "us / problem", "pairs / s", "rounds",
                                 "SciPy, us / problem", "SciPy / ours", "checked"))  # fmt: skip
    for line, after in zip(lines, [*lines[1:], None], strict=True):
        each, scipy = line["problem_s"], line["scipy_problem_s"]
        made.add_row(
            str(line["d"]), str(line["n"]), str(line["problems"]), f"{line['impl']}, {line['algorithm']}",
            f"{line['cluster_s'] * 1e3:.3f}", f"{each * 1e6:.2f}", f"{line['pairs_per_s']:.3g}",
            "" if line["rounds"] is None else f"{line['rounds']:g}",
            "" if scipy is None else f"{scipy * 1e6:.1f}", "" if scipy is None else f"{scipy / each:.2f}x",
            str(line["checked"]), end_section=after is not None and after["d"] != line["d"],
        )  # fmt: skip
    return made
