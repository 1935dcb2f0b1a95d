"""The options of a pruner, and checks of their ranges."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from reprune_triton.errors import RepruneError
from reprune_triton.running.channels import matches
from reprune_triton.selection import problems, reference, regrow

SELECTIONS = ("coverage", "l1", "gamma", "random")


@dataclass(frozen=True)
class Config:
    """The options of `REPrune`.

    Attributes:
        sparsity: the global sparsity s, in [0, 1); or a dict from conv name or pattern to that layer's own.
        flops: instead of sparsity: the share of the dense network's FLOPs to keep, in (0, 1].
        every: epochs from one pruning event to the next (dT).
        until: the epoch of the last event (T); about 72% of the training is good (paper, Table 9).
        regrow: delta_0, how much denser than its target the network is at the start; 0 switches regrowth off.
        regrow_by: which filters are likely to come back: those with the largest part outside the span of the kept ones
            ("residual", CHEX), those whose kernels are farthest from the kept ones' ("coverage"), or any ("random").
        linkage: "ward" (paper), "single", "complete" or "average".
        select: which filters a layer keeps: those that cover the most clusters ("coverage", the paper). For comparison:
            those with the largest absolute sum ("l1") or BatchNorm scale ("gamma"), or any ("random").
        tie: which of equally good filters is taken: "random" (paper), "index", "norm" or "gamma".
        round_to: widths are a multiple of this; None is 16 on CUDA and 1 elsewhere.
        min_keep: no layer keeps fewer filters.
        ignore: convs to leave alone, by name or pattern ("layer1.*").
        seed: decides every random choice here, whatever else the program draws.
        compact: "auto" makes the model itself compact at the last event, with the averages given as `ema=`. Other
            averages, and lists of tensors, keep the old shapes: PyTorch refuses their next update with a size mismatch,
            so make them anew after that event. "off" leaves all this to `finalize`.
        impl: what computes clustering, cut, coverage and draw, and gathers narrow weights: "auto", "reference" or
            "triton", see `ops.ward_network` and `pack.Pack`.
    Raises:
        RepruneError: if an option is out of its range.
    """

    sparsity: float | Mapping[str, float] | None = None
    flops: float | None = None
    every: int = 2
    until: int | None = None
    regrow: float = 0.3
    regrow_by: str = "residual"
    linkage: str = "ward"
    select: str = "coverage"
    tie: str = "random"
    round_to: int | None = None
    min_keep: int = 1
    ignore: tuple[str, ...] = ()
    seed: int = 0
    impl: str = "auto"
    compact: str = "off"

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.flops is None):
            raise RepruneError("give one of sparsity= (share of channels to prune) and flops= (share of FLOPs to keep)")
        if self.sparsity is not None:
            per_layer = self.sparsity if isinstance(self.sparsity, Mapping) else {"": self.sparsity}
            for name, value in per_layer.items():
                if not _is_number(value) or not 0 <= value < 1:
                    where = f" of {name}" if name else ""
                    raise RepruneError(f"sparsity{where} must be in [0, 1), the share to prune; got {value!r}")
        elif not _is_number(self.flops) or not 0 < self.flops <= 1:  # type: ignore[operator]
            raise RepruneError(f"flops must be in (0, 1], the share of FLOPs to keep; got {self.flops!r}")
        if self.until is None:
            raise RepruneError("until= is missing: the epoch of the last pruning event, about 72% of the epochs")
        for name, value, low in (
            ("every", self.every, 1), ("until", self.until, 1), ("min_keep", self.min_keep, 1), ("seed", self.seed, 0),
            ("round_to", 1 if self.round_to is None else self.round_to, 1),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise RepruneError(f"{name} must be a whole number of at least {low}; got {value!r}")
        if not _is_number(self.regrow) or not 0 <= self.regrow < 1:
            raise RepruneError(f"regrow must be in [0, 1); got {self.regrow!r}")
        for name, choice, known in (
            ("regrow_by", self.regrow_by, regrow.RULES), ("linkage", self.linkage, reference.LINKAGES),
            ("select", self.select, SELECTIONS), ("tie", self.tie, reference.TIES),
            ("impl", self.impl, problems.IMPLS), ("compact", self.compact, ("off", "auto")),
        ):  # fmt: skip
            if choice not in known:
                raise RepruneError(f"{name} must be one of {', '.join(known)}; got {choice!r}")
        object.__setattr__(self, "ignore", (self.ignore,) if isinstance(self.ignore, str) else tuple(self.ignore))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def matching(name: str, own: Mapping[str, float]) -> list[str]:
    """Return the patterns that fit a conv's name."""
    return [pattern for pattern in own if matches(name, (pattern,))]


def own_sparsity(name: str, own: Mapping[str, float]) -> float:
    """Return the sparsity of a conv by the first pattern that fits its name."""
    return own[matching(name, own)[0]]


def own_names(config: Config, prefixes: Sequence[str], model: nn.Module) -> Config:
    """Return the options with convs named as in `model`, without the prefixes that they have in wrappers around it."""

    def own(name: str) -> str:
        if not any(matches(other, (name,)) for other, _ in model.named_modules()):
            for prefix in prefixes:
                name = name.removeprefix(prefix)
        return name

    share = config.sparsity
    share = {own(name): value for name, value in share.items()} if isinstance(share, Mapping) else share
    return replace(config, ignore=tuple(own(name) for name in config.ignore), sparsity=share)
