"""Answer the method's questions by training: a baseline and arms that change one option, over several seeds.

A run is a row: its options, its results, and the command that repeats it. Runs that are in the file already are not
made again, and an interrupted one goes on from its last epoch, so a study can be stopped at any time. Arms of several
questions that are the same run share its row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from reprune_triton.bench import rows, terminal
from reprune_triton.bench.study import arms
from reprune_triton.bench.study.arms import Arm, overlap
from reprune_triton.errors import RepruneError
from reprune_triton.training import loop
from reprune_triton.training.options import FREE, Options, lasting, recipe
from reprune_triton.training.run import Record

Changes = dict[str, Any]  # of `Options`


class Tier(NamedTuple):
    """The size of a study: data, network and schedule."""

    data: str
    changes: Changes
    flops: float  # share to keep, where networks of equal cost are compared
    needs: str


TIERS = {
    "digits": Tier(
        "digits", {"model": "resnet20", "sparsity": 0.5, "round_to": 1}, 0.45, "half a minute a run on one CPU thread"
    ),
    "fashion": Tier(
        "fashion-mnist", {"model": "resnet8", "sparsity": 0.5, "round_to": 1, "epochs": 5, "every": 1}, 0.5,
        "5 minutes a run on one CPU thread",
    ),
    "cifar": Tier(
        "cifar10", {"model": "resnet56", "sparsity": 0.55, "round_to": 1}, 0.4,
        "a GPU; the setting of the paper's tables",
    ),
}  # fmt: skip


class Question(NamedTuple):
    """One ablation."""

    text: str
    source: str  # in the paper
    arms: Callable[[Options], dict[str, Changes]]  # of the baseline; an arm that changes nothing is the baseline
    columns: tuple[str, ...]  # of arms.COLUMNS, beside runs, accuracy and difference
    equal_flops: bool = False  # not at one sparsity, but at the tier's share of FLOPs
    paper: Mapping[str, str] = {}  # what the paper has for an arm
    note: str = ""  # what a reader of the table must know


def _linkages(_: Options) -> dict[str, Changes]:
    return {name: {"linkage": name} for name in ("ward", "single", "complete", "average")}


def _untils(base: Options) -> dict[str, Changes]:
    shares = (30, 40, 50, 60, 70, 72, 100)  # one of them is the recipe's
    epochs = {max(1, round(share / 100 * base.epochs)): f"{share}%" for share in shares}  # each once
    return {share: {"until": until} for until, share in sorted(epochs.items())}


def _draws(_: Options) -> dict[str, Changes]:
    return {"random": {}, "random, another draw": {"prune_seed": 2**31}} | {
        rule: {"tie": rule} for rule in ("index", "norm", "gamma")
    }


def _paradigms(_: Options) -> dict[str, Changes]:
    return {name: {"paradigm": name} for name in ("concurrent", "three-stage")}


def _selections(_: Options) -> dict[str, Changes]:
    return {name: {"select": name} for name in ("coverage", "l1", "gamma", "random")}


def _regrowths(base: Options) -> dict[str, Changes]:
    return {f"{base.regrow}": {}, "0.1": {"regrow": 0.1}, "0": {"regrow": 0.0}} | {
        f"{base.regrow}, by {rule}": {"regrow_by": rule} for rule in ("coverage", "random")
    }


def _widths(_: Options) -> dict[str, Changes]:
    return {str(width): {"round_to": width} for width in (1, 8, 16, 32)}


def _peers(_: Options) -> dict[str, Changes]:
    return {
        "REPrune": {}, "L1 norm": {"select": "l1"}, "BatchNorm gamma": {"select": "gamma"},
        "thin from scratch": {"paradigm": "scratch"}, "dense": {"flops": None},
    }  # fmt: skip


QUESTIONS = {
    "linkage": Question(
        "Is Ward the right linkage?", "Table 5", _linkages, ("FLOPs left", "mean coverage", "overlap", "paper"),
        paper={"ward": "93.40%", "single": "lower", "complete": "lower", "average": "lower"},
        note="The linkage decides which filters of a layer stay. How many stay is up to the BatchNorm scales.",
    ),
    "until": Question(
        "For how much of the training should channels be pruned?", "Table 9", _untils,
        ("FLOPs left", "mean coverage", "training FLOPs", "paper"), paper={"72%": "best, of seven on ImageNet"},
        note="At 100% the last event comes after the last epoch, so nothing is trained after it.",
    ),
    "random": Question(
        "Does it matter which of equally good filters is taken?", "Table 11", _draws,
        ("FLOPs left", "mean coverage", "overlap", "paper"),
        paper={"random": "small variation over seeds"} | dict.fromkeys(("index", "norm", "gamma"), "medium variation"),
        note="Another draw also decides what grows back; there the other rules have the draws of the baseline.",
    ),
    "paradigm": Question(
        "Is pruning while training better than after it?", "Table 10", _paradigms,
        ("FLOPs left", "epochs", "training FLOPs", "seconds", "paper"), equal_flops=True,
        paper={"concurrent": "93.40% at 39.62%, 160 epochs", "three-stage": "93.02% at 43.04%, 320 epochs"},
        note="How the paper fine-tunes is not given. Here the learning rate starts anew, which is known to beat a low "
        "one (Renda et al., ICLR 2020).",
    ),
    "coverage": Question(
        "Does coverage rise, and is it worth having? Other filters, the rest alike.", "Fig. 3", _selections,
        ("FLOPs left", "first coverage", "mean coverage", "last coverage", "paper"),
        paper={"coverage": "rises, over 90% late"},
        note="The later an event, the fewer active filters have to go, and that raises coverage with any selection. "
        "What the choice itself gives shows best at the first event.",
    ),
    "regrow": Question(
        "What does regrowth give?", "ours", _regrowths, ("FLOPs left", "overlap", "training FLOPs"),
        note="Without regrowth the first event prunes all that is to go, so the scales of the first epochs decide "
        "which layers get narrow.",
    ),
    "width": Question(
        "What does it cost to keep channels in multiples?", "ours", _widths,
        ("channels pruned", "FLOPs left", "mean coverage", "seconds"),
        note="The stages of these networks have 16, 32 and 64 channels: in multiples of 16 the first cannot get "
        "narrower, in multiples of 32 neither can the second. Networks for ImageNet are wider.",
    ),
    "baseline": Question(
        "Is REPrune worth it, at equal FLOPs?", "Table 2", _peers,
        ("FLOPs left", "parameters", "training FLOPs", "seconds", "paper"), equal_flops=True,
        paper={"REPrune": "93.40% at 39.62%", "dense": "93.39%"},
        note="A thin network from scratch is the peer that any pruning must beat.",
    ),
}  # fmt: skip


class Run(NamedTuple):
    """One training."""

    question: str
    tier: str
    arm: str
    options: Options
    baseline: bool  # of its question

    @property
    def key(self) -> str:
        return key_of(saved(self.options))

    @property
    def paper(self) -> str:
        return QUESTIONS[self.question].paper.get(self.arm, "")

    @property
    def epochs(self) -> int:
        return self.options.epochs * self.options.stages


class OutOfTime(Exception):
    """The budget is spent; the run goes on next time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "questions", nargs="+", choices=[*QUESTIONS, "all"], metavar="QUESTION",
        help="; ".join(f"{name}: {question.text}" for name, question in QUESTIONS.items()) + "; or all",
    )  # fmt: skip
    parser.add_argument(
        "--tier", choices=TIERS, default="digits",
        help="; ".join(f"{name}: {tier.needs}" for name, tier in TIERS.items()),
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="default: 0 1 2 3 4")
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--data-dir", help="folder of the data set")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--graph", action=argparse.BooleanOptionalAction, help="replay steps from a CUDA graph")
    parser.add_argument("--epochs", type=int, help="instead of the tier's")
    parser.add_argument("--note", help="kept in the rows: what a reader must know of the data or the machine")
    parser.add_argument("--budget", help="stop cleanly after this time: 90s, 9m or 2h")
    parser.add_argument("--runs", default="runs/ablate", help="folder of unfinished runs (default: runs/ablate)")
    parser.add_argument(
        "--json", default="bench/results/ablate.jsonl", metavar="FILE", help="the rows (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    console = terminal.console(140)
    names = list(QUESTIONS) if "all" in args.questions else list(dict.fromkeys(args.questions))
    given = {key: getattr(args, key) for key in ("data_dir", "device", "threads", "graph", "epochs")}
    given = {key: value for key, value in given.items() if value is not None}
    plans = {name: plan(name, args.tier, args.seeds, **given) for name in names}
    check_arms(args.arms, plans)
    planned = [one for found in plans.values() for one in found if not args.arms or one.arm in args.arms]
    known = load(args.json)
    wanted = {one.key: one for one in planned}
    # Seed by seed, so that every arm has some runs, whenever it is stopped.
    missing = sorted((one for key, one in wanted.items() if key not in known), key=lambda one: one.options.seed)
    console.print(f"{len(wanted)} runs, {len(wanted) - len(missing)} known already.")
    uncommitted = sum(bool(known[key]["dirty"]) for key in wanted if key in known)
    if uncommitted:
        console.print(f"{uncommitted} of them are of code that was not committed: the report leaves them out.")
    failed: list[str] = []
    deadline = time.monotonic() + seconds(args.budget) if args.budget else float("inf")
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"),
        TimeRemainingColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty(),
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=sum(one.epochs for one in missing))
        for number, one in enumerate(missing, 1):
            if time.monotonic() >= deadline:
                break
            bar.update(task, description=f"{one.arm}, seed {one.options.seed}")
            try:
                row = perform(one, args, deadline, lambda record: bar.advance(task))
            except OutOfTime:
                console.print(f"{args.budget} are over; call it again to go on.")
                break
            except RepruneError as error:  # the others can still be made
                failed.append(f"{one.arm}, seed {one.options.seed}: {error}")
                console.print(failed[-1], markup=False)
                continue
            rows.append(args.json, row)
            known[one.key] = row
            console.print(
                f"{number}/{len(missing)}  {one.question}: {one.arm}, seed {one.options.seed}: {row['accuracy']:.2%} "
                f"at {row['flops']:.1%} of the FLOPs, {row['seconds']:.0f} s"
            )
    for name in names:
        console.print(table(name, args.tier, arms_of([one for one in plans[name] if one in planned], known)))
    if failed:
        raise RepruneError(f"{len(failed)} runs failed: {'; '.join(failed)}")


def check_arms(names: Iterable[str] | None, plans: Mapping[str, list[Run]]) -> None:
    there = list(dict.fromkeys(one.arm for found in plans.values() for one in found))
    for name in names or ():
        if name not in there:
            raise RepruneError(f"no arm {name!r}: there are {', '.join(there)}")


def plan(question: str, name: str, seeds: Iterable[int], **given: Any) -> list[Run]:
    """Return all runs of a question in tier `name`; `given` are further options of every run."""
    tier, asked = TIERS[name], QUESTIONS[question]
    base = tier.changes | given
    if asked.equal_flops:
        base |= {"sparsity": None, "flops": tier.flops}
    usual = recipe(tier.data, **base)
    found = []
    for seed in dict.fromkeys(seeds):
        for arm, changes in asked.arms(usual).items():
            options = recipe(tier.data, **base | changes | {"seed": seed})
            found.append(Run(question, name, arm, options, baseline=vars(usual) | changes == vars(usual)))
    return found


def saved(options: Options) -> Changes:
    """Return the options that make a run the run it is."""
    found: Changes = json.loads(json.dumps(lasting(options)))  # as a row has them
    return found


def key_of(options: Changes) -> str:
    """Return the key of a run. An option that a row does not know yet had its default."""
    options = saved(Options()) | options
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]


def load(path: str | Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a file by the run's key."""
    return {key_of(row["options"]): row for row in rows.read(path) if row["benchmark"] == "ablate"}


def seconds(text: str) -> float:
    """Return the seconds of "90s", "9m" or "2h"."""
    units = {"s": 1, "m": 60, "h": 3600}
    try:
        found = float(text[:-1]) * units[text[-1]]
    except (KeyError, ValueError, IndexError):
        found = -1
    if not 0 <= found < math.inf:
        raise RepruneError(f"--budget must be a time such as 90s, 9m or 2h; got {text!r}")
    return found


def perform(
    one: Run, args: argparse.Namespace, deadline: float, after_epoch: Callable[[Record], None]
) -> dict[str, Any]:
    """Train, or go on training, and return the row."""
    folder = Path(args.runs) / one.key
    began = (folder / "last.safetensors").exists()
    options = Options(**vars(one.options) | {"out": str(folder), "resume": began})

    def on_epoch(record: Record) -> None:
        after_epoch(record)
        if time.monotonic() >= deadline and record["epoch"] < one.epochs:
            raise OutOfTime

    here = rows.environment(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))  # before it, not after
    result = loop.train(options, on_epoch, quiet=True)
    history = result.pruner.history if result.pruner else []
    layers = history[-1].layers if history else ()
    active = result.pruner.active if result.pruner else {}
    row = here | {
        "benchmark": "ablate", "tier": one.tier, "seed": options.seed, "options": saved(one.options),
        "accuracy": result.accuracy, "accuracies": [line["accuracy"] for line in result.log],
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "flops": result.flops, "sparsity": history[-1].sparsity if history else 0.0,
        "coverage": [event.coverage for event in history], "events": [event.epoch for event in history],
        "layers": {layer.name: layer.sparsity for layer in layers},
        "layer_coverage": {x.name: [event.layers[i].coverage for event in history] for i, x in enumerate(layers)},
        "active": {name: index.tolist() for name, index in active.items()},
        "epochs": one.epochs, "training_flops": training_flops(one, result),
        "seconds": result.seconds, "event_seconds": result.event_seconds, "command": command(one.options),
        "graph": options.graph, "note": args.note,
    }  # fmt: skip
    shutil.rmtree(folder)
    return row


def training_flops(one: Run, result: loop.Result) -> float:
    """Return the multiply-adds of a training, as a share of the dense network's in one run of the schedule."""
    history = result.pruner.history if result.pruner else []
    left, total = (1.0 if history else result.flops), 0.0
    now = {event.epoch: event.flops for event in history}
    for epoch in range(1, one.epochs + 1):
        total += left
        left = now.get(epoch, left)  # an event comes after its epoch
    return total / one.options.epochs


def command(options: Options) -> str:
    """Return the command that repeats this run, on its own."""
    words = ["python", "-m", "reprune_triton.train"]
    for name, value in vars(options).items():
        flag = "--" + name.replace("_", "-")
        if name in FREE or value in (None, ()):
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, *(value if isinstance(value, tuple) else (str(value),))]
    return shlex.join(words)


def headings(question: str) -> list[str]:
    """Return the columns of a question's table."""
    return ["runs", "accuracy", "difference", "verdict", *QUESTIONS[question].columns]


def arms_of(planned: Iterable[Run], known: Mapping[str, dict[str, Any]]) -> list[Arm]:
    """Return the arms of a question with their rows, of those runs that are known."""
    found: dict[str, list[tuple[Run, dict[str, Any]]]] = {}
    for one in planned:
        if one.key in known:
            found.setdefault(one.arm, []).append((one, known[one.key]))
    base = {row["seed"]: row for runs in found.values() for one, row in runs if one.baseline}
    made = []
    for arm, runs in found.items():
        own = [row for _, row in runs]
        pairs = [] if runs[0][0].baseline else [(row, base[row["seed"]]) for row in own if row["seed"] in base]
        made.append(
            Arm(
                arm, runs[0][0].baseline, own,
                [round(100 * (row["accuracy"] - usual["accuracy"]), 9) for row, usual in pairs],
                [overlap(row["active"], usual["active"]) for row, usual in pairs if row["active"] and usual["active"]],
                runs[0][0].paper,
            )
        )  # fmt: skip
    return made


def cells(question: str, found: Iterable[Arm]) -> list[list[str]]:
    """Return what is known of every arm, for the columns of a question's table."""
    return [[arm.name, *(arms.COLUMNS[column](arm) for column in headings(question))] for arm in found]


def notes(question: str) -> str:
    """Say what the columns of a question's table mean."""
    known = ((name, text) for name, text in arms.MEANING.items() if name in headings(question))
    return " ".join(f"{name[0].upper()}{name[1:]}: {text}." for name, text in known)


def table(question: str, tier: str, found: Iterable[Arm]) -> Table:
    """Return a table of what is known of every arm."""
    title = f"{QUESTIONS[question].text} ({QUESTIONS[question].source}; tier {tier})"
    made = terminal.table(title, (question, *headings(question)), (question, "paper"), notes(question))
    for line in cells(question, found):
        made.add_row(*line)
    return made
