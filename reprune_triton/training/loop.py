"""The training of a classifier, dense or pruned by REPrune on the way; read it top to bottom."""

import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn import functional as F

from reprune_triton import capture
from reprune_triton.errors import RepruneError
from reprune_triton.fused.fusion import fuse
from reprune_triton.pruner import REPrune
from reprune_triton.running import compact
from reprune_triton.running.analysis import analyse
from reprune_triton.selection.widths import keep_count, round_up
from reprune_triton.training import checkpoint, models
from reprune_triton.training.data import Data
from reprune_triton.training.data import load as load_data
from reprune_triton.training.options import AMP, Options
from reprune_triton.training.run import Record, Run, Signals


@dataclass(frozen=True)
class Result:
    """The result of a training."""

    model: nn.Module  # compact if it was pruned
    accuracy: float  # of that model on the test set, in [0, 1]
    flops: float  # its share of the dense network's multiply-adds
    seconds: float  # of training, without pruning events and evaluation
    event_seconds: float  # of pruning events
    pruner: REPrune | None
    log: list[Record]


def train(options: Options, on_epoch: Callable[[Record], None] | None = None, quiet: bool = False) -> Result:
    """Train as `options` say.

    Args:
        on_epoch: gets each line of the log once its checkpoint is written.
        quiet: whether to show no progress bar.
    Raises:
        RepruneError: for options that do not fit the device, the data or the model; for a loss that is not finite.
        Stopped: if SIGTERM or SIGINT came.
    """
    device = _device(options)
    graph = _graph(options, device)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    data = load_data(
        options.data, options.data_dir, batch=options.batch, seed=options.seed, device=str(device),
        workers=options.workers, size=options.size,
    )  # fmt: skip
    model, example, flops = _network(options, data, device)
    fused = graph or None  # only fused SGD reads the learning rate from a tensor
    optimizer = torch.optim.SGD(_groups(model, options), options.lr, options.momentum, fused=fused)
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
    pruner = _pruner(model, optimizer, example, options)
    run = Run(options, model, optimizer, scaler, pruner, device)
    first, log = run.start()
    step = _Step(model, optimizer, scaler, options, device, graph)
    epochs = options.epochs * options.stages

    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), disable=quiet or not sys.stderr.isatty(),
    )  # fmt: skip
    with Signals() as signals, progress:
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
        _save(slim, options, data, accuracy, flops)
    seconds, event_seconds = (sum(line[key] for line in log) for key in ("seconds", "event_seconds"))
    return Result(slim, accuracy, flops, seconds, event_seconds, pruner, log)


def _device(options: Options) -> torch.device:
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RepruneError("there is no CUDA device here: give --device cpu")
    return device


def _network(options: Options, data: Data, device: torch.device) -> tuple[nn.Module, torch.Tensor, float]:
    """Return the network to train, example inputs for its analysis, and its share of the dense network's FLOPs."""
    model = models.build(options.model, data.classes, data.channels).to(device)
    example = models.example_inputs(options.model, data.channels, data.size).to(device)
    model, flops = thin(model, example, options) if options.paradigm == "scratch" else (model, 1.0)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if options.fuse:
        model = fuse(model)
    return model, example, flops


def _save(slim: nn.Module, options: Options, data: Data, accuracy: float, flops: float) -> None:
    """Write the final model, with all that it takes to build and use it."""
    about = {
        "model": options.model, "data": options.data, "num_classes": data.classes, "in_channels": data.channels,
        "size": data.size, "mean": data.mean.flatten().tolist(), "std": data.std.flatten().tolist(),
        "accuracy": accuracy, "flops": flops,
    }  # fmt: skip
    checkpoint.save(slim, Path(options.out or "") / "slim.safetensors", extra=about)


def _train_epoch(
    step: "_Step", data: Data, options: Options, epoch: int, after_batch: Callable[[], None]
) -> float:  # fmt: skip
    """Train on all training data once, and return the mean loss; waits for the device."""
    total = torch.zeros((), device=data.mean.device)  # a number on the host would wait for the device at each step
    for i, (x, y) in enumerate(data.train_batches(epoch)):  # x (B, C, H, W), y (B,)
        number, share = epoch * data.steps + i, 1.0
        if options.mixup:
            share = float(np.random.default_rng([options.seed, number]).beta(options.mixup, options.mixup))
        total += step(x, y, share, learning_rate(number, data.steps, options))
        after_batch()
    return total.item() / data.steps


class _Step:
    """One step of the optimizer on one batch.

    With `graph` it is replayed from a CUDA graph, from the second step on after a change of the network. So all that
    changes from step to step is in tensors that keep their place in memory.
    """

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
        """Forget the captured step, as the network has changed."""
        self._replay: Callable[[], torch.Tensor] | None = None
        self._warm = False

    def __call__(self, x: torch.Tensor, y: torch.Tensor, share: float, lr: float) -> torch.Tensor:
        """Do the step, and return the loss from before it.

        share: of x (B, C, H, W) and y (B,) in what the network sees; the rest is the batch in reverse (mixup).
        """
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
            except Exception as error:  # the step has not been done
                self._go_on_without(error)
                return self(x, y, share, lr)
        return self._replay()

    def _go_on_without(self, error: Exception) -> None:
        """Do all steps without a graph from now on.

        Raises:
            RepruneError: if a graph was asked for.
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
        RepruneError: if that is asked for without a CUDA device.
    """
    if options.graph and device.type != "cuda":
        raise RepruneError(f"graph needs a CUDA device; this run is on {device}")
    return device.type == "cuda" and options.amp != "fp16" if options.graph is None else options.graph


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, amp: str = "off", after_batch: Callable[[], None] = lambda: None) -> float:
    """Return the share of the test set that `model` classifies correctly, in [0, 1]."""
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
    """Return the learning rate of a step, counted from 0: linear over the warm-up, then a cosine to 0, in every stage.

    steps: per epoch.
    """
    warmup, last = options.warmup * steps, options.epochs * steps
    step %= last
    if step < warmup:
        return options.lr * (step + 1) / warmup
    return options.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (last - warmup)))


def _groups(model: nn.Module, options: Options) -> list[dict[str, Any]]:
    """Return the optimizer's groups: parameters with weight decay, and those without."""
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
    """Return a compact copy of a fresh model whose prunable convs are equally narrow, and its share of the FLOPs.

    They have as many filters as `options.sparsity` leaves, or as fit into `options.flops`.

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
        widths = {x.name: round_up(keep_count(x.n_out, share), x.n_out, round_to, 1) for x in found.prunable}
        flops = found.flops(widths)
        if wanted is None or flops <= wanted:
            active = {name: torch.arange(width, device=device) for name, width in widths.items()}
            return compact.compact(model, found.slices(active)), flops
    raise RepruneError(f"flops={wanted} is out of reach for a {options.model} from scratch: it still has {flops:.3f}")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
