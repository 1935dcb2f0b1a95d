"""Train a classifier, dense or pruned by REPrune on the way; read it top to bottom.

    python -m reprune_triton.train --data digits --model resnet20 --sparsity 0.5 --out runs/digits

DIR/log.jsonl gets one line per epoch, DIR/last.safetensors the state after it, DIR/slim.safetensors the final,
physically narrow model. Ctrl-C or SIGTERM stops cleanly; --resume goes on, and ends where an uninterrupted run would
have: bit for bit on the CPU, and on a GPU as far as its own kernels are deterministic.
"""

import argparse
import json
import math
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn import functional as F

from reprune_triton import capture, ops
from reprune_triton.errors import RepruneError
from reprune_triton.fused.fusion import fuse
from reprune_triton.pruner import Config, REPrune
from reprune_triton.running import compact
from reprune_triton.running.channels import analyse
from reprune_triton.selection.widths import round_up
from reprune_triton.training import checkpoint, models
from reprune_triton.training.data import Data
from reprune_triton.training.data import load as load_data

PARADIGMS = ("concurrent", "three-stage", "scratch")
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Two runs that differ in these alone are the same run.
FREE = ("data_dir", "workers", "threads", "device", "graph", "out", "resume")
Record = dict[str, Any]  # one line of the log


@dataclass(frozen=True)
class Options:
    """One run; `recipe` fills in what fits a data set. Epochs count from 1, as in the log and the pruner's events.

    With a sparsity or a share of FLOPs, `paradigm` says when channels go: "concurrent" prunes while it trains (the
    paper). The other two are what it is compared with, and know no every, until and regrow. "three-stage" trains dense
    for `epochs`, prunes once, and goes on for as many with the learning rate from the start of its schedule (rewinding;
    Renda et al., ICLR 2020): 2 `epochs` in all. "scratch" trains a network whose prunable convs are equally narrow
    from the start.
    """

    model: str = "resnet20"
    data: str = "digits"
    data_dir: str | None = None
    size: int = 224  # of the crop; imagenet only
    epochs: int = 40
    batch: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_norms: bool = True  # weight decay on BatchNorm and biases too
    warmup: int = 0  # epochs of linear growth of the learning rate
    smoothing: float = 0.0
    mixup: float = 0.0  # alpha; 0 is off
    seed: int = 0
    sparsity: float | None = None
    flops: float | None = None
    paradigm: str = "concurrent"
    every: int = 2
    until: int | None = None
    regrow: float = 0.3
    regrow_by: str = "residual"
    linkage: str = "ward"
    select: str = "coverage"
    tie: str = "random"
    prune_seed: int | None = None  # of the pruner's random choices alone; default: seed
    round_to: int | None = None
    ignore: tuple[str, ...] = ()
    device: str | None = None  # default: cuda where there is one
    amp: str = "off"
    channels_last: bool = False
    fuse: bool = False  # BatchNorm, addition and activation in one operation
    # Replay each step from a CUDA graph, captured anew after every event; default: on CUDA, but with fp16.
    graph: bool | None = None
    workers: int = 4
    threads: int | None = None
    out: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if self.amp not in AMP:
            raise RepruneError(f"amp must be one of {', '.join(AMP)}; got {self.amp!r}")
        if self.paradigm not in PARADIGMS:
            raise RepruneError(f"paradigm must be one of {', '.join(PARADIGMS)}; got {self.paradigm!r}")
        if self.epochs < 1 or not 0 <= self.warmup <= self.epochs:
            raise RepruneError(f"epochs must be at least 1 and warmup within it; got {self.epochs} and {self.warmup}")
        for name, end in (("seed", 2**32), ("prune_seed", 2**32), ("smoothing", 1), ("mixup", 100)):
            if not 0 <= (getattr(self, name) or 0) < end:
                raise RepruneError(f"{name} must be in [0, {end}); got {getattr(self, name)}")
        if self.sparsity is not None and self.flops is not None:
            raise RepruneError("give sparsity or flops, not both; with neither the model stays dense")
        if self.paradigm != "concurrent" and self.sparsity is None and self.flops is None:
            raise RepruneError(f"paradigm {self.paradigm} needs sparsity or flops: how narrow the network is to be")
        if self.graph and self.amp == "fp16":
            raise RepruneError("graph does not go with fp16, whose loss scale the host decides: use bf16")
        if not self.lr >= 0:
            raise RepruneError(f"lr must not be negative; got {self.lr}")
        if self.resume and self.out is None:
            raise RepruneError("resume needs out, the folder of the run to go on with")
        self.config()

    def config(self) -> Config:
        """What the pruner is to do.

        Raises:
            RepruneError: if an option of it is out of its range, whether there is a pruner or not.
        """
        every, until = self.every, self.until or max(1, round(0.72 * self.epochs))
        if self.paradigm == "three-stage":
            every = until = self.epochs  # one event, and at the last one nothing comes back
        dense = self.sparsity is None and self.flops is None
        return Config(
            sparsity=0.0 if dense else self.sparsity, flops=self.flops, every=every, until=until, regrow=self.regrow,
            regrow_by=self.regrow_by, linkage=self.linkage, select=self.select, tie=self.tie, round_to=self.round_to,
            ignore=self.ignore, seed=self.seed if self.prune_seed is None else self.prune_seed, compact="auto",
        )  # fmt: skip

    @property
    def stages(self) -> int:
        """How often the schedule of `epochs` is run."""
        return 2 if self.paradigm == "three-stage" else 1


# SPEC's recipes, for one device. `prune_share` is T_prune / epochs.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 40, "batch": 64, "lr": 0.1, "warmup": 2, "prune_share": 0.72},
    "cifar": {"epochs": 160, "batch": 256, "lr": 0.1, "prune_share": 0.6},
    "imagenet": {
        "epochs": 250, "batch": 256, "momentum": 0.875, "weight_decay": 1 / 32768, "decay_norms": False, "warmup": 8,
        "smoothing": 0.1, "mixup": 0.2, "amp": "bf16", "channels_last": True, "prune_share": 0.72,
    },
}  # fmt: skip
RECIPE_OF = {"digits": "digits", "fashion-mnist": "cifar", "cifar10": "cifar", "imagenet": "imagenet"}


def recipe(data: str = "digits", name: str | None = None, **changes: Any) -> Options:
    """The options of recipe `name` (default: the one that fits `data`), with `changes` on top."""
    if data not in RECIPE_OF:
        raise RepruneError(f"unknown data set {data!r}: there are {', '.join(RECIPE_OF)}")
    if name is not None and name not in RECIPES:
        raise RepruneError(f"no recipe {name!r}: there are {', '.join(RECIPES)}")
    values = {**RECIPES[name or RECIPE_OF[data]], "data": data, **changes}
    share = values.pop("prune_share")
    if "warmup" not in changes:  # a short trial run is not all warm-up
        values["warmup"] = min(values.get("warmup", 0), values["epochs"] // 4)
    values.setdefault("lr", 0.256 * values["batch"] / 256)  # imagenet: linear scaling
    if values.get("until") is None:
        values["until"] = max(1, round(share * values["epochs"]))
    return Options(**values)


@dataclass(frozen=True)
class Result:
    model: nn.Module  # physically narrow if it was pruned
    accuracy: float  # of that model on the test set, in [0, 1]
    flops: float  # share of the dense network's multiply-adds that it has
    seconds: float  # of training: neither pruning events nor evaluation
    event_seconds: float
    pruner: REPrune | None
    log: list[Record]


class Stopped(SystemExit):
    """SIGTERM or SIGINT came; `code` is 128 + its number. The checkpoint of the last whole epoch is on the disk."""


def train(options: Options, on_epoch: Callable[[Record], None] | None = None, quiet: bool = False) -> Result:
    """Train as `options` say; `on_epoch` gets each line of the log once its checkpoint is written. quiet: without a
    progress bar."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.threads:
        torch.set_num_threads(options.threads)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RepruneError("there is no CUDA device here: give --device cpu")
    graph = _graph(options, device)
    torch.manual_seed(options.seed)
    data = load_data(
        options.data, options.data_dir, batch=options.batch, seed=options.seed, device=str(device),
        workers=options.workers, size=options.size,
    )  # fmt: skip
    model = models.build(options.model, data.classes, data.channels).to(device)
    example = models.example_inputs(options.model, data.channels, data.size).to(device)
    model, flops = thin(model, example, options) if options.paradigm == "scratch" else (model, 1.0)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if options.fuse:
        model = fuse(model)
    fused = graph or None  # only fused SGD reads the learning rate from a tensor
    optimizer = torch.optim.SGD(_groups(model, options), options.lr, options.momentum, fused=fused)
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
    pruner = _pruner(model, optimizer, example, options)
    run = _Run(options, model, optimizer, scaler, pruner, device)
    first, log = run.start()
    step = _Step(model, optimizer, scaler, options, device, graph)
    epochs = options.epochs * options.stages

    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), disable=quiet or not sys.stderr.isatty(),
    )  # fmt: skip
    with _Signals() as signals, progress:
        bar = progress.add_task(options.model, total=epochs * data.steps, completed=first * data.steps)

        def after_batch() -> None:
            progress.advance(bar)
            signals.check()

        for epoch in range(first, epochs):
            started = time.perf_counter()
            model.train()
            loss = _train_epoch(step, data, options, epoch, after_batch)  # waits for the device
            trained = time.perf_counter()
            if not math.isfinite(loss):
                raise RepruneError(f"the training loss is {loss} in epoch {epoch + 1}: lower --lr, or warm up longer")
            event = pruner.step() if pruner else None
            if event:
                step.forget()
            _wait(device)
            pruned = time.perf_counter()
            record: Record = {
                "epoch": epoch + 1,
                "lr": float(optimizer.param_groups[0]["lr"]),
                "loss": loss,
                "accuracy": evaluate(model, data, options.amp, signals.check),
                "seconds": trained - started,
                "event_seconds": pruned - trained if event else 0.0,
                "images_per_second": data.steps * data.batch / (trained - started),
            }
            if event:
                record |= {"sparsity": event.sparsity, "flops": event.flops, "coverage": event.coverage}
            log.append(record)
            run.save(epoch + 1, log)
            progress.update(bar, description=f"{options.model}  {record['accuracy']:.2%}")
            if on_epoch:
                on_epoch(record)
            signals.check()

        slim = pruner.finalize() if pruner else model
        accuracy = evaluate(slim, data, options.amp, signals.check)
        if pruner and pruner.history:
            flops = pruner.history[-1].flops
    if options.out:
        about = {
            "model": options.model, "data": options.data, "num_classes": data.classes, "in_channels": data.channels,
            "size": data.size, "mean": data.mean.flatten().tolist(), "std": data.std.flatten().tolist(),
            "accuracy": accuracy, "flops": flops,
        }  # fmt: skip
        checkpoint.save(slim, Path(options.out) / "slim.safetensors", extra=about)
    seconds, event_seconds = (sum(line[key] for line in log) for key in ("seconds", "event_seconds"))
    return Result(slim, accuracy, flops, seconds, event_seconds, pruner, log)


def _train_epoch(
    step: "_Step", data: Data, options: Options, epoch: int, after_batch: Callable[[], None]
) -> float:  # fmt: skip
    """One pass over the training data; the mean loss."""
    total = torch.zeros((), device=data.mean.device)  # stays on the device: asking for a number would wait for it
    for i, (x, y) in enumerate(data.train_batches(epoch)):  # x (B, C, H, W), y (B,)
        number, share = epoch * data.steps + i, 1.0
        if options.mixup:
            share = float(np.random.default_rng([options.seed, number]).beta(options.mixup, options.mixup))
        total += step(x, y, share, learning_rate(number, data.steps, options))
        after_batch()
    return total.item() / data.steps


class _Step:
    """One step of the optimizer on one batch. With `graph` it is replayed, from the second one on after a change of the
    network; what changes from step to step is then in tensors that keep their place."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, options: Options,
        device: torch.device, graph: bool,
    ):  # fmt: skip
        self.model, self.optimizer, self.scaler, self.options = model, optimizer, scaler, options
        self.graph = graph
        self._lr, self._share = (torch.zeros((), device=device) for _ in range(2))
        self._batch: tuple[torch.Tensor, torch.Tensor] | None = None
        self.forget()

    def forget(self) -> None:
        """The network has changed: what was captured is of the old one."""
        self._replay: Callable[[], torch.Tensor] | None = None
        self._warm = False

    def __call__(self, x: torch.Tensor, y: torch.Tensor, share: float, lr: float) -> torch.Tensor:
        """The loss, from before the update. share: of x, where the rest is of the batch in reverse (mixup)."""
        if not self.graph:
            for group in self.optimizer.param_groups:
                group |= {"lr": lr}
            return self._work(x, y, share)
        self._lr.fill_(lr)
        self._share.fill_(share)
        for group in self.optimizer.param_groups:  # a checkpoint may have brought others
            group |= {"lr": self._lr, "fused": True, "foreach": False}
        if self._batch is None:
            self._batch = x.clone(), y.clone()
        for own, given in zip(self._batch, (x, y), strict=True):
            own.copy_(given)
        batch = self._batch

        def work() -> torch.Tensor:
            return self._work(*batch, self._share)

        if not self._warm:
            self._warm = True
            return capture.warm_up(work)
        if self._replay is None:
            try:
                self._replay = capture.capture(work)
            except Exception as error:  # nothing has been computed: the step is still to be done
                self._go_on_without(error)
                return self(x, y, share, lr)
        return self._replay()

    def _go_on_without(self, error: Exception) -> None:
        """Capture no more.

        Raises:
            RepruneError: if it was asked for.
        """
        message = f"a step of {self.options.model} cannot be captured in a CUDA graph ({error})"
        if self.options.graph:
            raise RepruneError(f"{message}: give --no-graph") from error
        warnings.warn(f"{message}: the run goes on without one, as with --no-graph", stacklevel=2)
        self.graph = False
        self.optimizer.zero_grad()  # gradients that no replay will fill

    def _work(self, x: torch.Tensor, y: torch.Tensor, share: float | torch.Tensor) -> torch.Tensor:
        options = self.options
        if options.mixup:
            x = share * x + (1 - share) * x.flip(0)  # the batch is in random order already
        if options.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        self.optimizer.zero_grad()
        with torch.autocast(x.device.type, AMP[options.amp], enabled=options.amp != "off"):
            out = self.model(x)  # (B, classes)
            loss = F.cross_entropy(out, y, label_smoothing=options.smoothing)
            if options.mixup:
                other = F.cross_entropy(out, y.flip(0), label_smoothing=options.smoothing)
                loss = share * loss + (1 - share) * other
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()


def _graph(options: Options, device: torch.device) -> bool:
    """Whether steps are to be replayed from a CUDA graph.

    Raises:
        RepruneError: if that is asked for where there is none.
    """
    if options.graph and device.type != "cuda":
        raise RepruneError(f"graph needs a CUDA device; this run is on {device}")
    return device.type == "cuda" and options.amp != "fp16" if options.graph is None else options.graph


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, amp: str = "off", after_batch: Callable[[], None] = lambda: None) -> float:
    """The share of the test set that `model` gets right."""
    training = model.training
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=data.mean.device)
    for x, y in data.test_batches():
        with torch.autocast(x.device.type, AMP[amp], enabled=amp != "off"):
            right += (model(x).argmax(1) == y).sum()
        after_batch()
    model.train(training)
    return right.item() / data.test_size


def learning_rate(step: int, steps: int, options: Options) -> float:
    """Linear from 0 over the warm-up, then a cosine to 0, in every stage; an epoch has `steps` steps."""
    warmup, last = options.warmup * steps, options.epochs * steps
    step %= last
    if step < warmup:
        return options.lr * (step + 1) / warmup
    return options.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (last - warmup)))


def _groups(model: nn.Module, options: Options) -> list[dict[str, Any]]:
    decayed = [p for p in model.parameters() if options.decay_norms or p.dim() > 1]
    bare = [p for p in model.parameters() if not (options.decay_norms or p.dim() > 1)]  # BatchNorm's, and biases
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": bare, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _pruner(
    model: nn.Module, optimizer: torch.optim.Optimizer, example: torch.Tensor, options: Options
) -> REPrune | None:  # fmt: skip
    if options.paradigm == "scratch" or (options.sparsity is None and options.flops is None):
        return None
    return REPrune(model, optimizer, example_inputs=example, **vars(options.config()))


def thin(model: nn.Module, example: torch.Tensor, options: Options) -> tuple[nn.Module, float]:
    """A copy of a fresh model whose prunable convs have all lost the same share of their filters, and its share of
    the FLOPs: as many filters as `options.sparsity` leaves, or as fit into `options.flops`.

    Raises:
        RepruneError: if nothing is prunable, or the budget is out of reach.
    """
    found = analyse(model, example, options.ignore)
    if not found.prunable:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in found.reasons.items())
        raise RepruneError(f"{options.model} has nothing to make narrow:{reasons}")
    device, wanted = next(model.parameters()).device, options.flops
    round_to = options.round_to or (16 if device.type == "cuda" else 1)  # as `REPrune` does
    if options.sparsity is not None:
        shares = [Fraction(str(options.sparsity))]
    else:  # every share at which some layer's width changes, from the widest network on
        shares = sorted({Fraction(gone, x.n_out) for x in found.prunable for gone in range(x.n_out)})
    for share in shares:
        widths = {
            x.name: round_up(ops.keep_count(x.n_out, share), x.n_out, round_to, 1) for x in found.prunable
        }
        flops = found.flops(widths)
        if wanted is None or flops <= wanted:
            active = {name: torch.arange(width, device=device) for name, width in widths.items()}
            return compact.compact(model, found.slices(active)), flops
    raise RepruneError(f"flops={wanted} is out of reach for a {options.model} from scratch: it still has {flops:.3f}")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class _Run:
    """The run's folder: the log, the checkpoint, and everything that goes into it. Without a folder, nothing."""

    options: Options
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    pruner: REPrune | None
    device: torch.device

    @property
    def last(self) -> Path:
        return Path(self.options.out or "") / "last.safetensors"

    def start(self) -> tuple[int, list[Record]]:
        """The number of epochs already done, and their log."""
        if not self.options.out:
            return 0, []
        if self.options.resume:
            return self._resume()
        if self.last.exists() or checkpoint.previous(self.last).exists():
            raise RepruneError(f"{self.last.parent} holds a run already: go on with --resume, or choose another --out")
        self.save(0, [])  # so that a run stopped in its first epoch can be resumed like any other
        return 0, []

    def save(self, done: int, log: list[Record]) -> None:
        if not self.options.out:
            return
        # The log first: a line without its checkpoint is dropped on resume, a lost line could not be made up for.
        self.last.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(line) + "\n" for line in log]
        with open(self._log, "a" if done else "w") as file:
            file.writelines(lines[-1:])
        cuda = self.device.type == "cuda"
        state = {
            "done": done,
            "options": _saved(self.options),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "pruner": self.pruner.state_dict() if self.pruner else None,
            "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(self.device) if cuda else None},
        }
        checkpoint.write(self.last, state)

    def _resume(self) -> tuple[int, list[Record]]:
        state = checkpoint.read(self.last)
        # An option that the checkpoint does not know yet had its default.
        here, there = _saved(self.options), _saved(Options()) | state["options"]
        other = [
            f"--{key.replace('_', '-')} was {there.get(key)}, is {here.get(key)}"
            for key in {**there, **here}
            if here.get(key) != there.get(key)
        ]
        if other:
            raise RepruneError(f"{self.last}: this run was started with other options: {'; '.join(other)}")
        if self.pruner:  # first: after the last event it makes the model narrow
            self.pruner.load_state_dict(state["pruner"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)

        log: list[Record] = []
        for line in self._log.read_text().splitlines() if self._log.exists() else ():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the machine went down in the middle of it
                break
            if record["epoch"] <= state["done"]:
                log.append(record)
        self._log.write_text("".join(json.dumps(line) + "\n" for line in log))
        return state["done"], log

    @property
    def _log(self) -> Path:
        return self.last.with_name("log.jsonl")


def _saved(options: Options) -> dict[str, Any]:
    return {key: value for key, value in asdict(options).items() if key not in FREE}


class _Signals:
    """Turns SIGTERM and SIGINT into `Stopped`, raised by `check` between two batches; a second one acts at once."""

    def __init__(self) -> None:
        self.came: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():  # Python allows it there alone
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def check(self) -> None:
        if self.came is not None:
            raise Stopped(128 + self.came)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m reprune_triton.train", description=(__doc__ or "").split("\n")[0],
        argument_default=argparse.SUPPRESS,  # what is not given comes from the recipe
    )  # fmt: skip
    add = parser.add_argument
    add("--model", help="resnet8, 20, 32, 44, 56 or 110, or a name of torchvision or timm (default resnet20)")
    add("--data", default="digits", help="digits, fashion-mnist, cifar10 or imagenet (default digits)")
    add("--data-dir", help="folder of the data set")
    add("--recipe", choices=RECIPES, help="defaults for all that follows; by itself the one that fits the data")
    add("--epochs", type=int)
    add("--batch", type=int)
    add("--lr", type=float, help="peak learning rate")
    add("--momentum", type=float)
    add("--weight-decay", type=float)
    add("--decay-norms", action=argparse.BooleanOptionalAction, help="weight decay on BatchNorm and biases too")
    add("--warmup", type=int, help="epochs of linear warm-up")
    add("--smoothing", type=float, help="label smoothing")
    add("--mixup", type=float, help="mixup's alpha; 0 is off")
    add("--size", type=int, help="side of the crops, for imagenet (default 224)")
    add("--seed", type=int)
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--sparsity", type=float, help="share of the prunable channels to prune; without it: dense")
    target.add_argument("--flops", type=float, help="instead: share of the FLOPs to keep")
    add("--paradigm", choices=PARADIGMS, help="prune while training (default), after it and go on, or before it")
    add("--every", type=int, help="epochs between pruning events (default 2)")
    add("--until", type=int, help="epoch of the last event (default 72%% of the epochs; cifar: 60%%)")
    add("--regrow", type=float, help="how much denser the network is at the start (default 0.3)")
    add("--regrow-by", help="which filters come back: by residual, coverage or at random (default residual)")
    add("--linkage", help="ward, single, complete or average (default ward)")
    add("--select", help="which filters are kept: coverage, l1, gamma or random (default coverage)")
    add("--tie", help="random, index, norm or gamma (default random)")
    add("--prune-seed", type=int, help="of the pruner's random choices alone (default: --seed)")
    add("--round-to", type=int, help="kept channels are a multiple of this (default 16 on CUDA, else 1)")
    add("--ignore", nargs="+", help="convs to leave alone, by name or pattern")
    add("--device", help="default: cuda where there is one")
    add("--amp", choices=AMP, help="mixed precision")
    add("--channels-last", action=argparse.BooleanOptionalAction)
    add("--fuse", action=argparse.BooleanOptionalAction, help="BatchNorm, addition and activation in one operation")
    add("--graph", action=argparse.BooleanOptionalAction,
        help="replay each step from a CUDA graph (default: on CUDA, but with fp16)")  # fmt: skip
    add("--workers", type=int, help="processes that decode images, for imagenet (default 4)")
    add("--threads", type=int, help="CPU threads")
    add("--out", help="folder of the run (default runs/DATA-MODEL)")
    add("--resume", action="store_true", help="go on with the run in --out")
    given = vars(parser.parse_args(argv))
    if "ignore" in given:
        given["ignore"] = tuple(given["ignore"])
    given.setdefault("out", f"runs/{given['data']}-{given.get('model', Options.model).replace(':', '-')}")
    try:
        options = recipe(given.pop("data"), given.pop("recipe", None), **given)
        result = train(options)
    except RepruneError as error:
        parser.exit(2, f"error: {error}\n")
    except Stopped:
        words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
        command = shlex.join(["python", "-m", "reprune_triton.train", *words, "--resume"])
        print(f"stopped; {given['out']} holds every whole epoch. To go on: {command}", file=sys.stderr)
        raise
    line = f"{options.model} on {options.data}: accuracy {result.accuracy:.2%}"
    if result.flops < 1:
        line += f" at {result.flops:.1%} of the FLOPs"
    if result.pruner and result.pruner.history:
        line += f" ({result.pruner.history[-1].sparsity:.1%} of the prunable channels pruned)"
    print(f"{line}; {result.seconds:.1f} s of training, {result.event_seconds:.1f} s of pruning; see {options.out}")


if __name__ == "__main__":
    main()
