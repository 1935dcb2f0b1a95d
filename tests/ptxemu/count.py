"""What one problem costs in each clustering kernel: warp instructions by line of the source, sectors and conflicts.

    cd tests && ../.venv/bin/python -m ptxemu.count --arch 90
"""

import argparse
from collections import Counter

import torch

from ptxemu import driver

CASES = [(512, 9, "auto"), (256, 9, "auto"), (64, 9, "auto"), (64, 9, "chain"), (512, 1, "auto"), (2048, 1, "auto")]
MEMORY = ("ld.global", "st.global", "atom.global")


def show(launch: driver.Launch, title: str, lines: int) -> None:
    """Print the totals of a launch, and its costliest lines."""
    counts = launch.counts
    classes = {row.kind for row in launch.profile}
    print(f"{title}: {launch.name}, {launch.instructions} warp instructions of {launch.threads} threads")
    print("  ", ", ".join(f"{kind} {counts[kind]}" for kind in sorted(classes, key=lambda k: -counts[k])))
    sectors = ", ".join(f"{kind} {counts[f'{kind} sectors']}" for kind in MEMORY)
    print(f"   sectors: {sectors}; bank conflicts: {counts['bank conflicts']}")
    costs: Counter[str] = Counter()
    for row in launch.profile:  # "ptx:7 inner.py:3 < kernel.py:20  `add.f32 ...": of the kernel itself
        costs[row.place.split("  `")[0].split(" ")[-1]] += row.executed
    for place, executed in costs.most_common(lines):
        print(f"   {place:24} {executed:9} {100 * executed / launch.instructions:5.1f}%")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=80, choices=(80, 90, 100))
    parser.add_argument("--lines", type=int, default=12, help="of each kernel, the costliest first")
    arguments = parser.parse_args()
    driver.activate(arguments.arch)
    driver.settings.count = True

    from reprune_triton import ops
    from reprune_triton.kernels.clustering import launch

    torch.manual_seed(0)
    for n, d, algorithm in CASES:
        k = int(d**0.5)
        launch.cluster(launch.prepare([ops.Layer(torch.randn(n, 1, k, k))], "ward", algorithm))
        show(driver.launches[-1], f"{n} filters of {d}, {algorithm}", arguments.lines)


if __name__ == "__main__":
    main()
