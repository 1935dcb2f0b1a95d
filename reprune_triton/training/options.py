"""The options of a training run, and recipes for data sets."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from reprune_triton.config import Config
from reprune_triton.errors import RepruneError

PARADIGMS = ("concurrent", "three-stage", "scratch")
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Options in which a resumed run may differ.
FREE = ("data_dir", "workers", "threads", "device", "graph", "out", "resume")


@dataclass(frozen=True)
class Options:
    """The options of one run; `recipe` fills in what suits a data set. Epochs count from 1, as in the log.

    With a sparsity or a share of FLOPs, `paradigm` says when channels go. "concurrent" prunes during the training (the
    paper). The other two are for comparison, and ignore every, until and regrow. "three-stage" trains the dense network
    for `epochs`, prunes once, and trains for as many again with the whole schedule of the learning rate (rewinding;
    Renda et al., ICLR 2020). "scratch" trains a network whose prunable convs are equally narrow from the start.
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
    prune_seed: int | None = None  # for the pruner's random choices alone; default: seed
    round_to: int | None = None
    ignore: tuple[str, ...] = ()
    device: str | None = None  # default: cuda where there is one
    amp: str = "off"
    channels_last: bool = False
    fuse: bool = False  # BatchNorm, addition and activation in one operation
    # Replay each step from a CUDA graph, captured anew after every event; default: on CUDA, unless amp is fp16.
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
        """Return the pruner's options.

        Raises:
            RepruneError: if one of them is out of its range; also if the run has no pruner.
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
        """Number of times that the schedule of `epochs` is run."""
        return 2 if self.paradigm == "three-stage" else 1


# The papers' recipes, for one device. `prune_share` is T_prune / epochs.
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
    """Return the options of recipe `name` (default: the one for `data`), with `changes`.

    Raises:
        RepruneError: for an unknown data set or recipe, or an option out of its range.
    """
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


def lasting(options: Options) -> dict[str, Any]:
    """Return the options that a checkpoint keeps: all but FREE."""
    return {key: value for key, value in asdict(options).items() if key not in FREE}
