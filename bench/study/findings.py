"""What the data say of a question: plain sentences, made from the rows so that they are never out of date."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from reprune_triton.bench.study import arms
from reprune_triton.bench.study.arms import Arm


def verdict(found: Sequence[Arm]) -> str:
    """Which arms can be told from the baseline, and how small a difference could be seen."""
    (base,) = (arm.name for arm in found if arm.baseline)
    paired = [arm for arm in found if len(arm.differences) > 2]
    if not paired:
        return "With fewer than three seeds an arm there is no telling how much of a difference is chance."
    halves = {arm.name: arms.half_width(arm.differences) for arm in paired}
    apart = [arm for arm in paired if arm.apart]
    # Accuracy comes in steps of one test image: a few seeds may have the same difference by chance.
    alike = [arm for arm in paired if halves[arm.name] == 0 and any(arm.differences)]
    same = " ".join(
        f"{arm.name} differs by {arm.differences[0]:+.2f} points in every seed: there is no spread to judge that by."
        for arm in alike
    )
    if not apart:
        holds = "every other 95% interval holds zero" if alike else "every 95% interval holds zero"
        text = f"**No arm can be told from {base}**: {holds}."
        widths = sorted(half for half in halves.values() if half)
        if widths:
            width = f"±{widths[0]:.2f}" + (f" to ±{widths[-1]:.2f}" if len(widths) > 1 else "")
            text += f" The intervals are {width} points: differences of that size may well go unseen."
        return f"{text} {same}".rstrip()
    said = []
    for arm in apart:
        mean = statistics.mean(arm.differences)
        said.append(f"{arm.name} is {abs(mean):.2f} ± {halves[arm.name]:.2f} points {'above' if mean > 0 else 'below'}")
    text = f"**{'; '.join(said)} {base}** (95% interval, {min(len(arm.differences) for arm in apart)} seeds)."
    if len(apart) + len(alike) < len(paired):
        text += " The other intervals hold zero."
    if len(paired) > 1:
        text += (
            f" Of {len(paired)} such intervals at least one leaves out zero by chance in up to "
            f"{1 - 0.95 ** len(paired):.0%} of studies in which nothing differs."
        )
    return f"{text} {same}".rstrip()


def _accuracy(arm: Arm) -> float:
    return round(arm.mean(lambda row: row["accuracy"]), 9)  # equal counts of right images are equal


def _rank(name: str, found: Mapping[str, Arm]) -> str:
    """Of the arms by their mean accuracy."""
    order = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
    better = sum(_accuracy(arm) > _accuracy(found[name]) for arm in found.values())
    level = [arm.name for arm in found.values() if _accuracy(arm) == _accuracy(found[name]) and arm.name != name]
    return f"{order[better]}{f', level with {_and(level)},' if level else ''} of {len(found)}"


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _linkage(found: Mapping[str, Arm]) -> list[str]:
    if "ward" not in found:
        return []
    own = found["ward"].rows
    names = list(own[0]["layers"])
    share = {
        arm.name: [statistics.mean(row["layers"][name] for row in arm.rows) for name in names] for arm in found.values()
    }
    ward = share["ward"]
    most, least = names[ward.index(max(ward))], names[ward.index(min(ward))]
    apart = max(abs(a - b) for other in share.values() for a, b in zip(other, ward, strict=True))
    seeds = max(max(row["layers"][name] for row in own) - min(row["layers"][name] for row in own) for name in names)
    return [
        f"By its mean Ward comes {_rank('ward', found)}; the paper has it first, and gives no figures for the rest.",
        f"`{most}` loses most of its channels ({max(ward):.0%}), `{least}` least ({min(ward):.0%}). From linkage to "
        f"linkage the mean share of a layer differs by {100 * apart:.0f} points at most, and from seed to seed of Ward "
        f"alone by {100 * seeds:.0f}: how many channels a layer loses is up to its BatchNorm scales, not to the "
        "linkage.",
    ]


def _until(found: Mapping[str, Arm]) -> list[str]:
    top = max(map(_accuracy, found.values()))
    best = [arm.name for arm in found.values() if _accuracy(arm) == top]
    where = f"The best mean is at {best[0]} of the epochs" if len(best) == 1 else f"{_and(best)} share the best mean"
    said = [f"{where}; the paper's best, on ImageNet, is 72%."]
    known = {name: arm for name, arm in found.items() if arm.has("training_flops")}
    cost = {name: arm.mean(lambda row: row["training_flops"]) for name, arm in known.items()}
    if len(cost) > 1:
        low, high = min(cost, key=cost.__getitem__), max(cost, key=cost.__getitem__)
        said.append(
            f"What a longer schedule costs is sure: {cost[low]:.0%} of the dense training's multiply-adds at {low}, "
            f"{cost[high]:.0%} at {high}, as channels go later."
        )
    if "100%" in found:
        said.append("At 100% the last event comes after the last epoch, so nothing is trained after it.")
    return said


def _random(found: Mapping[str, Arm]) -> list[str]:
    said = []
    spreads = {arm.name: 100 * statistics.stdev([row["accuracy"] for row in arm.rows])
               for arm in found.values() if len(arm.rows) > 1}  # fmt: skip
    if spreads:
        said.append(
            f"Over the seeds accuracy has a standard deviation of {min(spreads.values()):.2f} to "
            f"{max(spreads.values()):.2f} points, whatever the rule."
        )
    shares = {arm.name: statistics.mean(arm.overlaps) for arm in found.values() if arm.overlaps}
    again = shares.pop("random, another draw", None)
    if again is not None and shares:
        said.append(
            f"Another draw, which is also one of what grows back, leaves {again:.0%} of the filters in common; another "
            f"rule, with the same draws of what grows back, {min(shares.values()):.0%} to {max(shares.values()):.0%}. "
            "The paper finds a small variation over seeds and a medium one over rules."
        )
    return said


def _paradigm(found: Mapping[str, Arm]) -> list[str]:
    if not {"concurrent", "three-stage"} <= set(found):
        return []
    cost = [found[name].mean(lambda row: row["training_flops"]) for name in ("concurrent", "three-stage")]
    three, one = (_accuracy(found[name]) for name in ("three-stage", "concurrent"))
    ahead = "three stages have" if three > one else "it has"
    here = "the means are equal" if three == one else f"{ahead} the higher mean"
    return [
        f"Three stages take {cost[1] / cost[0]:.1f} times the multiply-adds of pruning while training, for twice the "
        f"epochs. The paper has pruning while training 0.38 points ahead, at 3.4 points fewer FLOPs; here {here}. "
        "How the paper fine-tunes is not given; here the learning rate starts anew, which is known to beat a low one "
        "(Renda et al., ICLR 2020)."
    ]


def _coverage(found: Mapping[str, Arm]) -> list[str]:
    if "coverage" not in found:
        return []
    rows = found["coverage"].rows
    first = {name: arm.mean(lambda row: row["coverage"][0]) for name, arm in found.items()}
    last = {name: arm.mean(lambda row: row["coverage"][-1]) for name, arm in found.items()}
    rising = sum(row["coverage"][-1] > row["coverage"][0] for row in rows)
    said = [
        f"With the paper's selection coverage goes from {first['coverage']:.0%} at the first event to "
        f"{last['coverage']:.0%} at the last, and is higher there in {rising} of {len(rows)} runs; the paper has it "
        "rise, to over 90% late."
    ]
    others = [name for name in found if name != "coverage"]
    if others:
        began, ended = (
            " to ".join(dict.fromkeys(f"{pick(rates[name] for name in others):.0%}" for pick in (min, max)))
            for rates in (first, last)
        )
        more = 100 * (first["coverage"] - max(first[name] for name in others))
        said.append(
            f"But it rises with any selection, with the others from {began} to {ended}: the later the event, the fewer "
            "of the active filters have to go. What the choice itself gives shows at the first event: "
            f"{more:+.1f} points over the next best there."
        )
    return said


def _regrow(found: Mapping[str, Arm]) -> list[str]:
    if "0" not in found:
        return []
    base, none = next(arm for arm in found.values() if arm.baseline), found["0"]
    if not (base.has("training_flops") and none.has("training_flops")):
        return []
    left = [arm.mean(lambda row: row["flops"]) for arm in (none, base)]
    cost = [arm.mean(lambda row: row["training_flops"]) for arm in (none, base)]
    return [
        f"At one sparsity {left[0]:.0%} of the FLOPs are left without regrowth, and {left[1]:.0%} with delta_0 = "
        f"{base.name}: without it the first event prunes all that is to go, so the scales of the first epochs decide "
        f"which layers get narrow. The trainings take {cost[0]:.0%} and {cost[1]:.0%} of the dense one's multiply-adds."
    ]


def _width(found: Mapping[str, Arm]) -> list[str]:
    left = {name: arm.mean(lambda row: row["flops"]) for name, arm in found.items()}
    said = "; ".join(f"multiples of {name} leave {share:.0%}" for name, share in left.items())
    return [
        f"What rounding costs is FLOPs: {said}. The stages of these networks have 16, 32 and 64 channels, so that in "
        "multiples of 16 the first cannot get narrower, nor the second in multiples of 32; networks for ImageNet are "
        "wider."
    ]


def _baseline(found: Mapping[str, Arm]) -> list[str]:
    said = []
    found = {name: arm for name, arm in found.items() if name != "dense"}  # which has all FLOPs
    if {"REPrune", "thin from scratch"} <= set(found):
        cost = {name: found[name].mean(lambda row: row["training_flops"]) for name in ("REPrune", "thin from scratch")}
        said.append(
            f"By its mean REPrune comes {_rank('REPrune', found)} at these FLOPs. A thin network from scratch is the "
            f"peer that any pruning must beat: its training takes {cost['thin from scratch']:.0%} of the dense one's "
            f"multiply-adds, REPrune's {cost['REPrune']:.0%}."
        )
    return said


SAYS: dict[str, Callable[[Mapping[str, Arm]], list[str]]] = {
    "linkage": _linkage, "until": _until, "random": _random, "paradigm": _paradigm, "coverage": _coverage,
    "regrow": _regrow, "width": _width, "baseline": _baseline,
}  # fmt: skip
