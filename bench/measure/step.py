"""Time one training step, dense and narrow: forward, cross entropy, backward, SGD with momentum, on images made up.

What the variants are, and how each is checked before it is timed, says `variants.py`. Those of one backend take turns,
those at sparsity 0 beside every other sparsity; one backend after the other. Rows are on disk after every turn.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from reprune_triton.bench import rows, terminal
from reprune_triton.bench.estimate import roofline
from reprune_triton.bench.measure import device as devices
from reprune_triton.bench.measure.variants import (
    COMPILED,
    Runner,
    Task,
    Wanted,
    Wrong,
    active_at,
    make_task,
    parse,
    reason,
    wanted_forward,
    wanted_step,
)
from reprune_triton.errors import RepruneError
from reprune_triton.running import compact
from reprune_triton.running.channels import Channels
from reprune_triton.training import models

TWO_BY_TWO = ("dense", "dense-fused", "narrow", "narrow-fused")
DEFAULTS = {
    "cpu": (*TWO_BY_TWO, "compact"),
    "cuda": (
        *TWO_BY_TWO, "compact", "compact-fused", *(f"{name}-graph" for name in TWO_BY_TWO), "compact-graph",
        "compact-fused-graph", "dense-compile", "compact-compile", "dense-max-autotune", "compact-max-autotune",
    ),
}  # fmt: skip
FORWARD = (1, 16, 32)  # images of a forward
COMPILING = 20  # seconds that must be left for a variant to be compiled
AGAIN = 2  # steps before each further run that are not timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    terminal.add_options(parser, "model batch size device seed")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    widths = parser.add_mutually_exclusive_group()
    about = f"{terminal.OPTIONS['sparsity']['help']}; 0: beside the others also narrow with all of them"
    widths.add_argument("--sparsity", **terminal.OPTIONS["sparsity"] | {"help": about})
    widths.add_argument("--flops", type=float, nargs="+", help="instead: share of the dense network's FLOPs to keep")
    parser.add_argument("--round-to", type=int, help="widths are a multiple of this (default: 16 on CUDA, else 1)")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help=f"on CUDA, by default: {' '.join(DEFAULTS['cuda'])}"
    )
    parser.add_argument("--warmup", type=int, default=30, help="steps that are not timed (default: 30)")
    parser.add_argument("--steps", type=int, default=100, help="of a run (default: 100)")
    parser.add_argument("--runs", type=int, default=5, help="in each of them every variant has its turn (default: 5)")
    parser.add_argument("--forward", action="store_true", help="also the forward alone, of 1, 16 and 32 images")
    parser.add_argument("--seconds", type=float, help="for all; what no longer fits is skipped")


def run(args: argparse.Namespace) -> None:
    device = devices.use(args.device)
    cuda = device.type == "cuda"
    args.round_to = args.round_to or (16 if cuda else 1)
    args.size = args.size or models.image_size(args.model)
    terminal.check_at_least_one(args, "batch size round-to steps runs threads")
    variants = [parse(name) for name in args.variants or DEFAULTS["cuda" if cuda else "cpu"]]
    if args.threads:
        torch.set_num_threads(args.threads)
    if cuda:
        torch.backends.cudnn.benchmark = True
    if {variant.backend for variant in variants} & {*COMPILED}:
        from torch._dynamo import config

        # All variants share the code of one class, and narrow ones differ from the rest in their hooks alone.
        config.recompile_limit, config.skip_nnmodule_hook_guards = 64, False
    deadline = time.monotonic() + (args.seconds or math.inf)
    console = terminal.console(150)

    task = make_task(args, device)
    shares = args.sparsity if args.flops is None else [at_flops(task.channels, f, args.round_to) for f in args.flops]
    shares = list(dict.fromkeys(shares))
    actives = {share: active_at(task.channels, share, args) for share in (0.0, *shares)}
    ceilings = roofline.measure(device)
    settings = rows.environment(device) | {
        "benchmark": "step", "model": args.model, "batch": args.batch, "size": args.size, "seed": args.seed,
        "dtype": str(task.amp or torch.float32).removeprefix("torch."), "channels_last": cuda,
        "round_to": args.round_to, "warmup": args.warmup, "steps": args.steps, "seconds": args.seconds,
        "torchvision": rows.version("torchvision"), "ceilings": ceilings._asdict(),
    }  # fmt: skip

    def build(share: float, backend: str) -> list[Runner]:
        """Build a group before any of it is compiled: making a model narrow forgets what was."""
        nets = ("narrow", "compact") if share else ("dense", "narrow") if 0.0 in shares else ("dense",)
        return [Runner(task, v, share, actives[share]) for v in variants if v.backend == backend and v.net in nets]

    stays, wanted, least = build(0.0, "eager"), dict[float, Wanted](), Least(task, ceilings)

    def measure(share: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Measure steps and forwards of all variants at this sparsity, with rows on disk: a run may be stopped."""
        draft, steps, forwards = rows.Draft(args.json), list[dict[str, Any]](), list[dict[str, Any]]()

        def note(lines: list[dict[str, Any]]) -> None:
            draft.write([settings | line for line in (*with_best(steps + lines), *forwards)])

        for backend in dict.fromkeys(variant.backend for variant in variants):
            whole = stays if backend == "eager" else build(0.0, backend)
            runners = [*whole, *(build(share, backend) if share else ())]
            group = Group(task, args, share, runners, wanted, deadline, least, note)
            group.measure()
            steps += group.lines()
            for batch in FORWARD if args.forward else ():
                forwards += group.forward(batch)
                note([])
            note([])
            group.close()
        return with_best(steps), forwards

    refused: list[str] = []
    for share in [share for share in shares if share > 0] or [0.0]:
        lines, forwards = measure(share)
        on = f"{settings['device']}, sparsity {share:g}"
        console.print(step_table(lines, f"A step of {args.model}, {args.batch} images, {on}"))
        if args.forward:
            console.print(forward_table(forwards, f"A forward of {args.model}, {on}"))
        lines += forwards
        for note in dict.fromkeys(f"{label(x)}, {x['result']}: {x['why']}" for x in lines if x["why"]):
            console.print(note, markup=False)
        refused += [f"{label(line)}: {line['why']}" for line in lines if line["result"] == "refused"]
    if refused:
        raise RepruneError("; ".join(dict.fromkeys(refused)))


def with_best(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with the ratio to the best dense one, of whatever backend."""
    plain = [line["ms"] for line in lines if line["net"] == "dense" and not line["fused"] and "ms" in line]
    return [line | {"ratio_best": min(plain) / line["ms"] if plain else None} if "ms" in line else line
            for line in lines]  # fmt: skip


def at_flops(channels: Channels, flops: float, round_to: int) -> float:
    """Return the least sparsity at which no more than this share of the FLOPs is left, to 1e-4."""
    if not 0 < flops <= 1:
        raise RepruneError(f"--flops must be in (0, 1], the share to keep; got {flops}")

    def left(share: int) -> float:
        return channels.flops(roofline.widths_at(channels, share / 10000, round_to))

    low, high = -1, 9999
    if left(high) > flops:
        raise RepruneError(f"--flops {flops} is out of reach: {left(high):.3f} is left with the fewest channels.")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if left(middle) <= flops else (middle, high)
    return high / 10000


class Least:
    """The least time that a step can take, in ms; see `estimate.roofline`."""

    def __init__(self, task: Task, ceilings: roofline.Ceilings):
        self._task, self._ceilings = task, ceilings
        self._known: dict[tuple[float, str], float] = {}

    def __call__(self, runner: Runner) -> float:
        key = runner.share, runner.level
        if key not in self._known:
            task, size = self._task, 4 if self._task.amp is None else 2
            model = compact.compact(task.dense, runner.slices)
            kernels = roofline.kernels(model, tuple(task.images.shape), runner.level, size)
            self._known[key] = roofline.total(kernels, self._ceilings) * 1e3
        return self._known[key]


class Group:
    """The variants that take turns: of one backend, those at sparsity 0 and at one other.

    Not of all backends: a CUDA graph, of max-autotune too, keeps the memory of its activations as long as it exists,
    and all of them with the eager ones may be more than 80 GB for ResNet-50 at batch 256. `close` gives it back before
    the next group begins. One that runs out of memory fails alone: what it held is given back at once, except what
    compiled code keeps until `close`, which cannot be dropped one by one.

    note: is given the rows of this group whenever there is something new in them.
    """

    def __init__(
        self, task: Task, args: argparse.Namespace, share: float, runners: list[Runner], wanted: dict[float, Wanted],
        deadline: float, least: Least, note: Callable[[list[dict[str, Any]]], None],
    ):  # fmt: skip
        self.task, self.args, self.share = task, args, share
        self.runners, self.wanted, self.deadline, self.least, self.note = runners, wanted, deadline, least, note

    def measure(self) -> None:
        for runner in self.runners:
            runner.runs = []  # of another sparsity
        longest = 0.0  # seconds that one of them took until it was ready
        # In the order in which they are asked for, should the time not suffice for all.
        for runner in sorted(self.runners, key=lambda r: 0 if r.share else 1 + (r.variant.net == "narrow")):
            if runner.ready or runner.result in ("refused", "failed"):
                continue
            runner.result, begun = "", time.monotonic()
            needs = COMPILING if runner.variant.backend in COMPILED else longest
            if begun + self.planned() + needs > self.deadline:
                runner.result, runner.why = "skipped", "no time left"
                continue
            runner.attempt(lambda r=runner: self._prepare(r))  # type: ignore[misc]
            longest = max(longest, time.monotonic() - begun)
            self.note(self.lines())
        for number in range(self.args.runs):
            if number and time.monotonic() + self.planned() > self.deadline:
                break  # who is ready has one run
            for runner in self.runners:
                if runner.ready:
                    runner.attempt(lambda r=runner, n=number: self._turn(r, n))  # type: ignore[misc]
                    self.note(self.lines())
        for runner in self.runners:
            if runner.ready and not runner.runs:
                runner.result, runner.why = "skipped", "no time left"
            elif runner.ready and runner.variant.backend == "eager" and time.monotonic() < self.deadline:
                runner.attempt(lambda r=runner: r.take_apart(self.args.steps))  # type: ignore[misc]

    def _prepare(self, runner: Runner) -> None:
        if runner.share not in self.wanted:
            self.wanted[runner.share] = wanted_step(self.task, runner.active)
        devices.give_back(self.task.images.device)  # a graph has no use for what the allocator still holds for others
        runner.prepare(self.wanted[runner.share], self.args.warmup)
        self.least(runner)  # now, not between two turns

    def close(self) -> None:
        """Give back the memory of all that have no turn in a later group."""
        for runner in self.runners:
            if runner.share or runner.variant.backend != "eager":
                runner.release()
        if any(runner.variant.backend in COMPILED for runner in self.runners):
            torch.compiler.reset()  # its code holds the graphs of max-autotune
            devices.give_back(self.task.images.device)

    def _turn(self, runner: Runner, number: int) -> None:
        runner.result = ""
        if number:
            runner.time(AGAIN)
        runner.runs.append(statistics.median(runner.time(self.args.steps)))

    def planned(self) -> float:
        """Return the seconds of one run."""
        return sum(r.figures["estimate_ms"] * self.args.steps for r in self.runners if r.ready) / 1e3

    def lines(self) -> list[dict[str, Any]]:
        """Return a row for every variant, as far as it is known."""
        measured = {(runner.variant, runner.share): runner for runner in self.runners if runner.runs}
        found = []
        for runner in self.runners:
            variant = runner.variant
            widths = {name: len(index) for name, index in runner.active.items()}
            line: dict[str, Any] = {
                "row": "step", "variant": str(variant), **variant._asdict(), "sparsity": runner.share,
                "beside": self.share, "flops_left": self.task.channels.flops(widths),
                "result": "measured" if runner.runs else runner.result or "unfinished", "why": runner.why,
            }  # fmt: skip
            line |= {key: value for key, value in runner.figures.items() if key != "estimate_ms"}
            if runner.runs:
                least = self.least(runner)
                same = measured.get((variant._replace(net="dense"), 0.0))
                whole = measured.get((variant, 0.0)) if variant.net == "narrow" else None
                line |= {
                    "ms": runner.ms, "runs_ms": runner.runs, "runs": len(runner.runs),
                    "spread": (max(runner.runs) - min(runner.runs)) / runner.ms,
                    "images_per_s": len(self.task.images) / runner.ms * 1e3,
                    "ratio_dense": same.ms / runner.ms if same else None,
                    "ratio_whole": whole.ms / runner.ms if whole else None,
                    "roofline": runner.level, "roofline_ms": least, "share": least / runner.ms,
                    "parts_ms": runner.parts,
                }  # fmt: skip
            found.append(line)
        return found

    def forward(self, batch: int) -> list[dict[str, Any]]:
        """Return rows of the forward alone, in evaluation, of so many images."""
        images = self.task.images[torch.arange(batch) % len(self.task.images)]
        if images.is_cuda:
            images = images.contiguous(memory_format=torch.channels_last)
        calls: dict[Runner, Callable[[], Tensor]] = {}
        lines: dict[Runner, dict[str, Any]] = {}
        for runner in self.runners:
            lines[runner] = line = {
                "row": "forward", "variant": str(runner.variant), **runner.variant._asdict(), "images": batch,
                "sparsity": runner.share, "beside": self.share, "result": runner.result, "why": runner.why,
            }  # fmt: skip
            if not runner.ready:
                continue
            line |= {"result": "skipped", "why": "no time left"}
            if time.monotonic() > self.deadline:
                continue
            try:
                calls[runner] = self._forward_of(runner, images, line)
                line |= {"result": "measured", "why": ""}
            except Wrong as error:
                line |= {"result": "refused", "why": str(error)}
            except Exception as error:  # the others go on
                line |= {"result": "failed", "why": reason(error)}
        spent: dict[Runner, list[tuple[float, float]]] = {runner: [] for runner in calls}
        for _ in range(self.args.runs):
            for runner, call in calls.items():
                both = (devices.time_each(call, self.args.steps, images.device, wait) for wait in (True, False))
                spent[runner].append(tuple(map(statistics.median, both)))  # type: ignore[arg-type]
        for runner, pairs in spent.items():
            latency, ms = (statistics.median(some) for some in zip(*pairs, strict=True))
            lines[runner] |= {"latency_ms": latency, "ms": ms, "images_per_s": batch / ms * 1e3}
        for runner in self.runners:
            if runner.ready:
                runner.model.train()
        return list(lines.values())

    def _forward_of(self, runner: Runner, images: Tensor, line: dict[str, Any]) -> Callable[[], Tensor]:
        """Return the forward of this variant, checked and warm."""
        runner.begin(self.task.dense)  # after some training they would no longer be equal to the last bit
        runner.model.eval()
        call = runner.forward_of(images)
        line |= wanted_forward(self.task, runner.active, images).check(call())
        devices.time_each(call, self.args.warmup, images.device)
        return call


def step_table(lines: list[dict[str, Any]], title: str) -> Table:
    columns = ("", "FLOPs left", "ms", "spread", "images / s", "to dense", "to narrow at 0", "to best dense", "peak MB",
               "of the roofline", "difference", "in float64")  # fmt: skip
    caption = "Spread: from the fastest run to the slowest; ratios mean no more. To dense: of the same backend. The "
    caption += "best dense may be of another one, and have had its turns at another time."
    made = terminal.table(title, columns, ("",), caption)
    made.columns[0].no_wrap = True
    for line in lines:
        if line["result"] != "measured":
            made.add_row(label(line), "", line["result"])
            continue
        made.add_row(
            label(line), cell(line["flops_left"], ".3f"), cell(line["ms"], ".3f"),
            cell(line["spread"], ".0%"), cell(line["images_per_s"], ".0f"), cell(line["ratio_dense"], ".2f", "x"),
            cell(line["ratio_whole"], ".2f", "x"), cell(line["ratio_best"], ".2f", "x"),
            cell(line.get("peak_mb"), ".0f"),
            cell(line["share"], ".0%"), cell(line["difference"], ".1e"),
            cell(line.get("difference_float64"), ".1e"),
        )  # fmt: skip
    return made


def forward_table(lines: list[dict[str, Any]], title: str) -> Table:
    columns = ("images", "", "latency, ms", "images / s", "difference")
    made = terminal.table(title, columns, ("",), "Latency: of one alone. Images a second: one after the other.")
    for line in lines:
        if line["result"] != "measured":
            made.add_row(str(line["images"]), label(line), line["result"])
            continue
        made.add_row(
            str(line["images"]), label(line), cell(line["latency_ms"], ".3f"), cell(line["images_per_s"], ".0f"),
            cell(line["difference"], ".1e"),
        )  # fmt: skip
    return made


def label(line: dict[str, Any]) -> str:
    return line["variant"] + " at 0" * (line["net"] == "narrow" and not line["sparsity"])


def cell(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit
