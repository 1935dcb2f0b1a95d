"""The variants of a network whose training step `bench step` times: how each is built, run and checked.

A variant is NET[-fused][-BACKEND]:

    dense      the network as it is
    narrow     as it trains between events: parameters of full shape, each module runs on its active channels; at
               sparsity 0 with all of them, which no training does, but on CUDA weights are cast there as in any narrow
               network: what pruning alone gains is narrow against narrow at 0
    compact    as it trains after the last event: physically narrow
    fused      BatchNorm, addition and activation as one operation (`reprune_triton.fuse`)
    compile, max-autotune (both torch.compile), graph (the whole step in a CUDA graph); without one of them, eager

A variant is only timed if it computes what the dense network does with the same channels masked after BatchNorm and
activation. Eager variants must do so over two steps in float64, on a few small images. Then each, compiled or captured
as it is timed, takes a step on the images that are timed: its outputs, and for every parameter what SGD remembers of
the gradient, must be as near as rounding allows; with autocast, as near as autocast leaves the masked network to
float32. These checks use weights of their own (`make_probe`). The loss must stay finite.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reprune_triton import capture, fuse
from reprune_triton.bench import networks
from reprune_triton.bench.estimate import roofline
from reprune_triton.bench.measure import device as devices
from reprune_triton.errors import RepruneError
from reprune_triton.running import analysis, compact, layers, narrow
from reprune_triton.running.channels import Channels
from reprune_triton.selection.event import Clock

NETS, BACKENDS = ("dense", "narrow", "compact"), ("eager", "compile", "max-autotune", "graph")
EXACT = 1e-6  # of outputs, relative in the L2 norm: two steps in float64
FEW, SMALL = 4, 64  # images of them, and their side at most
TOLERANCE = 1e-3  # ... of the outputs of one step in float32
GRADIENT_TOLERANCE = 0.05  # ... of a gradient, where every sign shows that rounding turns in a ReLU; none at all is 1
ROUNDING = 3  # with autocast: and so many times what autocast changes
SLIGHT = 0.01  # a gradient that is smaller, by its share of the root mean square of all, may be nothing but rounding
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1 / 32768
COMPILED = ("compile", "max-autotune")
RECORDING = 3  # steps after which max-autotune only replays what it has recorded


class Variant(NamedTuple):
    """A network and the way in which it is run."""

    net: str
    fused: bool
    backend: str

    def __str__(self) -> str:
        return "-".join([self.net] + ["fused"] * self.fused + [self.backend] * (self.backend != "eager"))


def parse(name: str) -> Variant:
    net, _, rest = name.partition("-")
    fused = rest == "fused" or rest.startswith("fused-")
    backend = rest.removeprefix("fused").removeprefix("-") or "eager"
    if net not in NETS or backend not in BACKENDS:
        raise RepruneError(
            f"unknown variant {name!r}: it is NET[-fused][-BACKEND], with NET of {', '.join(NETS)} and BACKEND of "
            f"{', '.join(BACKENDS[1:])}"
        )
    return Variant(net, fused, backend)


class Task(NamedTuple):
    """The input of every variant."""

    dense: nn.Module  # on the device, never trained
    probe: nn.Module  # the same with the weights that variants are checked at
    channels: Channels
    images: Tensor  # (B, 3, H, W)
    labels: Tensor  # (B,)
    amp: torch.dtype | None  # of autocast

    def autocast(self, on: bool = True) -> contextlib.AbstractContextManager[Any]:
        used = self.amp is not None and on
        return torch.autocast(self.images.device.type, self.amp, enabled=used)

    def slices(self, active: dict[str, Tensor]) -> layers.Slices:
        """Return the slices; of layers that are not named all channels are active."""
        whole = {layer.name: torch.arange(layer.n_out) for layer in self.channels.prunable}
        return self.channels.slices({name: i.to(self.images.device) for name, i in (whole | active).items()})


def train_step(
    task: Task, forward: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, amp: bool = True,
    mark: Callable[[str], None] = lambda part: None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Train one step; return the outputs (B, classes) and the loss, from before the update.

    mark: called after each part.
    """
    optimizer.zero_grad(set_to_none=True)
    with task.autocast(amp):
        outputs = forward(task.images)
        loss = F.cross_entropy(outputs, task.labels)
    mark("forward")
    loss.backward()
    mark("backward")
    optimizer.step()
    mark("optimizer")
    return outputs.detach(), loss.detach()


def sgd(model: nn.Module, captured: bool = False) -> torch.optim.SGD:
    """Return the optimizer; captured: with the learning rate in a tensor, as a step in a CUDA graph needs it."""
    if not captured:
        return torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
    rate = torch.tensor(LEARNING_RATE, device=next(model.parameters()).device)
    return torch.optim.SGD(model.parameters(), rate, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)


class Runner:
    """One variant at one width."""

    def __init__(self, task: Task, variant: Variant, share: float, active: dict[str, Tensor]):
        self.task, self.variant, self.share = task, variant, share
        self.result, self.why = "", ""  # measured, failed, refused or skipped, and why
        self.ready = False
        self.figures: dict[str, float] = {}
        self.runs: list[float] = []  # ms, the median step of each
        self.parts: dict[str, float] = {}  # ms of forward, backward and optimizer, in steps of their own
        self.active = active
        self.slices = task.slices(self.active)
        self._replay: Callable[[], tuple[Tensor, Tensor]] | None = None
        self.attempt(self._build)

    def _build(self) -> None:
        task, variant = self.task, self.variant
        small = variant.net == "compact"
        self.model = compact.compact(task.dense, self.slices) if small else copy.deepcopy(task.dense)
        if variant.fused:
            fuse(self.model)
        self.optimizer = sgd(self.model, captured=variant.backend == "graph")
        if variant.net == "narrow":
            # Without a module that is named nothing would be cast either.
            whole = {layer.name: layers.Slice() for layer in task.channels.prunable}
            narrow.Narrowing(self.model, self.optimizer).set(self.slices or whole)
        self._forward: Callable[[Tensor], Tensor] = self.model

    def attempt(self, work: Callable[[], object]) -> bool:
        """Whether the work succeeds. If not, the reason is kept and the other variants go on."""
        try:
            work()
        except Wrong as error:
            self.result, self.why = "refused", str(error)
        except Exception as error:  # out of memory, no compiler, an operation that a CUDA graph cannot hold
            self.result, self.why = "failed", reason(error)
        if self.result in ("refused", "failed"):
            self.runs = []
            self.release()
        return not self.result

    def release(self) -> None:
        """Give the memory back."""
        self.ready = False
        for name in ("model", "optimizer", "_forward", "_replay"):
            self.__dict__.pop(name, None)
        devices.give_back(self.task.images.device)

    def begin(self, dense: nn.Module) -> None:
        """Start from the weights of this network, with nothing remembered of gradients; all in place, for graphs."""
        slim = compact.compact(dense, self.slices) if self.variant.net == "compact" else dense
        self.model.load_state_dict(slim.state_dict())
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()

    def prepare(self, wanted: Wanted, warmup: int) -> None:
        """Compile or capture; check; warm up."""
        begun = time.perf_counter()
        device = self.task.images.device
        self.begin(self.task.probe)
        if self.variant.backend == "eager":
            self.figures["difference_float64"] = check_exactly(self.task, self.model, self.active)
        self._forward = _compiled(self.model, self.variant.backend)
        if self.variant.backend == "graph":
            if device.type != "cuda":
                raise RepruneError("a CUDA graph needs CUDA")
            self._capture()
        elif self.variant.backend == "max-autotune":
            for _ in range(RECORDING):
                self.step()
        self.begin(self.task.probe)
        outputs, there = self.step()[0], {} if self.variant.net == "compact" else self.slices
        self.figures |= wanted.check(outputs, gradients(self.model, self.optimizer, there))
        self.begin(self.task.dense)
        self.figures["prepare_s"] = time.perf_counter() - begun
        self.figures["estimate_ms"] = statistics.median(self.time(max(1, warmup)))
        if self.variant.backend in ("eager", "compile"):  # a replay takes no memory: graph counted in its capture
            before = devices.memory(device)
            self.step()
            self.figures |= devices.peak(device, before)
        self.ready = True

    def step(self) -> tuple[Tensor, Tensor]:
        if self._replay is not None:
            return self._replay()
        if self.variant.backend == "max-autotune":
            torch.compiler.cudagraph_mark_step_begin()
        return train_step(self.task, self._forward, self.optimizer)

    def _capture(self) -> None:
        """Capture the whole step as a CUDA graph, as `train --graph` does."""
        device = self.task.images.device

        def step() -> tuple[Tensor, Tensor]:
            return train_step(self.task, self.model, self.optimizer)

        capture.warm_up(step, 3)
        before = devices.memory(device)  # with momentum and gradients, as in a later step of eager
        self.optimizer.zero_grad(set_to_none=True)
        self._replay = capture.capture(step)
        self.figures |= devices.peak(device, before)

    def time(self, steps: int) -> list[float]:
        """Measure the milliseconds of each of these steps."""
        loss = torch.zeros(())

        def work() -> None:
            nonlocal loss
            loss = self.step()[1]

        spent = devices.time_each(work, steps, self.task.images.device)
        if not math.isfinite(float(loss)):
            raise Wrong(f"the loss is {float(loss)}")
        return spent

    def take_apart(self, steps: int) -> None:
        """Measure the parts of a step, which only eager code shows."""
        clocks = []
        for _ in range(steps):
            clocks.append(Clock(self.task.images.device))
            train_step(self.task, self._forward, self.optimizer, mark=clocks[-1])
        if self.task.images.is_cuda:
            torch.cuda.synchronize(self.task.images.device)
        found = [clock.ms() for clock in clocks]
        self.parts = {part: statistics.median(ms[part] for ms in found) for part in found[0]}

    @property
    def ms(self) -> float:
        return statistics.median(self.runs)

    @property
    def level(self) -> str:
        """The level of `estimate.roofline` for this variant."""
        if self.variant.fused and self.task.images.is_cuda:
            return "fused"
        return "compiled" if self.variant.backend in COMPILED else "eager"

    @torch.no_grad()
    def forward_of(self, images: Tensor) -> Callable[[], Tensor]:
        """Return the forward alone on these images."""
        call, task, model = _compiled(self.model, self.variant.backend), self.task, self.model

        def forward() -> Tensor:
            if self.variant.backend == "max-autotune":
                torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad(), task.autocast():
                return call(images)

        if self.variant.backend != "graph":
            return forward
        assert model is call
        capture.warm_up(forward, 3)
        return capture.capture(forward)


def reason(error: BaseException) -> str:
    cause: BaseException | None = error  # a capture that fails ends with an error of its own
    while cause is not None:
        if isinstance(cause, torch.OutOfMemoryError):
            return "out of memory"
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


class Wrong(RepruneError):
    """A variant computes something else than it should."""


class Wanted(NamedTuple):
    """The results of a masked network in float32, and how far autocast alone leads away from them."""

    outputs: Tensor
    own: float
    gradients: dict[str, Tensor] = {}  # of a step, by parameter
    own_gradients: dict[str, float] = {}

    def check(self, outputs: Tensor, found: dict[str, Tensor] | None = None) -> dict[str, float]:
        """Return by how much they differ; raise Wrong if it is too much."""
        difference = relative(outputs, self.outputs)
        _check("its outputs are", difference, TOLERANCE + ROUNDING * self.own)
        figures = {"difference": difference, "autocast_alone": self.own}
        if found is not None:
            apart = differences(found, self.gradients)
            for name, own in self.own_gradients.items():
                _check(f"its gradient of {name} is", apart[name], GRADIENT_TOLERANCE + ROUNDING * own)
            figures |= {"difference_gradient": max(apart.values())}
            figures |= {"autocast_alone_gradient": max(self.own_gradients.values())}
        return figures


def _check(what: str, difference: float, most: float) -> None:
    if not difference <= most:
        raise Wrong(f"{what} {difference:.2e} away from the masked network's, and may be {most:.2e}: it is not timed")


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Compare each gradient, relative in the L2 norm; a slight one, relative to the least that is not slight."""
    norms = {name: float(tensor.double().norm()) for name, tensor in wanted.items()}
    count = sum(tensor.numel() for tensor in wanted.values())
    slight = SLIGHT * math.sqrt(sum(norm**2 for norm in norms.values()) / count)
    return {
        name: float((found[name].double() - tensor.double()).norm()) / max(norms[name], slight * tensor.numel() ** 0.5)
        for name, tensor in wanted.items()
    }


def gradients(model: nn.Module, optimizer: torch.optim.Optimizer, slices: layers.Slices) -> dict[str, Tensor]:
    """Return what SGD remembers after its first step, the gradients with the weight decay, of the active channels."""
    found = {}
    for name, parameter in model.named_parameters():
        remembered = optimizer.state.get(parameter, {}).get("momentum_buffer", torch.zeros_like(parameter))
        module, _, key = name.rpartition(".")
        where = layers.cuts(model.get_submodule(module), slices[module]).get(key, []) if module in slices else []
        found[name] = layers.gather(remembered, where).clone()
    return found


def wanted_step(task: Task, active: dict[str, Tensor]) -> Wanted:
    """Return the results of a variant's first step from the weights of the probe."""

    def step(amp: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model = masked(task, task.probe, active)
        optimizer = sgd(model)
        with exact():
            outputs = train_step(task, model, optimizer, amp)[0].float()
        return outputs, gradients(model, optimizer, task.slices(active))

    outputs, wide = step(False)
    if task.amp is None:
        return Wanted(outputs, 0.0, wide, dict.fromkeys(wide, 0.0))
    other, cast = step(True)
    return Wanted(outputs, relative(other, outputs), wide, differences(cast, wide))


@torch.no_grad()
def wanted_forward(task: Task, active: dict[str, Tensor], images: Tensor) -> Wanted:
    """Return the results of a forward in evaluation, from the weights that are timed."""

    def forward(amp: bool) -> Tensor:
        model = masked(task, task.dense, active).eval()
        with exact(), task.autocast(amp):
            return model(images).float()

    outputs = forward(False)
    return Wanted(outputs, 0.0 if task.amp is None else relative(forward(True), outputs))


def check_exactly(task: Task, model: nn.Module, active: dict[str, Tensor]) -> float:
    """Return how far a few steps of this model are from those of the masked network, both in float64."""
    images, labels = task.images[:FEW, :, :SMALL, :SMALL].double(), task.labels[:FEW]
    small = task._replace(images=images, labels=labels, amp=None)

    def outputs(model: nn.Module) -> list[Tensor]:
        model = model.double()
        optimizer = sgd(model)
        return [train_step(small, model, optimizer)[0] for _ in range(2)]  # right twice: so is the gradient

    with exact():
        both = outputs(copy.deepcopy(model)), outputs(masked(task, task.probe, active))
    difference = max(relative(a, b) for a, b in zip(*both, strict=True))
    if not difference <= EXACT:
        raise Wrong(f"in float64 it is {difference:.2e} away from the masked network: it is not timed")
    return difference


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Compute float32 as float32, and spend no time on finding the fastest way, for a few passes."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32 = False, False
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32 = before


def masked(task: Task, dense: nn.Module, active: dict[str, Tensor]) -> nn.Module:
    """Return a dense network without the other channels where they are read, after BatchNorm and activation."""
    model, slices = copy.deepcopy(dense), task.slices(active)
    for layer in task.channels.prunable:
        for reader in layer.readers:
            if reader.name in slices:
                hook = analysis._masking(slices[reader.name].in_)
                model.get_submodule(reader.name).register_forward_pre_hook(hook, with_kwargs=True)
    return model


def make_task(args: argparse.Namespace, device: torch.device) -> Task:
    dense = networks.build(args.model, args.seed)
    for module in dense.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0  # a narrow network would draw other numbers
    shape = (args.batch, 3, args.size, args.size)
    channels = analysis.prunable(dense, shape)
    if not channels.prunable:
        raise RepruneError(f"{args.model} has no conv that can be pruned.")
    generator = torch.Generator().manual_seed(args.seed)
    images = torch.randn(shape, generator=generator).to(device)
    labels = torch.randint(10, (args.batch,), generator=generator).to(device)
    dense.to(device)
    if device.type == "cuda":
        dense.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    amp = torch.bfloat16 if device.type == "cuda" else None
    return Task(dense, make_probe(dense, generator), channels, images, labels, amp)


def make_probe(dense: nn.Module, generator: torch.Generator) -> nn.Module:
    """Return the network with other scales and shifts in its BatchNorms, no two alike, and most activations on.

    As it is built, a deep network makes so much of rounding that no check could tell its gradients in bfloat16 from
    wrong ones: on a CPU those of ResNet-50 are further from float32 than zeros would be. Here few are further than a
    third. These weights are not timed: with fewer zeros in its activations a GPU may be slower.
    """
    probe = copy.deepcopy(dense)
    for module in probe.modules():
        if isinstance(module, nn.BatchNorm2d):
            for parameter, low, high in ((module.weight, 0.5, 1.5), (module.bias, 1.0, 3.0)):
                drawn = torch.empty(parameter.shape).uniform_(low, high, generator=generator)
                parameter.data.copy_(drawn)
    return probe


def active_at(channels: Channels, share: float, args: argparse.Namespace) -> dict[str, Tensor]:
    return roofline.choose(channels, roofline.widths_at(channels, share, args.round_to), args.seed)


def _compiled(model: nn.Module, backend: str) -> Callable[[Tensor], Tensor]:
    if backend not in COMPILED:
        return model
    return torch.compile(model, mode=None if backend == "compile" else backend, dynamic=False)
