"""Estimate what an event would take on an H100: instructions of the machine code times measured rounds.

The estimate is the issue-bound floor: the time in which the GPU's schedulers could hand out all instructions, if each
handed out one in every cycle. It is computed, never measured on a GPU, and every row says so.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from reprune_triton import ops, reference
from reprune_triton.bench import event, rows
from reprune_triton.errors import RepruneError

# H100 SXM, from its data sheet; the clock is the boost clock, which a real run may not hold.
MULTIPROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.755e9
REGISTERS, WARPS, PROGRAMS = 65536, 64, 32  # of one multiprocessor
SAMPLED = 2  # problems per shape whose rounds are counted


class Loop(NamedTuple):
    """A loop of the machine code: the instructions of its body, without those of the loops inside it."""

    own: int
    inside: list[Loop]
    text: str  # its own instructions

    @property
    def turn(self) -> int:
        """Instructions of one turn, with one turn of each loop inside."""
        return self.own + sum(loop.turn for loop in self.inside)


class Part(NamedTuple):
    """One launch, or the share of a layer shape in it."""

    kernel: str
    shape: str
    programs: int
    instructions: float  # of all warps
    resident: int  # programs that fit in one multiprocessor at once

    @property
    def ms(self) -> float:
        return self.instructions / (MULTIPROCESSORS * SCHEDULERS * CLOCK) * 1e3


class Estimate(NamedTuple):
    """Issue-bound floor of an event on an H100."""

    parts: list[Part]

    @property
    def ms(self) -> float:
        return sum(part.ms for part in self.parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet50", help="a name of reprune_triton.models (default: resnet50)")
    parser.add_argument("--layers", default="prunable", choices=event.RULES, help="as for event (default: prunable)")
    parser.add_argument("--linkage", default="ward", choices=ops.LINKAGES)
    parser.add_argument("--algorithm", default="auto", choices=ops.ALGORITHMS)
    parser.add_argument("--target", default="sm_90", choices=("sm_80", "sm_90", "sm_100"), help="whose machine code")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--json", metavar="FILE", help="append the results to this file, one JSON row per line")
    parser.set_defaults(device="cpu", inputs=None)


def run(args: argparse.Namespace) -> None:
    layers = event.choose(args)
    found = estimate(layers, args.linkage, args.algorithm, args.target)
    settings: dict[str, Any] = rows.environment() | {
        "benchmark": "cost", "estimated": True, "model": args.model, "rule": args.layers, "linkage": args.linkage,
        "algorithm": args.algorithm, "target": args.target, "seed": args.seed,
        "assumed": f"{MULTIPROCESSORS} multiprocessors, {SCHEDULERS} instructions a cycle each, {CLOCK / 1e9} GHz",
    }  # fmt: skip
    table = Table(
        title=f"Estimated, not measured: clustering and cut of {args.model} on an H100 ({args.linkage})",
        caption=f"Instructions of the machine code for {args.target} times rounds counted on the CPU, if every "
        f"scheduler issued in every cycle ({settings['assumed']}). Memory, barriers and launches come on top.",
    )
    for column in ("kernel", "layers", "problems", "M instructions", "programs at once", "estimated ms"):
        table.add_column(column, justify="left" if column in ("kernel", "layers") else "right")
    for part in found.parts:
        at_once = min(part.programs, part.resident * MULTIPROCESSORS)
        cells = (f"{part.programs:,}", f"{part.instructions / 1e6:.1f}", f"{at_once:,}", f"{part.ms:.3f}")
        table.add_row(part.kernel, part.shape, *cells)
        if args.json:
            figures = {"estimated_ms": part.ms, "warp_instructions": part.instructions, "problems": part.programs}
            rows.append(args.json, settings | {"row": part.kernel, "shape": part.shape} | figures)
    table.add_section()
    instructions = sum(part.instructions for part in found.parts)
    problems = sum(layer.columns for layer in layers)
    table.add_row("total", f"{len(layers)}", f"{problems:,}", f"{instructions / 1e6:.1f}", "", f"{found.ms:.3f}")
    if args.json:
        figures = {"estimated_ms": found.ms, "warp_instructions": instructions, "problems": problems}
        rows.append(args.json, settings | {"row": "total", "layers": len(layers)} | figures)
    Console(width=140).print(table)


def estimate(
    layers: Sequence[ops.Layer], linkage: str = "ward", algorithm: str = "auto", target: str = "sm_90"
) -> Estimate:
    """The issue-bound floor of `ops.cluster_network` on an H100, by launch and shape of the layers.

    Rounds are counted on the weights of the first layer of every shape.
    Raises RepruneError if the machine code does not have the loops that are expected.
    """
    from reprune_triton.kernels import launch

    shapes: dict[tuple[int, int], list[ops.Layer]] = {}
    for layer in layers:
        shapes.setdefault((layer.n, layer.d), []).append(layer)
    filters, problems = sum(layer.n for layer in layers), sum(layer.columns for layer in layers)
    filter_size = np.mean([layer.columns * layer.d for layer in layers for _ in range(layer.n)])

    parts = [_part(launch.MAGNITUDE, target, "all", filters, lambda code: _magnitude(code, float(filter_size)))]
    for (n, d), some in sorted(shapes.items(), key=lambda item: (-item[0][1], -item[0][0])):
        config = launch.configuration(n, d, linkage, algorithm)
        points = some[0].points()[:SAMPLED].double()
        name = config.kernel.__name__
        constants: dict[str, Any] = dict(config.constants)
        instructions: Callable[[Code], float]
        if name == "reciprocal_kernel":
            instructions = functools.partial(_reciprocal, rounds=count_rounds(points), n=n, d=d, **constants)
        elif name == "line_kernel":
            instructions = functools.partial(_line, rounds=count_line_rounds(points), BLOCK=constants["BLOCK"])
        else:
            instructions = functools.partial(_chain, n=n, d=d, **constants)
        columns = sum(layer.columns for layer in some)
        parts.append(_part(config, target, f"{len(some)} of n {n}, d {d}", columns, instructions))
    mean_n = float(np.mean([layer.n for layer in layers for _ in range(layer.columns)]))
    parts.append(_part(launch.LEVEL, target, "all", problems, lambda code: _level(code, mean_n)))
    parts.append(_part(launch.LABEL, target, "all", problems, lambda code: _label(code, mean_n)))
    return Estimate(parts)


# Machine code


class Code(NamedTuple):
    """A kernel's instructions: those outside of all loops, and the loops in their order."""

    once: int
    loops: list[Loop]


def parse(lines: Sequence[str]) -> Code:
    """Loops are what branches back: from the label to the last branch to it."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = len(code)
        else:
            code.append(line)
    ends: dict[int, int] = {}
    for at, line in enumerate(code):
        target = re.search(r"^BRA\b.*?(\.L_x_\d+)", line)
        begin = labels.get(target[1], at + 1) if target else at + 1
        if begin < at:  # the branch to itself behind the last instruction is no loop
            ends[begin] = max(ends.get(begin, 0), at)
    spans = sorted(ends.items(), key=lambda span: (span[0], -span[1]))

    def inside(begin: int, end: int) -> tuple[list[Loop], list[str]]:
        found, own, at = [], [], begin
        for low, high in spans:
            if low >= at and high <= end and (low, high) != (begin, end):
                own += code[at:low]
                loops, text = inside(low, high)
                found.append(Loop(len(text), loops, "\n".join(text)))
                at = high + 1
        return found, own + code[at : end + 1]

    loops, text = inside(0, len(code) - 1)
    return Code(len(text), loops)


@functools.cache
def _compiled(config: Any, target: str) -> tuple[Code, int]:
    """The code, and how many programs of it fit in one multiprocessor."""
    from reprune_triton.kernels import compiled

    built = compiled.build(config, target)
    used = compiled.resources(built)
    of_registers = REGISTERS // (-(-used.registers // 8) * 8 * 32 * config.warps)
    return parse(compiled.machine_code(built)), min(of_registers, WARPS // config.warps, PROGRAMS)


def _part(config: Any, target: str, shape: str, programs: int, instructions: Callable[[Code], float]) -> Part:
    code, resident = _compiled(config, target)
    constants = ", ".join(f"{name} {value}" for name, value in config.constants)
    name = f"{config.kernel.__name__.removesuffix('_kernel')} ({constants}; {config.warps} warps)"
    return Part(name, shape, programs, programs * config.warps * instructions(code), resident)


def _expect(condition: bool, kernel: str) -> None:
    if not condition:
        raise RepruneError(f"the machine code of {kernel} does not have the loops that bench/cost.py knows; mend it.")


# Instructions of one warp of one program. Loops over the coordinates of a point, which the compiler may unroll in
# several ways, count as their shortest version, once for every coordinate.


def _coordinates(loops: Sequence[Loop], d: int) -> float:
    return d * min((loop.turn for loop in loops), default=0)


def _blocks(count: float, block: int) -> float:
    return -(-count // block)


def _reciprocal(
    code: Code, rounds: Sequence[Sequence[tuple[int, int]]], n: int, d: int, D: int, ROWS: int, COLS: int, BLOCK: int
) -> float:
    """rounds: for every sampled problem (stale, live) clusters of every round."""
    _expect(len(code.loops) >= 2, "reciprocal")
    load, turns = code.loops[0], code.loops[-1]
    kinds = [any("MUFU.RSQ" in part.text for part in (loop, *loop.inside)) for loop in turns.inside]
    _expect(kinds.count(True) == 1 and len(kinds) >= 3, "reciprocal")
    search = turns.inside[kinds.index(True)]
    tile = next((loop for loop in search.inside if "MUFU.RSQ" in loop.text), None)
    passes = sorted(turns.inside[kinds.index(True) + 1 :], key=lambda loop: -loop.own)[:2]  # merge and renumber
    _expect(tile is not None and len(passes) == 2 and all("STG" in loop.text for loop in passes), "reciprocal")
    assert tile is not None
    tile_cost = tile.own + (_coordinates(tile.inside, d) if D == 0 else 0)
    merge, renumber = passes
    total = code.once + _blocks(n, BLOCK) * (load.own + _coordinates(load.inside, d))
    for problem in rounds:
        for stale, live in problem:
            total += (
                turns.own
                + _blocks(stale, ROWS) * (search.own + _blocks(live, COLS) * tile_cost)
                + _blocks(live, BLOCK) * (merge.own + _coordinates(merge.inside, d) + renumber.own)
            ) / len(rounds)
    return total


def _line(code: Code, rounds: Sequence[Sequence[int]], BLOCK: int) -> float:
    """rounds: for every sampled problem the live clusters of every round."""
    turns = [loop for loop in code.loops if any("MUFU.RSQ" in part.text for part in (loop, *loop.inside))]
    _expect(len(turns) == 1 and len(turns[0].inside) == 1, "line")
    turn, block = turns[0], turns[0].inside[0]
    total = float(code.once)
    for problem in rounds:
        total += sum(turn.own + _blocks(live, BLOCK) * block.turn for live in problem) / len(rounds)
    return total


def _chain(code: Code, n: int, d: int, LINKAGE: int, D: int, BLOCK: int) -> float:
    """At most: 3 n searches, each as long as one that ends in a merge."""
    _expect(len(code.loops) >= 2, "chain")
    blocks = _blocks(n, BLOCK)
    load, turns = code.loops[0], code.loops[-1]
    total = code.once + blocks * (load.own + _coordinates(load.inside, d))
    _expect(len(turns.inside) >= (1 if LINKAGE == 0 else 2), "chain")
    search = turns.inside[0]
    total += 3 * n * (turns.own + blocks * (search.own + _coordinates(search.inside, d)))
    if LINKAGE != 0:
        merge, distances = turns.inside[-1], code.loops[1]
        _expect(len(distances.inside) >= 1, "chain")
        of_block = distances.inside[0]
        total += n * blocks * merge.turn
        total += n * (distances.own + blocks * (of_block.own + _coordinates(of_block.inside, d)))
    return total


def _magnitude(code: Code, filter_size: float) -> float:
    _expect(len(code.loops) == 1, "magnitude")
    return code.once + _blocks(filter_size, 1024) * code.loops[0].turn


def _level(code: Code, n: float) -> float:
    _expect(len(code.loops) == 1 and len(code.loops[0].inside) == 1, "level")
    halving = code.loops[0]
    return code.once + 31 * (halving.own + _blocks(n, 128) * halving.inside[0].turn)


def _label(code: Code, n: float) -> float:
    """Climbing takes as many steps as the longest path under the cut; the binary logarithm of n stands in."""
    _expect(len(code.loops) == 2 and len(code.loops[1].inside) == 1, "label")
    roots, climb = code.loops
    return code.once + _blocks(n, 128) * (roots.turn + climb.own + np.log2(max(n, 2)) * climb.inside[0].turn)


# Rounds, counted on the CPU


def count_rounds(points: torch.Tensor) -> list[list[tuple[int, int]]]:
    """For every problem of points (P, n, d): stale and live clusters in every round of reciprocal merging.

    The reference has the kernel's rules, so it makes the same rounds.
    """
    found: list[list[tuple[int, int]]] = []

    class Counted(reference.Means):
        def nearest(self, some: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if some.shape[1]:  # the reference looks for copies first, and if there are none searches for nothing
                found[-1].append((some.shape[1], self.size.shape[1]))
            return super().nearest(some)

    with mock.patch.object(reference, "Means", Counted):
        for problem in points.double():
            found.append([])
            reference.reciprocal_pairs(problem[None], "ward")
    return found


def count_line_rounds(points: torch.Tensor) -> list[list[int]]:
    """For every problem of points (P, n, 1): live clusters in every round of merging adjacent local minima."""
    found = []
    for problem in points.double():
        mean, size, live = np.sort(problem.squeeze(1).numpy()), np.ones(len(problem)), []
        while len(mean) > 1:
            live.append(len(mean))
            gap = np.diff(mean) ** 2 / (1 / size[:-1] + 1 / size[1:])
            left, right = np.append(np.inf, gap[:-1]), np.append(gap[1:], np.inf)
            even = np.arange(len(gap)) % 2 == 0
            first = ((gap < left) | ((gap == left) & even)) & ((gap < right) | ((gap == right) & even))
            i = first.nonzero()[0]
            mean[i] += size[i + 1] / (size[i] + size[i + 1]) * (mean[i + 1] - mean[i])
            size[i] += size[i + 1]
            mean, size = np.delete(mean, i + 1), np.delete(size, i + 1)
        found.append(live)
    return found
