"""Time one training step, dense and narrow: forward, cross entropy, backward, SGD with momentum, on images made up.

A variant is NET[-fused][-BACKEND]:

    dense      the network as it is
    narrow     as it trains between events: parameters of full shape, each module runs on its active channels; at
               sparsity 0 with all of them, which no training does, but on CUDA weights are cast there as in any narrow
               network: what pruning alone gains is narrow against narrow at 0
    compact    as it trains after the last event: physically narrow
    fused      BatchNorm, addition and activation as one operation (`reprune_triton.fuse`)
    compile, max-autotune (both torch.compile), graph (the whole step in a CUDA graph); without one of them, eager

Variants of one backend take turns, those at sparsity 0 beside every other sparsity; one backend after the other.

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
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from reprune_triton import channels as channel_analysis
from reprune_triton import fuse, models, narrow
from reprune_triton.bench import graph, roofline, rows
from reprune_triton.channels import Channels
from reprune_triton.errors import RepruneError
from reprune_triton.event import Clock

NETS, BACKENDS = ("dense", "narrow", "compact"), ("eager", "compile", "max-autotune", "graph")
TWO_BY_TWO = ("dense", "dense-fused", "narrow", "narrow-fused")
DEFAULTS = {
    "cpu": (*TWO_BY_TWO, "compact"),
    "cuda": (
        *TWO_BY_TWO, "compact", "compact-fused", "dense-graph", "dense-fused-graph", "compact-graph",
        "compact-fused-graph", "dense-compile", "compact-compile", "dense-max-autotune", "compact-max-autotune",
    ),
}  # fmt: skip
FORWARD = (1, 16, 32)  # images of a forward
EXACT = 1e-6  # of outputs, relative in the L2 norm: two steps in float64
FEW, SMALL = 4, 64  # images of them, and their side at most
TOLERANCE = 1e-3  # ... of the outputs of one step in float32
GRADIENT_TOLERANCE = 0.05  # ... of a gradient, where every sign shows that rounding turns in a ReLU; none at all is 1
ROUNDING = 3  # with autocast: and so many times what autocast changes
SLIGHT = 0.01  # a gradient that is smaller, by its share of the root mean square of all, may be nothing but rounding
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1 / 32768
COMPILED = ("compile", "max-autotune")
COMPILING = 40  # seconds that must be left for a variant to be compiled
AGAIN = 2  # steps before each further run that are not timed
RECORDING = 3  # steps after which max-autotune only replays what it has recorded


class Variant(NamedTuple):
    """What is run, and how."""

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet50", help="a name of reprune_triton.models (default: resnet50)")
    parser.add_argument("--batch", type=int, default=256, help="images of a step (default: 256)")
    parser.add_argument("--size", type=int, help="side of the images (default: 224, or 32 for the CIFAR ResNets)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    widths = parser.add_mutually_exclusive_group()
    widths.add_argument(
        "--sparsity", type=float, nargs="+", default=[0.0, 0.3, 0.51, 0.75],
        help="share of the prunable channels to leave out, of every layer; 0: beside the others also narrow with all "
        "of them (default: 0 0.3 0.51 0.75)",
    )  # fmt: skip
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
    parser.add_argument("--seed", type=int, default=0, help="of weights, images and channels")
    parser.add_argument("--json", metavar="FILE", help="append the results to this file, one JSON row per line")


class Task(NamedTuple):
    """What every variant is given."""

    dense: nn.Module  # on the device, never trained
    probe: nn.Module  # the same with the weights that variants are checked at
    channels: Channels
    images: Tensor  # (B, 3, H, W)
    labels: Tensor  # (B,)
    amp: torch.dtype | None  # of autocast

    def autocast(self, on: bool = True) -> contextlib.AbstractContextManager[Any]:
        used = self.amp is not None and on
        return torch.autocast(self.images.device.type, self.amp, enabled=used)

    def slices(self, active: dict[str, Tensor]) -> narrow.Slices:
        """Of layers that are not named all channels are active."""
        whole = {layer.name: torch.arange(layer.n_out) for layer in self.channels.prunable}
        return self.channels.slices({name: i.to(self.images.device) for name, i in (whole | active).items()})


def train_step(
    task: Task, forward: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, amp: bool = True,
    mark: Callable[[str], None] = lambda part: None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The outputs (B, classes) and the loss, from before the update. mark is called after each part."""
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


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)


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
        self._graph: Any = None
        self.attempt(self._build)

    def _build(self) -> None:
        task, variant = self.task, self.variant
        compact = variant.net == "compact"
        self.model = narrow.compact(task.dense, self.slices) if compact else copy.deepcopy(task.dense)
        if variant.fused:
            fuse(self.model)
        self.optimizer = sgd(self.model)
        if variant.net == "narrow":
            # Without a module that is named nothing would be cast either.
            whole = {layer.name: narrow.Slice() for layer in task.channels.prunable}
            narrow.Narrowing(self.model, self.optimizer).set(self.slices or whole)
        self._forward: Callable[[Tensor], Tensor] = self.model

    def attempt(self, work: Callable[[], object]) -> bool:
        """False, and the reason is kept, if that fails: the other variants go on."""
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
        for name in ("model", "optimizer", "_forward", "_graph", "_outputs"):
            self.__dict__.pop(name, None)
        give_back(self.task.images.device)

    def begin(self, dense: nn.Module) -> None:
        """Start from the weights of this network, with nothing remembered of gradients; all in place, for graphs."""
        slim = narrow.compact(dense, self.slices) if self.variant.net == "compact" else dense
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
            before = _memory(device)
            self.step()
            self.figures |= _peak(device, before)
        self.ready = True

    def step(self) -> tuple[Tensor, Tensor]:
        if self._graph is not None:
            self._graph.replay()
            return self._outputs
        if self.variant.backend == "max-autotune":
            torch.compiler.cudagraph_mark_step_begin()
        return train_step(self.task, self._forward, self.optimizer)

    def _capture(self) -> None:
        """The whole step as a CUDA graph."""
        device = self.task.images.device
        _side_stream(lambda: train_step(self.task, self.model, self.optimizer))
        before = _memory(device)  # with momentum and gradients, as in a later step of eager
        self.optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = train_step(self.task, self.model, self.optimizer)
        self.figures |= _peak(device, before)

    def time(self, steps: int) -> list[float]:
        """Milliseconds of each of these steps."""
        loss = torch.zeros(())

        def work() -> None:
            nonlocal loss
            loss = self.step()[1]

        spent = time_each(work, steps, self.task.images.device)
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
        """Of bench/roofline.py."""
        if self.variant.fused and self.task.images.is_cuda:
            return "fused"
        return "compiled" if self.variant.backend in COMPILED else "eager"

    @torch.no_grad()
    def forward_of(self, images: Tensor) -> Callable[[], Tensor]:
        """The forward alone on these images."""
        call, task, model = _compiled(self.model, self.variant.backend), self.task, self.model

        def forward() -> Tensor:
            if self.variant.backend == "max-autotune":
                torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad(), task.autocast():
                return call(images)

        if self.variant.backend != "graph":
            return forward
        assert model is call
        _side_stream(forward)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            outputs = forward()

        def replay() -> Tensor:
            captured.replay()
            return outputs

        return replay


def reason(error: BaseException) -> str:
    behind: BaseException | None = error  # as behind that of a capture, which ends with an error of its own
    while behind is not None:
        if isinstance(behind, torch.OutOfMemoryError):
            return "out of memory"
        behind = behind.__cause__ or behind.__context__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


class Wrong(RepruneError):
    """What a variant computes is not what it should."""


class Wanted(NamedTuple):
    """What a masked network computes in float32, and how far autocast alone leads away from it."""

    outputs: Tensor
    own: float
    gradients: dict[str, Tensor] = {}  # of a step, by parameter
    own_gradients: dict[str, float] = {}

    def check(self, outputs: Tensor, found: dict[str, Tensor] | None = None) -> dict[str, float]:
        """By how much they differ; raise Wrong if it is too much."""
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
    """Of each gradient, relative in the L2 norm; of a slight one, relative to the least that is not slight."""
    norms = {name: float(tensor.double().norm()) for name, tensor in wanted.items()}
    count = sum(tensor.numel() for tensor in wanted.values())
    slight = SLIGHT * math.sqrt(sum(norm**2 for norm in norms.values()) / count)
    return {
        name: float((found[name].double() - tensor.double()).norm()) / max(norms[name], slight * tensor.numel() ** 0.5)
        for name, tensor in wanted.items()
    }


def gradients(model: nn.Module, optimizer: torch.optim.Optimizer, slices: narrow.Slices) -> dict[str, Tensor]:
    """What SGD remembers after its first step, the gradients with the weight decay; of the active channels."""
    found = {}
    for name, parameter in model.named_parameters():
        remembered = optimizer.state.get(parameter, {}).get("momentum_buffer", torch.zeros_like(parameter))
        module, _, key = name.rpartition(".")
        where = narrow.cuts(model.get_submodule(module), slices[module]).get(key, []) if module in slices else []
        found[name] = narrow.gather(remembered, where).clone()
    return found


def wanted_step(task: Task, active: dict[str, Tensor]) -> Wanted:
    """Of a variant's first step from the weights of the probe."""

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
    """Of a forward in evaluation, from the weights that are timed."""

    def forward(amp: bool) -> Tensor:
        model = masked(task, task.dense, active).eval()
        with exact(), task.autocast(amp):
            return model(images).float()

    outputs = forward(False)
    return Wanted(outputs, 0.0 if task.amp is None else relative(forward(True), outputs))


def check_exactly(task: Task, model: nn.Module, active: dict[str, Tensor]) -> float:
    """How far a few steps of this model are from those of the masked network, both in float64."""
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
    """For a few passes: float32 is float32, and no time goes into finding the fastest way."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32 = False, False
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32 = before


def masked(task: Task, dense: nn.Module, active: dict[str, Tensor]) -> nn.Module:
    """A dense network without the other channels where they are read, after BatchNorm and activation."""
    model, slices = copy.deepcopy(dense), task.slices(active)
    for layer in task.channels.prunable:
        for reader in layer.readers:
            if reader.name in slices:
                hook = channel_analysis._masking(slices[reader.name].in_)
                model.get_submodule(reader.name).register_forward_pre_hook(hook, with_kwargs=True)
    return model


def run(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RepruneError("there is no CUDA device here; --device cpu is the other one.")
    cuda = device.type == "cuda"
    args.round_to = args.round_to or (16 if cuda else 1)
    args.size = args.size or models.image_size(args.model)
    if min(args.batch, args.size, args.round_to, args.steps, args.runs, args.threads or 1) < 1 or args.warmup < 0:
        raise RepruneError("--batch, --size, --round-to, --steps, --runs and --threads must be at least 1.")
    variants = [parse(name) for name in args.variants or DEFAULTS["cuda" if cuda else "cpu"]]
    if args.threads:
        torch.set_num_threads(args.threads)
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if {variant.backend for variant in variants} & {*COMPILED}:
        from torch._dynamo import config

        # All variants share the code of one class, and narrow ones differ from the rest in their hooks alone.
        config.recompile_limit, config.skip_nnmodule_hook_guards = 64, False
    deadline = time.monotonic() + (args.seconds or math.inf)
    console = Console(width=None if sys.stdout.isatty() else 150)

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
        """Of a group, before any of it is compiled: making a model narrow forgets what was."""
        nets = ("narrow", "compact") if share else ("dense", "narrow") if 0.0 in shares else ("dense",)
        return [Runner(task, v, share, actives[share]) for v in variants if v.backend == backend and v.net in nets]

    stays, wanted, refused = build(0.0, "eager"), dict[float, Wanted](), list[str]()
    for share in [share for share in shares if share > 0] or [0.0]:
        groups, forward = list[Group](), list[dict[str, Any]]()
        try:
            for backend in dict.fromkeys(variant.backend for variant in variants):
                whole = stays if backend == "eager" else build(0.0, backend)
                runners = [*whole, *(build(share, backend) if share else ())]
                groups.append(Group(task, args, share, runners, wanted, deadline))
                groups[-1].measure()
                forward += groups[-1].forward() if args.forward else []
                groups[-1].close()
        finally:  # what is stopped keeps what it has measured
            lines = with_best([line for group in groups for line in group.lines(ceilings)])
            save(args, settings, lines + forward)
        on = f"{settings['device']}, sparsity {share:g}"
        console.print(step_table(lines, f"A step of {args.model}, {args.batch} images, {on}"))
        if args.forward:
            console.print(forward_table(forward, f"A forward of {args.model}, {on}"))
        lines += forward
        for note in dict.fromkeys(f"{label(x)}, {x['result']}: {x['why']}" for x in lines if x["why"]):
            console.print(note, markup=False)
        refused += [f"{label(line)}: {line['why']}" for line in lines if line["result"] == "refused"]
    if refused:
        raise RepruneError("; ".join(dict.fromkeys(refused)))


def with_best(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the ratio to the best dense one, of whatever backend."""
    measured = [line for line in lines if line["result"] == "measured"]
    plain = [line["ms"] for line in measured if line["net"] == "dense" and not line["fused"]]
    for line in measured:
        line["ratio_best"] = min(plain) / line["ms"] if plain else None
    return lines


def save(args: argparse.Namespace, settings: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    for line in lines if args.json else ():
        rows.append(args.json, settings | line)


def make_task(args: argparse.Namespace, device: torch.device) -> Task:
    torch.manual_seed(args.seed)
    dense = roofline.build(args.model)
    for module in dense.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0  # a narrow network would draw other numbers
    shape = (args.batch, 3, args.size, args.size)
    channels = graph.prunable(dense, shape)
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
    """The network with other scales and shifts in its BatchNorms, no two alike, and most activations behind them on.

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


def at_flops(channels: Channels, flops: float, round_to: int) -> float:
    """The least sparsity at which no more than this share of the FLOPs is left, to 1e-4."""
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


class Group:
    """The variants that take turns: of one backend, those at sparsity 0 and at one other.

    Not of all backends: a CUDA graph, of max-autotune too, keeps the memory of its activations as long as it exists,
    and all of them with the eager ones may be more than 80 GB for ResNet-50 at batch 256. `close` gives it back before
    the next group begins. One that runs out of memory fails alone: what it held is given back at once, except what
    compiled code keeps until `close`, which cannot be dropped one by one.
    """

    def __init__(
        self, task: Task, args: argparse.Namespace, share: float, runners: list[Runner], wanted: dict[float, Wanted],
        deadline: float,
    ):  # fmt: skip
        self.task, self.args, self.share = task, args, share
        self.runners, self.wanted, self.deadline = runners, wanted, deadline

    def measure(self) -> None:
        for runner in self.runners:
            runner.runs = []
            if runner.ready or runner.result in ("refused", "failed"):
                continue
            runner.result = ""
            compiling = COMPILING if runner.variant.backend in COMPILED else 0
            if time.monotonic() + self.planned() + compiling > self.deadline:
                runner.result, runner.why = "skipped", "no time left"
                continue
            runner.attempt(lambda r=runner: self._prepare(r))  # type: ignore[misc]
        for number in range(self.args.runs):
            if time.monotonic() + self.planned() > self.deadline:
                break
            for runner in self.runners:
                if runner.ready:
                    runner.attempt(lambda r=runner, n=number: self._turn(r, n))  # type: ignore[misc]
        for runner in self.runners:
            if runner.ready and not runner.runs:
                runner.result, runner.why = "skipped", "no time left"
            elif runner.ready and runner.variant.backend == "eager" and time.monotonic() < self.deadline:
                runner.attempt(lambda r=runner: r.take_apart(self.args.steps))  # type: ignore[misc]

    def _prepare(self, runner: Runner) -> None:
        if runner.share not in self.wanted:
            self.wanted[runner.share] = wanted_step(self.task, runner.active)
        give_back(self.task.images.device)  # a graph has no use for what the allocator still holds for others
        runner.prepare(self.wanted[runner.share], self.args.warmup)

    def close(self) -> None:
        """Give back the memory of all that have no turn in a later group."""
        for runner in self.runners:
            if runner.share or runner.variant.backend != "eager":
                runner.release()
        if any(runner.variant.backend in COMPILED for runner in self.runners):
            torch.compiler.reset()  # its code holds the graphs of max-autotune
            give_back(self.task.images.device)

    def _turn(self, runner: Runner, number: int) -> None:
        runner.result = ""
        if number:
            runner.time(AGAIN)
        runner.runs.append(statistics.median(runner.time(self.args.steps)))

    def planned(self) -> float:
        """Seconds of one run."""
        return sum(r.figures["estimate_ms"] * self.args.steps for r in self.runners if r.ready) / 1e3

    def lines(self, ceilings: roofline.Ceilings) -> list[dict[str, Any]]:
        """A row for every variant."""
        measured = {(runner.variant, runner.share): runner for runner in self.runners if runner.runs}
        size, shape = (4 if self.task.amp is None else 2), tuple(self.task.images.shape)
        ideal: dict[tuple[float, str], float] = {}
        found = []
        for runner in self.runners:
            variant = runner.variant
            widths = {name: len(index) for name, index in runner.active.items()}
            line: dict[str, Any] = {
                "row": "step", "variant": str(variant), **variant._asdict(), "sparsity": runner.share,
                "beside": self.share, "flops_left": self.task.channels.flops(widths),
                "result": "measured" if runner.runs else runner.result or "skipped", "why": runner.why,
            }  # fmt: skip
            line |= {key: value for key, value in runner.figures.items() if key != "estimate_ms"}
            if runner.runs:
                key = runner.share, runner.level
                if key not in ideal:
                    model = narrow.compact(self.task.dense, runner.slices)
                    ideal[key] = roofline.total(roofline.kernels(model, shape, runner.level, size), ceilings) * 1e3
                same = measured.get((variant._replace(net="dense"), 0.0))
                whole = measured.get((variant, 0.0)) if variant.net == "narrow" else None
                line |= {
                    "ms": runner.ms, "runs_ms": runner.runs, "runs": len(runner.runs),
                    "spread": (max(runner.runs) - min(runner.runs)) / runner.ms,
                    "images_per_s": shape[0] / runner.ms * 1e3,
                    "ratio_dense": same.ms / runner.ms if same else None,
                    "ratio_whole": whole.ms / runner.ms if whole else None,
                    "roofline": runner.level, "roofline_ms": ideal[key], "share": ideal[key] / runner.ms,
                    "parts_ms": runner.parts,
                }  # fmt: skip
            found.append(line)
        return found

    def forward(self) -> list[dict[str, Any]]:
        """Rows of the forward alone, in evaluation."""
        return [line for batch in FORWARD for line in self._forward(batch)]

    def _forward(self, batch: int) -> list[dict[str, Any]]:
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
                both = (time_each(call, self.args.steps, images.device, wait) for wait in (True, False))
                spent[runner].append(tuple(map(statistics.median, both)))  # type: ignore[arg-type]
        for runner, pairs in spent.items():
            latency, ms = (statistics.median(some) for some in zip(*pairs, strict=True))
            lines[runner] |= {"latency_ms": latency, "ms": ms, "images_per_s": batch / ms * 1e3}
        for runner in self.runners:
            if runner.ready:
                runner.model.train()
        return list(lines.values())

    def _forward_of(self, runner: Runner, images: Tensor, line: dict[str, Any]) -> Callable[[], Tensor]:
        """The forward of this variant, checked and warm."""
        runner.begin(self.task.dense)  # after some training they would no longer be equal to the last bit
        runner.model.eval()
        call = runner.forward_of(images)
        line |= wanted_forward(self.task, runner.active, images).check(call())
        time_each(call, self.args.warmup, images.device)
        return call


def time_each(work: Callable[[], object], count: int, device: torch.device, wait: bool = False) -> list[float]:
    """Milliseconds of each of `count` calls, one right after the other; with `wait`, until the device is done."""
    if device.type != "cuda" or wait:
        spent = []
        for _ in range(count):
            _synchronize(device)
            started = time.perf_counter()
            work()
            _synchronize(device)
            spent.append((time.perf_counter() - started) * 1e3)
        return spent
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize(device)
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in zip(marks, marks[1:], strict=False)]


def _compiled(model: nn.Module, backend: str) -> Callable[[Tensor], Tensor]:
    if backend not in COMPILED:
        return model
    return torch.compile(model, mode=None if backend == "compile" else backend, dynamic=False)


def _side_stream(work: Callable[[], object], times: int = 3) -> None:
    """Warm up for the capture of a CUDA graph."""
    stream, here = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        for _ in range(times):
            work()
    here.wait_stream(stream)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def give_back(device: torch.device) -> None:
    """To the device, what nobody uses any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _memory(device: torch.device) -> int:
    """Bytes in use; from here on the peak is counted."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device, before: int) -> dict[str, float]:
    """The most in use during a step beyond what is there before one, which is weights, momentum, the last gradients and
    what other variants hold: so activations and workspaces. The same for eager, compile and graph. max-autotune has no
    figure: only Inductor knows what the graphs it has recorded share."""
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize(device)
    return {"peak_mb": (torch.cuda.max_memory_allocated(device) - before) / 2**20}


def step_table(lines: list[dict[str, Any]], title: str) -> Table:
    made = Table(
        title=title,
        caption="Spread: from the fastest run to the slowest; ratios mean no more. To dense: of the same backend. The "
        "best dense may be of another one, and have had its turns at another time.",
    )
    for column in ("", "FLOPs left", "ms", "spread", "images / s", "to dense", "to narrow at 0",
                   "to best dense", "peak MB", "of the roofline", "difference", "in float64"):  # fmt: skip
        made.add_column(column, justify="right" if column else "left", no_wrap=not column)
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
    made = Table(title=title, caption="Latency: of one alone. Images a second: one after the other.")
    for column in ("images", "", "latency, ms", "images / s", "difference"):
        made.add_column(column, justify="right" if column else "left", no_wrap=not column)
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
