"""Add up measured steps and events over the schedule of a whole training.

    epochs 1 .. every           dense; the first event comes after them
    after the event of epoch t  sparsity s_bar - delta_t (the network in training is denser than its target)
    after epoch T_prune         sparsity s_bar; the fastest compact variant that was measured, compiled or not

Steps come from rows of `bench step`, interpolated in sparsity; events from rows of `bench event`. Computed, not run:
GPUs are taken to work side by side at no cost, and data and validation to cost nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reprune_triton.bench import rows, terminal
from reprune_triton.errors import RepruneError
from reprune_triton.selection.widths import regrow_share

RESULTS = Path(__file__).resolve().parents[1] / "results"
# Hours of ResNet-50 on ImageNet, 250 epochs on 8 A6000 (the paper's table 6), by the share of FLOPs cut; 0: dense.
PAPER = {0.0: 43.75, 0.43: 40.62, 0.56: 38.75, 0.75: 35.69}
HARDWARE = ("device", "cpu", "torch", "cuda")  # what rows must share; on a CPU also the threads
Row = dict[str, Any]


class Phase(NamedTuple):
    """Epochs in a row at one sparsity."""

    epochs: int
    sparsity: float
    final: bool  # after the last event
    event: bool  # is there one just before?


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", dest="files", nargs="+", required=True, metavar="FILE", help="rows of bench step (--json)"
    )
    parser.add_argument(
        "--events", nargs="+", default=[str(RESULTS / "event.jsonl")], metavar="FILE",
        help="rows of bench event on the same device (default: bench/results/event.jsonl)",
    )  # fmt: skip
    terminal.add_options(parser, "model")
    parser.add_argument("--batch", type=int, help="per GPU (default: the one that was measured)")
    parser.add_argument("--sparsity", type=float, nargs="+", help="s_bar (default: all that were measured)")
    parser.add_argument("--epochs", type=int, default=250, help="default: 250")
    parser.add_argument("--until", type=int, default=180, help="T_prune, the epoch of the last event (default: 180)")
    parser.add_argument("--every", type=int, default=2, help="epochs from event to event (default: 2)")
    parser.add_argument("--regrow", type=float, default=0.3, help="delta_0 (default: 0.3)")
    parser.add_argument("--images", type=int, default=1281167, help="of an epoch (default: 1281167, ImageNet)")
    parser.add_argument("--gpus", type=int, default=8, help="default: 8")


def run(args: argparse.Namespace) -> None:
    terminal.check_at_least_one(args, "epochs until every images gpus")
    if not 0 <= args.regrow < 1:
        raise RepruneError(f"--regrow must be in [0, 1); got {args.regrow}")
    if args.until > args.epochs:
        raise RepruneError("--until must not be after the last epoch.")
    steps = step_rows(args)
    where = steps[0]
    event_s = event_seconds(read(args.events), where, args.model)
    per_epoch = math.ceil(args.images / (where["batch"] * args.gpus))
    shares = args.sparsity or sorted({row["sparsity"] for row in steps if row["net"] == "narrow" and row["sparsity"]})
    if not shares:
        raise missing("narrow", "a narrow variant", args)
    console = terminal.console(150)
    on_cpu = where["device"] == "cpu"
    settings = rows.environment() | {key: where[key] for key in (*HARDWARE, "threads", "commit", "dirty")} | {
        "benchmark": "hours", "computed": True, "measured_on_cpu": on_cpu, "model": args.model, "batch": where["batch"],
        "epochs": args.epochs, "until": args.until, "every": args.every, "regrow": args.regrow, "images": args.images,
        "gpus": args.gpus, "steps_per_epoch": per_epoch, "event_s": event_s,
    }  # fmt: skip
    made = terminal.table(
        f"Computed from measured steps and events: {args.model}, {args.epochs} epochs, {args.gpus} devices "
        f"({where['cpu'] if on_cpu else where['device']}{', a CPU' if on_cpu else ''})",
        ("sparsity", "FLOPs cut", "until the last event", "then", "hours", "events, hours", "dense, hours", "saved",
         "best dense, hours", "saved of it"),
        ("until the last event", "then"),
        f"{per_epoch} steps an epoch of {where['batch']} images a device; an event takes {event_s:.3g} s. "
        "Saved: by the same kernels throughout, against them dense; and by the fastest after the last event, against "
        "the best dense ones. Data loading, validation, compiling "
        "and traffic between devices are left out, which favours whatever computes fastest. " + paper(),
    )  # fmt: skip

    plain = medians((row for row in steps if row["net"] == "dense" and not row["fused"]), "variant")
    best = min(plain, key=plain.__getitem__, default=None)
    left_out: list[RepruneError] = []
    for share in shares:
        for narrow in sorted({row["variant"] for row in steps if row["net"] == "narrow"}):
            try:
                line = whole(steps, narrow, share, event_s, per_epoch, args)
            except RepruneError as error:  # the others go on
                left_out.append(error)
                continue
            if best is not None:
                line |= {"best_dense": best, "best_dense_hours": plain[best] * per_epoch * args.epochs / 3.6e6}
                line["saved_of_best"] = 1 - line["hours"] / line["best_dense_hours"]
            left = line["flops_left"]
            cells = [f"{line['hours']:.2f}", f"{line['events_hours']:.3f}", f"{line['dense_hours']:.2f}"]
            cells.append(f"{line['saved']:.1%}")
            if best is not None:
                cells += [f"{line['best_dense_hours']:.2f}", f"{line['saved_of_best']:.1%}"]
            cut = "" if left is None else f"{1 - left:.1%}"
            made.add_row(f"{share:g}", cut, narrow, line["final"], *cells)
            rows.append(args.json, settings | line)
    if left_out and not made.rows:
        raise left_out[0]
    console.print(made)
    for why in left_out:
        console.print(f"Left out: {why}", markup=False)


def paper() -> str:
    """Say what the paper saved."""
    cut = ", ".join(f"{1 - hours / PAPER[0.0]:.1%} at -{share:.0%}" for share, hours in PAPER.items() if share)
    return f"The paper's training of ResNet-50 on 8 A6000 saved {cut} FLOPs, against eager."


def whole(
    steps: Sequence[Row], narrow: str, share: float, event_s: float, per_epoch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Return the hours of one schedule."""
    backend = narrow.removeprefix("narrow")
    until_last = curve(steps, narrow, f"dense{backend}", args)
    final = medians((row for row in steps if row["net"] == "compact" and row["sparsity"] == share), "variant")
    final = final or {narrow: until_last(share)}
    chosen, alike = min(final, key=final.__getitem__), final.get(f"compact{backend}", until_last(share))
    phases = schedule(args.epochs, args.until, args.every, share, args.regrow)
    events = sum(phase.event for phase in phases)

    def seconds(last: float) -> float:
        """Return those of the whole run, if a step after the last event takes `last` ms."""
        steps_s = ((last if phase.final else until_last(phase.sparsity)) / 1e3 for phase in phases)
        return sum(p.epochs * per_epoch * s for p, s in zip(phases, steps_s, strict=True)) + events * event_s

    dense = until_last(0.0) * per_epoch * args.epochs / 1e3
    left = next((row["flops_left"] for row in steps if row["net"] != "dense" and row["sparsity"] == share), None)
    return {
        "narrow": narrow, "final": chosen, "sparsity": share, "flops_left": left,
        "hours": seconds(final[chosen]) / 3600, "hours_alike": seconds(alike) / 3600,
        "events": events, "events_hours": events * event_s / 3600, "dense_hours": dense / 3600,
        "saved": 1 - seconds(alike) / dense, "paper_hours": {str(cut): hours for cut, hours in PAPER.items()},
    }  # fmt: skip


def schedule(epochs: int, until: int, every: int, sparsity: float, regrow: float) -> list[Phase]:
    """Return the phases of a training: dense first, then from event to event, and the rest after the last one."""
    due = [t for t in range(1, until + 1) if t % every == 0 or t == until]
    found = [Phase(due[0], 0.0, False, False)]
    for t, following in zip(due, [*due[1:], epochs], strict=True):
        active = max(0.0, sparsity - regrow_share(t, until, regrow))
        found.append(Phase(following - t, active, t == until, True))
    return found


def curve(steps: Sequence[Row], narrow: str, dense: str, args: argparse.Namespace) -> Callable[[float], float]:
    """Return a step's milliseconds as a function of sparsity: between measured ones a straight line, never beyond them.

    At 0 a training is dense. If narrow was measured there too, that is where its line begins.
    """

    whole, own = (medians((row for row in steps if row["variant"] == name), "sparsity") for name in (dense, narrow))
    if 0.0 not in whole:
        raise missing(dense, f"{dense}, beside {narrow}", args)
    points = sorted((whole | own).items())

    def at(share: float) -> float:
        if share == 0:
            return whole[0.0]
        for (low, before), (high, after) in zip(points, points[1:], strict=False):
            if low <= share <= high:
                return before + (after - before) * (share - low) / (high - low)
        raise missing(narrow, f"{narrow} at a sparsity of {share:g} or more", args)

    return at


def medians(some: Iterable[Row], key: str) -> dict[Any, float]:
    """Return the median milliseconds of a step by this field of the rows."""
    spent: dict[Any, list[float]] = {}
    for row in some:
        spent.setdefault(row[key], []).append(row["ms"])
    return {value: statistics.median(ms) for value, ms in spent.items()}


def step_rows(args: argparse.Namespace) -> list[Row]:
    """Return the measured steps of this model, on one kind of hardware and at one batch size."""
    found = [
        row for row in read(args.files)
        if (row.get("benchmark"), row.get("row"), row.get("result")) == ("step", "step", "measured")
        and row["model"] == args.model and args.batch in (None, row["batch"])
    ]  # fmt: skip
    if not found:
        raise missing("", f"{args.model}{f' at batch {args.batch}' if args.batch else ''}", args)
    for key, advice in ((*((k, "measure all on one machine") for k in HARDWARE), ("batch", "choose one with --batch"),
                         ("size", "measure one"), ("dtype", "measure one"))):  # fmt: skip
        refuse_mix(found, key, advice)
    if found[0]["device"] == "cpu":
        refuse_mix(found, "threads", "measure one")
    return found


def refuse_mix(found: Iterable[Row], key: str, advice: str) -> None:
    values = sorted({str(row.get(key)) for row in found})
    if len(values) > 1:
        raise RepruneError(f"the rows differ in {key}: {', '.join(values)}. They cannot be added up; {advice}.")


def event_seconds(found: Sequence[Row], where: Row, model: str) -> float:
    """Return the seconds of the latest measured event over the prunable layers, on the same hardware."""
    keys = ["device"] if where["device"] != "cpu" else ["device", "cpu"]
    fitting = [
        row for row in found
        if row.get("benchmark") == "event" and row["row"] == "total" and row["model"] == model and "event_s" in row
        and row["rule"] == "prunable" and row["linkage"] == "ward" and all(row[k] == where[k] for k in keys)
    ]  # fmt: skip
    if not fitting:
        raise RepruneError(
            f"no event of {model} was measured on {', '.join(str(where[key]) for key in keys)}: run python -m "
            f"reprune_triton.bench event --model {model} --device {'cpu' if where['device'] == 'cpu' else 'cuda'} "
            "--json FILE there, and name the file in --events."
        )
    return float(max(fitting, key=lambda row: row["time"])["event_s"])


def missing(variant: str, what: str, args: argparse.Namespace) -> RepruneError:
    wanted = f" --variants {variant}" if variant else ""
    return RepruneError(
        f"no measured step of {what} in {', '.join(args.files)}: run python -m reprune_triton.bench step "
        f"--model {args.model}{wanted} --sparsity ... --json FILE"
    )


def read(files: Iterable[str]) -> list[Row]:
    found = []
    for name in files:
        try:
            found += [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, json.JSONDecodeError) as error:
            raise RepruneError(f"{name} cannot be read: {error}") from error
    return found
