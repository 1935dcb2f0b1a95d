"""What the data say of a question: plain sentences, made from the rows so that they are never out of date."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from reprune_triton.bench import arms
from reprune_triton.bench.arms import Arm


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
        low, high = min(halves.values()), max(halves.values())
        width = f"±{low:.2f}" if len(halves) == 1 else f"±{low:.2f} to ±{high:.2f}"
        holds = "every other 95% interval holds zero" if alike else "every 95% interval holds zero"
        text = f"**No arm can be told from {base}**: {holds}. "
        return f"{text}The intervals are {width} points, so smaller differences would not show. {same}".rstrip()
    said = []
    for arm in apart:
        mean = statistics.mean(arm.differences)
        said.append(f"{arm.name} is {abs(mean):.2f} ± {halves[arm.name]:.2f} points {'above' if mean > 0 else 'below'}")
    text = f"**{'; '.join(said)} {base}** (95% interval, {min(len(arm.differences) for arm in apart)} seeds)."
    if len(apart) + len(alike) < len(paired):
        text += " The other intervals hold zero."
    if len(paired) > 1:
        text += (
            f" Of {len(paired)} such intervals at least one leaves out zero by chance in "
            f"{1 - 0.95 ** len(paired):.0%} of studies in which nothing differs."
        )
    return f"{text} {same}".rstrip()


def _accuracy(arm: Arm) -> float:
    return arm.mean(lambda row: row["accuracy"])


def _rank(name: str, found: Mapping[str, Arm]) -> str:
    better = sum(_accuracy(arm) > _accuracy(found[name]) for arm in found.values())
    order = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
    return f"{order[better]} of {len(found)}"


def _linkage(found: Mapping[str, Arm]) -> list[str]:
    said = []
    if "ward" in found:
        said.append(
            f"By its mean Ward comes {_rank('ward', found)}; the paper has it first, and gives no figures for the rest."
        )
        names = list(found["ward"].rows[0]["layers"])
        share = {
            arm.name: [statistics.mean(row["layers"][name] for row in arm.rows) for name in names]
            for arm in found.values()
        }
        ward = share["ward"]
        most, least = names[ward.index(max(ward))], names[ward.index(min(ward))]
        apart = max(abs(a - b) for other in share.values() for a, b in zip(other, ward, strict=True))
        said.append(
            f"`{most}` loses most of its channels ({max(ward):.0%}), `{least}` least ({min(ward):.0%}). The linkage "
            f"moves the share of a layer by {100 * apart:.0f} points at most: how many channels a layer loses is up to "
            "its BatchNorm scales, the linkage only chooses which."
        )
    return said


def _until(found: Mapping[str, Arm]) -> list[str]:
    best = max(found.values(), key=_accuracy)
    cost = {name: arm.mean(lambda row: row["training_flops"]) for name, arm in found.items()}
    low, high = min(cost, key=cost.__getitem__), max(cost, key=cost.__getitem__)
    return [
        f"The best mean is at {best.name} of the epochs; the paper's, on ImageNet, is at 72%.",
        f"What a longer schedule costs is sure: {cost[low]:.0%} of the dense training's multiply-adds at {low}, "
        f"{cost[high]:.0%} at {high}, as channels go later.",
    ]


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
            f"Two draws of the random rule share {again:.0%} of their filters, and another rule shares "
            f"{min(shares.values()):.0%} to {max(shares.values()):.0%} with it: which filters stay is chance as much "
            "as rule. The paper finds a small variation over seeds and a medium one over rules."
        )
    return said


def _paradigm(found: Mapping[str, Arm]) -> list[str]:
    if not {"concurrent", "three-stage"} <= set(found):
        return []
    cost = [found[name].mean(lambda row: row["training_flops"]) for name in ("concurrent", "three-stage")]
    ahead = "three stages" if _accuracy(found["three-stage"]) > _accuracy(found["concurrent"]) else "it"
    return [
        f"Three stages take {cost[1] / cost[0]:.1f} times the multiply-adds of pruning while training, for twice the "
        f"epochs. The paper has pruning while training 0.38 points ahead, at 3.4 points fewer FLOPs; here {ahead} "
        f"{'have' if ahead == 'three stages' else 'has'} the higher mean. How the paper fine-tunes is not given; here "
        "the learning rate starts anew, which is known to beat a low one (Renda et al., ICLR 2020)."
    ]


def _coverage(found: Mapping[str, Arm]) -> list[str]:
    said = []
    mean = {name: arm.mean(lambda row: statistics.mean(row["coverage"])) for name, arm in found.items()}
    if "coverage" in found:
        rows = found["coverage"].rows
        first, last = (statistics.mean(row["coverage"][at] for row in rows) for at in (0, -1))
        rising = sum(row["coverage"][-1] > row["coverage"][0] for row in rows)
        said.append(
            f"With the paper's selection coverage goes from {first:.0%} at the first event to {last:.0%} at the last, "
            f"and is higher there in {rising} of {len(rows)} runs: as in the paper, where it is over 90% late. Part of "
            "that is no merit: at the last events nearly all filters that are still active are kept."
        )
        others = {name: value for name, value in mean.items() if name != "coverage"}
        if others:
            best = max(others, key=others.__getitem__)
            most = "more than any other" if mean["coverage"] > others[best] else "less than another"
            said.append(
                f"Over all events greedy coverage covers {mean['coverage']:.1%}, {most} ({best}: {others[best]:.1%})."
            )
    return said


def _regrow(found: Mapping[str, Arm]) -> list[str]:
    if "0" not in found:
        return []
    base, none = next(arm for arm in found.values() if arm.baseline), found["0"]
    left = [arm.mean(lambda row: row["flops"]) for arm in (none, base)]
    cost = [arm.mean(lambda row: row["training_flops"]) for arm in (none, base)]
    return [
        f"At one sparsity {left[0]:.0%} of the FLOPs are left without regrowth, and {left[1]:.0%} with delta_0 = "
        f"{base.name}: without it what is pruned is gone for good, so the scales of the first epochs decide which "
        f"layers get narrow. The trainings take {cost[0]:.0%} and {cost[1]:.0%} of the dense one's multiply-adds."
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
    if {"REPrune", "thin from scratch"} <= set(found):
        cost = {name: found[name].mean(lambda row: row["training_flops"]) for name in ("REPrune", "thin from scratch")}
        said.append(
            f"By its mean REPrune comes {_rank('REPrune', found)}. A thin network from scratch is the peer that any "
            f"pruning must beat: its training takes {cost['thin from scratch']:.0%} of the dense one's multiply-adds, "
            f"REPrune's {cost['REPrune']:.0%}."
        )
    return said


SAYS: dict[str, Callable[[Mapping[str, Arm]], list[str]]] = {
    "linkage": _linkage, "until": _until, "random": _random, "paradigm": _paradigm, "coverage": _coverage,
    "regrow": _regrow, "width": _width, "baseline": _baseline,
}  # fmt: skip
