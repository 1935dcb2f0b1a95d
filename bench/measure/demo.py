"""Train a network dense and pruned, on real images, and compare what comes out.

The pruned network is saved, loaded again and checked to give the outputs of the network that was trained.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from reprune_triton.bench import rows, terminal
from reprune_triton.errors import RepruneError
from reprune_triton.running import analysis
from reprune_triton.training import checkpoint, data, models
from reprune_triton.training.loop import train
from reprune_triton.training.options import recipe

BATCHES = (1, 256)  # of the latencies
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    terminal.add_options(parser, "model threads", model="resnet20")
    parser.add_argument("--data", default="digits", help="default: digits, which needs no download")
    parser.add_argument("--data-dir", help="folder of the data set")
    parser.add_argument("--flops", type=float, default=0.44, help="share of the FLOPs to keep (default: 0.44)")
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one dense and one pruned run each")
    parser.add_argument("--out", default="runs/demo", help="where the pruned networks go (default: runs/demo)")


def run(args: argparse.Namespace) -> None:
    console = Console()
    pairs = []
    for seed in args.seeds:
        console.print(f"{args.model} on {args.data}, seed {seed}: training dense, then pruned ...")
        pairs.append(_pair(args, seed))
        for row in pairs[-1]:
            rows.append(args.json, row)
    console.print(_table(args, pairs))
    exported = ", ".join(pruned["exported"] for _, pruned in pairs)
    console.print(f"The pruned network: {exported}")
    console.print("Loaded again, it gives the outputs of the network that was trained.")


def _pair(args: argparse.Namespace, seed: int) -> tuple[Row, Row]:
    """Return the row of a dense run and that of a pruned run with the same recipe and seed."""
    changes = {
        key: value for key in ("model", "data_dir", "epochs", "threads") if (value := getattr(args, key)) is not None
    }
    options = recipe(args.data, seed=seed, device="cpu", **changes)
    dense = train(options)
    slim = train(recipe(args.data, seed=seed, device="cpu", flops=args.flops, **changes))
    assert slim.pruner is not None
    path = Path(args.out) / f"{args.model}-{args.data}-seed{seed}.safetensors"
    images = data.load(args.data, args.data_dir, batch=options.batch, device="cpu")
    about = {"model": args.model, "num_classes": images.classes, "in_channels": images.channels}
    checkpoint.save(slim.model, path, extra=about)

    again = checkpoint.load(path, models.build(args.model, images.classes, images.channels)).eval()
    trained = slim.pruner.model.eval()  # parameters in full shape
    with torch.no_grad():
        for x, _ in images.test_batches():
            if not torch.allclose(again(x), trained(x), rtol=0, atol=1e-4):
                raise RepruneError(f"{path}: the saved network does not give the outputs of the trained one")

    x = next(iter(images.test_batches()))[0]
    times = _latencies({"dense": dense.model.eval(), "pruned": again}, x)
    environment = rows.environment("cpu")
    made = []
    for arm, result in (("dense", dense), ("pruned", slim)):
        pruner = result.pruner
        last = pruner.history[-1] if pruner else None
        made.append(
            environment
            | {
                "benchmark": "demo", "arm": arm, "model": args.model, "data": args.data, "seed": seed,
                "epochs": options.epochs, "accuracy": result.accuracy,
                "parameters": sum(p.numel() for p in result.model.parameters()),
                "macs": sum(cost.macs for cost in analysis.analyse(result.model, x[:1]).costs),
                "flops": result.flops, "coverage": last.coverage if last else None,
                "train_seconds": result.seconds, "event_seconds": result.event_seconds,
                "events": len(pruner.history) if pruner else 0,
                "exported": str(path) if pruner else None,
            }
            | {f"latency_ms_batch{batch}": times[arm][batch] for batch in BATCHES}
        )  # fmt: skip
    return made[0], made[1]


@torch.no_grad()
def _latencies(networks: dict[str, nn.Module], x: Tensor, repeats: int = 30) -> dict[str, dict[int, float]]:
    """Return the median milliseconds of a forward, by network and batch size; the networks take turns."""
    found: dict[str, dict[int, float]] = {name: {} for name in networks}
    for batch in BATCHES:
        images = x[torch.arange(batch) % len(x)]
        spent: dict[str, list[float]] = {name: [] for name in networks}
        for turn in range(repeats + 3):
            for name, network in networks.items():
                started = time.perf_counter()
                network(images)
                if turn >= 3:  # the first ones warm up
                    spent[name].append((time.perf_counter() - started) * 1e3)
        for name in networks:
            found[name][batch] = statistics.median(spent[name])
    return found


def _table(args: argparse.Namespace, pairs: list[tuple[Row, Row]]) -> Table:
    environment = pairs[0][0]
    table = terminal.table(
        f"{args.model} on {args.data}, {environment['epochs']} epochs, {len(pairs)} seed(s), "
        f"{environment['threads']} thread(s)",
        ("", "dense", "pruned", "change"), ("",), environment["cpu"],
    )  # fmt: skip

    def line(label: str, key: str, form: str, change: str = "") -> None:
        dense, pruned = ([row[key] for row in column] for column in zip(*pairs, strict=True))
        cells = ["-" if None in column else _mean(column, form) for column in (dense, pruned)]
        if change == "points":
            cells.append(_mean([(b - a) * 100 for a, b in zip(dense, pruned, strict=True)], "+.2f") + " points")
        elif change == "ratio":
            cells.append(f"{statistics.mean(pruned) / statistics.mean(dense) - 1:+.1%}")
        table.add_row(label, *cells)

    line("accuracy", "accuracy", ".2%", "points")
    line("parameters", "parameters", ",.0f", "ratio")
    line("FLOPs (multiply-adds per image)", "macs", ",.0f", "ratio")
    for batch in BATCHES:
        line(f"latency, batch {batch} (ms)", f"latency_ms_batch{batch}", ".2f", "ratio")
    line("coverage rate at the last event", "coverage", ".1%")
    line("seconds of training", "train_seconds", ".1f", "ratio")
    line("seconds in pruning events", "event_seconds", ".2f")
    return table


def _mean(values: list[float], form: str) -> str:
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}"
