"""The method's questions, answered by training: a baseline and one changed option in every arm, over several seeds.

A run is a row: its options, what came of it, and the command that repeats it. Runs that are in the file already are not
made again, and one that was interrupted goes on from its last epoch; so a study can be stopped and begun at will. Arms
of several questions that are the same run share its row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from reprune_triton import train
from reprune_triton.bench import rows
from reprune_triton.errors import RepruneError
from reprune_triton.train import Options

Changes = dict[str, Any]  # of train.Options


class Tier(NamedTuple):
    """A size of study: data, network and schedule."""

    data: str
    changes: Changes
    needs: str


TIERS = {
    "digits": Tier("digits", {"model": "resnet20", "sparsity": 0.5, "round_to": 1}, "20 s a run on one CPU thread"),
    "fashion": Tier(
        "fashion-mnist", {"model": "resnet8", "sparsity": 0.5, "round_to": 1, "epochs": 5, "every": 1},
        "5 minutes a run on one CPU thread",
    ),
    "cifar": Tier("cifar10", {"model": "resnet56", "sparsity": 0.55, "round_to": 1}, "a GPU; the paper's setting"),
}


class Question(NamedTuple):
    """One ablation."""

    text: str
    source: str  # in the paper
    arms: Callable[[Options], dict[str, Changes]]  # of the baseline; an arm that changes nothing is the baseline


def _linkages(_: Options) -> dict[str, Changes]:
    return {name: {"linkage": name} for name in ("ward", "single", "complete", "average")}


def _untils(base: Options) -> dict[str, Changes]:
    shares = (30, 40, 50, 60, 70, 72, 100)  # one of them is the recipe's
    epochs = {max(1, round(share / 100 * base.epochs)): f"{share}%" for share in shares}  # each once
    return {share: {"until": until} for until, share in sorted(epochs.items())}


def _widths(_: Options) -> dict[str, Changes]:
    return {str(width): {"round_to": width} for width in (1, 8, 16, 32)}


def _choices(_: Options) -> dict[str, Changes]:
    return {"random": {}, "random, another draw": {"prune_seed": 2**31}} | {
        rule: {"tie": rule} for rule in ("index", "norm", "gamma")
    }


def _selections(_: Options) -> dict[str, Changes]:
    return {name: {"select": name} for name in ("coverage", "l1", "gamma", "random")}


QUESTIONS = {
    "linkage": Question("Is Ward the right linkage?", "Table 5", _linkages),
    "until": Question("For how much of the training should channels be pruned?", "Table 9", _untils),
    "select": Question("Is coverage worth it? Other filters, the rest alike.", "Fig. 3", _selections),
    "random": Question("Does it matter which of equally good filters is taken?", "Table 11", _choices),
    "width": Question("What does it cost to keep channels in multiples?", "ours", _widths),
}


class Run(NamedTuple):
    """One training."""

    tier: str
    arm: str
    options: Options

    @property
    def key(self) -> str:
        return key_of(saved(self.options))


class OutOfTime(Exception):
    """The budget is spent; the run goes on next time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", choices=QUESTIONS, help="; ".join(f"{k}: {q.text}" for k, q in QUESTIONS.items()))
    parser.add_argument(
        "--tier", choices=TIERS, default="digits",
        help="; ".join(f"{name}: {tier.needs}" for name, tier in TIERS.items()),
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="default: 0 1 2 3 4")
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--data-dir", help="folder of the data set")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--epochs", type=int, help="instead of the tier's")
    parser.add_argument("--budget", help="stop cleanly after this time: 90s, 9m or 2h")
    parser.add_argument("--runs", default="runs/ablate", help="folder of unfinished runs (default: runs/ablate)")
    parser.add_argument(
        "--json", default="bench/results/ablate.jsonl", metavar="FILE", help="the rows (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    planned, baseline = plan(args)
    known = load(args.json)
    missing = [one for one in planned if one.key not in known]
    console.print(f"{QUESTIONS[args.question].text} {len(planned)} runs, {len(planned) - len(missing)} known already.")
    deadline = time.monotonic() + seconds(args.budget) if args.budget else float("inf")
    for number, one in enumerate(missing, 1):
        if time.monotonic() >= deadline:
            break
        try:
            row = perform(one, args, deadline)
        except OutOfTime:
            console.print(f"{args.budget} are over; call it again to go on.")
            break
        rows.append(args.json, row)
        known[one.key] = row
        console.print(
            f"{number}/{len(missing)}  {one.arm}, seed {one.options.seed}: {row['accuracy']:.2%} at "
            f"{row['flops']:.1%} of the FLOPs, {row['seconds']:.0f} s"
        )
    found = [(one.arm, known[one.key]) for one in planned if one.key in known]
    console.print(table(args.question, args.tier, baseline, found))


def plan(args: argparse.Namespace) -> tuple[list[Run], str]:
    """All runs of the question, seed by seed: so every arm has some, whenever it is stopped; and the baseline's arm."""
    tier = TIERS[args.tier]
    given = {key: getattr(args, key) for key in ("data_dir", "device", "threads", "epochs")}
    base = tier.changes | {key: value for key, value in given.items() if value is not None}
    usual = train.recipe(tier.data, **base)
    arms = QUESTIONS[args.question].arms(usual)
    baseline = next(arm for arm, changes in arms.items() if vars(usual) | changes == vars(usual))
    for name in args.arms or ():
        if name not in arms:
            raise RepruneError(f"no arm {name!r}: there are {', '.join(arms)}")
    found = [
        Run(args.tier, arm, train.recipe(tier.data, **base | changes | {"seed": seed}))
        for seed in args.seeds for arm, changes in arms.items() if not args.arms or arm in args.arms
    ]  # fmt: skip
    return found, baseline


def saved(options: Options) -> Changes:
    """What makes a run the run it is."""
    found: Changes = json.loads(json.dumps(train._saved(options)))  # as a row has them
    return found


def key_of(options: Changes) -> str:
    """An option that a row does not know yet had its default."""
    options = saved(Options()) | options
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]


def load(path: str | Path) -> dict[str, dict[str, Any]]:
    """The rows of a file by the run's key."""
    if not Path(path).exists():
        return {}
    found = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
    return {key_of(row["options"]): row for row in found if row["benchmark"] == "ablate"}


def seconds(text: str) -> float:
    """Of "90s", "9m" or "2h"."""
    units = {"s": 1, "m": 60, "h": 3600}
    try:
        found = float(text[:-1]) * units[text[-1]]
    except (KeyError, ValueError, IndexError):
        found = -1
    if found < 0:
        raise RepruneError(f"--budget must be a time such as 90s, 9m or 2h; got {text!r}")
    return found


def perform(one: Run, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Train, or go on training, and return the row."""
    folder = Path(args.runs) / one.key
    began = (folder / "last.safetensors").exists()
    options = Options(**vars(one.options) | {"out": str(folder), "resume": began})

    def on_epoch(record: train.Record) -> None:
        if time.monotonic() >= deadline and record["epoch"] < options.epochs:
            raise OutOfTime

    result = train.train(options, on_epoch)
    pruner = result.pruner
    history = pruner.history if pruner else []
    layers = history[-1].layers if history else ()
    row = rows.environment(options.device or ("cuda" if torch.cuda.is_available() else "cpu")) | {
        "benchmark": "ablate", "tier": one.tier, "seed": options.seed, "options": saved(one.options),
        "accuracy": result.accuracy,
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "flops": history[-1].flops if history else 1.0, "sparsity": history[-1].sparsity if history else 0.0,
        "coverage": [event.coverage for event in history], "events": [event.epoch for event in history],
        "layers": {layer.name: layer.sparsity for layer in layers},
        "layer_coverage": {x.name: [event.layers[i].coverage for event in history] for i, x in enumerate(layers)},
        "active": {name: index.tolist() for name, index in pruner.active.items()} if pruner else {},
        "seconds": result.seconds, "event_seconds": result.event_seconds, "command": command(one.options),
    }  # fmt: skip
    shutil.rmtree(folder)
    return row


def command(options: Options) -> str:
    """What repeats this run, on its own."""
    words = ["python", "-m", "reprune_triton.train"]
    for name, value in vars(options).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words += [] if name == "resume" else [flag if value else f"--no-{flag[2:]}"]
        elif value not in (None, ()) and name not in ("out", "data_dir", "device", "threads", "workers"):
            words += [flag, *(value if isinstance(value, tuple) else (str(value),))]
    return shlex.join(words)


COLUMNS = ("runs", "accuracy", "difference", "FLOPs left", "channels pruned", "coverage", "overlap", "seconds")


def table(question: str, tier: str, baseline: str, found: Iterable[tuple[str, dict[str, Any]]]) -> Table:
    """What is known of every arm."""
    made = Table(
        title=f"{QUESTIONS[question].text} ({QUESTIONS[question].source}; tier {tier})",
        caption=f"Difference: to {baseline}, seed by seed, in points, with the 95% confidence interval. "
        "Overlap: of the filters that this arm or the baseline has left, the share that both have.",
    )
    for column in (question, *COLUMNS):
        made.add_column(column, justify="left" if column == question else "right")
    for line in summary(baseline, found):
        made.add_row(*line)
    return made


def summary(baseline: str, found: Iterable[tuple[str, dict[str, Any]]]) -> list[list[str]]:
    """Of every arm its name and COLUMNS: means (of coverage over all events), standard deviations, and differences to
    the same seeds of the baseline."""
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    for arm, row in found:
        arms.setdefault(arm, {})[row["seed"]] = row
    base, lines = arms.get(baseline, {}), []
    for arm, runs in arms.items():
        pairs = [(row, base[seed]) for seed, row in runs.items() if seed in base and arm != baseline]
        differences = [100 * (row["accuracy"] - usual["accuracy"]) for row, usual in pairs]
        shares = [overlap(row["active"], usual["active"]) for row, usual in pairs]
        flops, sparsity, seconds = (
            statistics.mean(row[key] for row in runs.values()) for key in ("flops", "sparsity", "seconds")
        )
        # The last event hardly has a choice: all but a few filters that are active then are kept.
        coverage = statistics.mean(rate for row in runs.values() for rate in row["coverage"])
        lines.append([
            arm, str(len(runs)), spread([100 * row["accuracy"] for row in runs.values()], "%"), interval(differences),
            f"{flops:.1%}", f"{sparsity:.1%}", f"{coverage:.1%}", f"{statistics.mean(shares):.1%}" if shares else "",
            f"{seconds:.0f}",
        ])  # fmt: skip
    return lines


def overlap(some: dict[str, list[int]], others: dict[str, list[int]]) -> float:
    """Of the filters in either of two networks, the share that is in both."""
    pairs = [(set(some[name]), set(others[name])) for name in some]
    return sum(len(a & b) for a, b in pairs) / sum(len(a | b) for a, b in pairs)


def spread(values: list[float], unit: str = "") -> str:
    """Mean, and standard deviation if there is one."""
    more = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{unit}{more}"


def interval(values: list[float]) -> str:
    """Mean of differences, and the 95% confidence interval of it by Student's t."""
    if not values:
        return ""
    if len(values) < 2:
        return f"{values[0]:+.2f}"
    from scipy import stats

    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.2f} ± {half:.2f}"
