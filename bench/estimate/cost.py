"""Estimate what an event would take on an H100: instructions of the machine code times rounds counted on the CPU.

The estimate is the issue-bound floor: the time in which the GPU's schedulers could hand out all instructions, if each
handed out one in every cycle. It is computed, never measured on a GPU, and every row says so.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import networkx as nx
import numpy as np
import torch
import triton

from reprune_triton import ops
from reprune_triton.bench import networks, rows, terminal
from reprune_triton.errors import RepruneError
from reprune_triton.selection import reference

# H100 SXM, from its data sheet; the clock is the boost clock, which a real run may not hold.
MULTIPROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.755e9
SAMPLED = 2  # problems per shape whose rounds are counted
KEPT = 0.5  # of the filters, where the cut is taken whose climbing is counted


class Loop(NamedTuple):
    """A natural loop of the machine code. Its counts leave out the loops inside it."""

    own: int  # instructions of the body
    least: int  # ... on the shortest way through it, which leaves out what a branch can skip
    inside: list[Loop]
    text: list[str]  # the body, without predicates

    def count(self, name: str) -> int:
        """Return the number of instructions whose name begins so."""
        return sum(line.startswith(name) for line in self.text)

    def has(self, name: str) -> bool:
        return self.count(name) > 0 or any(loop.has(name) for loop in self.inside)


class Code(NamedTuple):
    """A kernel's instructions: those outside of all loops, and the loops in their order."""

    once: int
    loops: list[Loop]


class Part(NamedTuple):
    """One launch, or the share of a layer shape in it."""

    kernel: str  # with its configuration
    shape: str
    problems: int  # programs; of magnitude, one for each filter
    instructions: float  # of all warps

    @property
    def ms(self) -> float:
        """The issue-bound floor on an H100."""
        return self.instructions / (MULTIPROCESSORS * SCHEDULERS * CLOCK) * 1e3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    terminal.add_options(parser, "model linkage algorithm seed")
    parser.add_argument("--layers", default="prunable", choices=networks.RULES, help="as for event (default: prunable)")
    parser.add_argument("--target", default="sm_90", choices=("sm_80", "sm_90", "sm_100"), help="whose machine code")
    parser.set_defaults(device="cpu", inputs=None)


def run(args: argparse.Namespace) -> None:
    if args.algorithm == "reciprocal" and args.linkage != "ward":
        raise RepruneError(f'--algorithm reciprocal is for Ward; for --linkage {args.linkage} use "auto" or "chain".')
    layers = networks.choose(args)
    found = estimate(layers, args.linkage, args.algorithm, args.target)
    settings: dict[str, Any] = rows.environment() | {
        "benchmark": "cost", "estimated": True, "model": args.model, "rule": args.layers, "linkage": args.linkage,
        "algorithm": args.algorithm, "target": args.target, "seed": args.seed,
        "assumed": f"{MULTIPROCESSORS} multiprocessors, {SCHEDULERS} instructions a cycle each, {CLOCK / 1e9} GHz",
    }  # fmt: skip
    table = terminal.table(
        f"Estimated, not measured: clustering and cut of {args.model} on an H100 ({args.linkage})",
        ("kernel", "layers", "problems", "M instructions", "estimated ms"), ("kernel", "layers"),
        f"Instructions of the machine code for {args.target} times rounds counted on the CPU, if every "
        f"scheduler issued in every cycle ({settings['assumed']}). Memory, barriers and launches come on top, and a "
        "launch of few problems does not fill the GPU.",
    )  # fmt: skip
    total = Part("total", str(len(layers)), sum(layer.problems for layer in layers), sum(x.instructions for x in found))
    for part in [*found, total]:
        figures = {"estimated_ms": part.ms, "warp_instructions": part.instructions, "problems": part.problems}
        about = {"layers": len(layers)} if part is total else {"shape": part.shape}
        rows.append(args.json, settings | {"row": part.kernel} | about | figures)
        cells = (f"{part.problems:,}", f"{part.instructions / 1e6:.1f}", f"{part.ms:.3f}")
        table.add_row(part.kernel, part.shape, *cells, end_section=part is found[-1])
    terminal.console(160).print(table)


def estimate(
    layers: Sequence[ops.Layer], linkage: str = "ward", algorithm: str = "auto", target: str = "sm_90"
) -> list[Part]:
    """Estimate the issue-bound floor of `ops.cluster_network` on an H100, by launch and shape of the layers.

    Rounds are counted on the weights of the first layer of every shape.

    Raises:
        RepruneError: if the machine code does not have the loops that are expected.
    """
    from reprune_triton.kernels.clustering import launch

    shapes: dict[tuple[int, int], list[ops.Layer]] = {}
    for layer in layers:
        shapes.setdefault((layer.n, layer.d), []).append(layer)
    ordered = sorted(shapes.items(), key=lambda item: (-item[0][1], -item[0][0]))
    configs = [launch.configuration(n, d, linkage, algorithm) for (n, d), _ in ordered]
    compiled = _compiled([launch.MAGNITUDE, *configs, launch.CUT_HEIGHT, launch.LABEL], target)

    def part(config: Any, shape: str, pairs: Sequence[tuple[int, float]]) -> Part:
        """pairs: (problems, instructions of one warp of each) of the programs that are alike."""
        constants = ", ".join(f"{name} {value}" for name, value in config.constants)
        name = f"{config.kernel.__name__.removesuffix('_kernel')} ({constants}; {config.warps} warps)"
        total = config.warps * sum(count * each for count, each in pairs)
        return Part(name, shape, sum(count for count, _ in pairs), total)

    samples = {shape: _sample(some[0], linkage, config) for (shape, some), config in zip(ordered, configs, strict=True)}
    columns = {shape: sum(layer.problems for layer in some) for shape, some in ordered}
    fixed = launch.MAGNITUDE, launch.CUT_HEIGHT, launch.LABEL
    magnitude, cut_height, label = (compiled[config] for config in fixed)
    filters = [(layer.n, _magnitude(magnitude, layer.problems * layer.d, **dict(launch.MAGNITUDE.constants)))
               for layer in layers]  # fmt: skip
    parts = [part(launch.MAGNITUDE, "all", filters)]
    for (shape, some), config in zip(ordered, configs, strict=True):
        of_kernel: dict[str, Callable[..., float]]
        of_kernel = {"reciprocal_kernel": _reciprocal, "line_kernel": _line, "chain_kernel": _chain}
        n, d = shape
        count = of_kernel[config.kernel.__name__]
        each = count(compiled[config], work=samples[shape].work, n=n, d=d, **dict(config.constants))
        parts.append(part(config, f"{len(some)} of n {n}, d {d}", [(columns[shape], each)]))
    block = dict(launch.CUT_HEIGHT.constants)
    heights = [(count, _cut_height(cut_height, n, **block)) for (n, _), count in columns.items()]
    labels = [(count, _label(label, samples[shape].climbs)) for shape, count in columns.items()]
    return [*parts, part(launch.CUT_HEIGHT, "all", heights), part(launch.LABEL, "all", labels)]


# Machine code


def parse(lines: Sequence[str]) -> Code:
    """Find the natural loops: what leads back to a branch's target without leaving what the target dominates.

    Warps are taken to be converged and divisions to be short: ways out of line (BRA.DIV, CALL) are never followed.
    """
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = len(code)
        else:
            code.append(line)
    after: list[list[int]] = []  # instructions that may follow each
    for at, line in enumerate(code):
        predicate, name, rest = re.fullmatch(r"(@!?U?PT?\w*\s+)?(\S+)\s*(.*)", line).groups()  # type: ignore[union-attr]
        always = predicate is None and not re.match(r"!?U?P\d", rest)
        if name == "BRA.DIV":
            follow = [at + 1]
        elif name.startswith("BRA") or (name.startswith("CALL") and "`(.L_x_" in rest):  # such a call is a branch
            label = re.search(r"\.L_x_\d+", rest)
            if label is None or label[0] not in labels:
                raise RepruneError(f"a branch of the machine code leads to no label: {line}")
            follow = [labels[label[0]]] + ([] if always else [at + 1])
        elif name.startswith(("EXIT", "RET", "CALL")):
            follow = [at + 1] if not always else []
        elif name.startswith(("BRX", "JMP", "JMX", "BREAK")):
            raise RepruneError(f"the machine code has a jump that cost.py does not know: {line}")
        else:
            follow = [at + 1]
        after.append([there for there in follow if there < len(code)])
    return Code(*_loops(code, after))


def _loops(code: Sequence[str], after: Sequence[Sequence[int]]) -> tuple[int, list[Loop]]:
    """Return how many instructions are outside of all loops, and the outermost loops in their order."""
    flow = nx.DiGraph([(at, there) for at, follow in enumerate(after) for there in follow])
    flow.add_node(0)
    flow = nx.DiGraph(flow.subgraph({0} | nx.descendants(flow, 0)))  # what is never reached does not count
    dominators = nx.immediate_dominators(flow, 0)
    tree = nx.DiGraph([(above, at) for at, above in dominators.items() if above not in (None, at)])
    tree.add_nodes_from(flow)

    bodies: dict[int, set[int]] = {}  # by the head of the loop
    ahead = flow.copy()  # without the edges that lead back
    for head in (at for at in sorted(flow) if at == 0 or flow.in_degree(at) > 1):
        dominated = nx.descendants(tree, head)
        tails = [tail for tail in flow.predecessors(head) if tail == head or tail in dominated]
        inner = flow.subgraph(dominated)
        if tails:
            bodies[head] = {head}.union(tails, *(nx.ancestors(inner, tail) for tail in tails if tail != head))
            ahead.remove_edges_from((tail, head) for tail in tails)
    if not nx.is_directed_acyclic_graph(ahead):
        raise RepruneError("the machine code has a loop that is entered in the middle; mend cost.py.")

    def inside(body: set[int]) -> list[Loop]:
        """Return the outermost loops within the body, in their order."""
        found = {head: own for head, own in bodies.items() if own < body}
        return [loop(head) for head in sorted(found) if not any(found[head] < own for own in found.values())]

    def loop(head: int) -> Loop:
        body = bodies[head]
        nested = set().union(*(own for own in bodies.values() if own < body))
        text = [re.sub(r"^@\S+\s+", "", code[at]) for at in sorted(body - nested)]
        # From the head back to it; loops inside are for free.
        own = flow.subgraph(body)
        far = nx.single_source_dijkstra_path_length(own, head, weight=lambda _, at, __: at not in nested)
        shortest = 1 + min(far[tail] for tail in own.predecessors(head))
        return Loop(len(text), shortest, inside(body), text)

    return len(flow) - len(set().union(*bodies.values())), inside(set(flow) | {-1})


_known: dict[tuple[Any, str], Code] = {}


def _compiled(configs: Sequence[Any], target: str) -> dict[Any, Code]:
    """Compile each configuration once."""
    for config in configs:
        if (config, target) not in _known:
            _known[config, target] = parse(machine_code(config, target))
    return {config: _known[config, target] for config in configs}


def machine_code(config: Any, target: str) -> list[str]:
    """Compile and disassemble; return instructions with their predicates, and labels as 'LABEL:'.

    `compiled.machine_codes` leaves out the predicates, by which branches are told apart.
    """
    from reprune_triton.kernels import compiled, probe

    if probe.INTERPRETED:
        raise RepruneError("Triton interprets kernels in this process: unset TRITON_INTERPRET to compile them")
    built = compiled.build(config, target)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^(\.L_x_\d+:)|^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", text, re.M)
    return [label or instruction for label, instruction in found]


# Instructions of one warp of one program


def _expect(condition: bool, kernel: str) -> None:
    if not condition:
        raise RepruneError(f"the machine code of {kernel} does not have the loops that cost.py knows; mend it.")


def _blocks(count: float, block: int) -> int:
    return -int(-count // block)


def _coordinates(loops: Sequence[Loop], d: int, kernel: str) -> float:
    """Count instructions of loops over the coordinates of a point.

    There is a loop with arithmetic, one that only moves, or both, where threads part. Each may come unrolled, with a
    second loop for what is left over.
    """
    _expect(0 < len(loops) <= 4 and not any(loop.inside for loop in loops), kernel)
    total = 0.0
    for arithmetic in (True, False):
        some = sorted((loop for loop in loops if loop.has("FFMA") is arithmetic), key=lambda loop: loop.own)
        _expect(len(some) <= 2, kernel)
        if len(some) == 2:
            name = "FFMA" if arithmetic else "STG"
            single, unrolled = (loop.count(name) for loop in some)
            _expect(single > 0 and unrolled > single and unrolled % single == 0, kernel)
            times = unrolled // single
            total += d // times * some[1].own + d % times * some[0].own
        elif some:
            total += d * some[0].least  # the read of float32 is the shortest of its branches
    return total


def _reciprocal(
    code: Code, work: Sequence[Sequence[tuple[int, int]]], n: int, d: int, D: int, ROWS: int, COLS: int, BLOCK: int
) -> float:
    """Count instructions; work: for every sampled problem the (stale, live) clusters of every round without copies."""
    name = "reciprocal"
    _expect(len(code.loops) == 2 and code.loops[0].has("STG"), name)
    load, turn = code.loops
    searches = [loop for loop in turn.inside if loop.has("MUFU.RSQ")]
    passes = [loop for loop in turn.inside if loop.has("SHFL") and loop not in searches]  # these number survivors
    others = [loop for loop in turn.inside if loop not in [*searches, *passes]]
    pads = [loop for loop in others if not loop.has("LDG")]
    _expect(len(searches) == 1 and len(searches[0].inside) == 1 and len(passes) == 2, name)
    _expect(len(others) == len(pads) + 1, name)  # the last one is of rounds with copies
    (search,), (tile,), (merge, renumber) = searches, searches[0].inside, passes
    _expect(tile.has("MUFU.RSQ") and bool(tile.inside) is (D == 0) and tile.count("FFMA") >= D, name)
    _expect(merge.count("STG") > 0 and bool(merge.inside) and renumber.count("STG") > 0 and not renumber.inside, name)
    of_tile = tile.own + (_coordinates(tile.inside, d, name) if D == 0 else 0)
    # Clusters that merge and clusters that stay go separate ways, and a warp that has both goes both.
    leads = [loop for loop in merge.inside if loop.has("FFMA")]
    lead = _coordinates(leads, d, name)
    stay = _coordinates([loop for loop in merge.inside if loop not in leads], d, name)
    pad = _coordinates(pads, d, name)
    total = code.once + _blocks(n, BLOCK) * (load.own + _coordinates(load.inside, d, name))
    for problem in work:
        for stale, live in problem:
            total += (
                turn.least + pad
                + _blocks(stale, ROWS) * (search.own + _blocks(live, COLS) * of_tile)
                + _blocks(live, BLOCK) * (merge.own + stay + renumber.least)
                + _blocks(live, 32) / (BLOCK // 32) * lead
            ) / len(work)  # fmt: skip
    return total


def _line(code: Code, work: Sequence[Sequence[int]], n: int, d: int, WIDTH: int, BLOCK: int) -> float:
    """Count instructions; work: for every sampled problem the live clusters of every round."""
    _expect(len(code.loops) == 2 and not code.loops[0].inside and len(code.loops[1].inside) == 1, "line")
    _expect(n <= WIDTH and code.once > WIDTH / (BLOCK / 32) / 32 and d == 1, "line")  # the sort is in no loop
    pad, turn = code.loops
    (block,) = turn.inside
    _expect(block.has("MUFU.RSQ") and block.count("STG") >= 7 and not block.inside, "line")
    total = code.once + 2.0 * pad.own
    for problem in work:
        total += sum(turn.own + _blocks(live, BLOCK) * block.own for live in problem) / len(work)
    return total


def _chain(code: Code, work: Sequence[int], n: int, d: int, LINKAGE: int, D: int, BLOCK: int) -> float:
    """Count instructions; work: for every sampled problem how many searches it takes."""
    ward = LINKAGE == 0
    _expect(len(code.loops) == 2 if ward else len(code.loops) > 2, "chain")
    load, *begin, turn = code.loops
    _expect(load.has("STG") and len(turn.inside) == (1 if ward else 2), "chain")
    search, *merge = turn.inside
    _expect(search.has("REDUX") and search.has("FFMA") is ward, "chain")
    _expect(bool(search.inside) is (ward and D == 0) and search.count("FFMA") >= D, "chain")
    _expect(all(loop.count("STG") > 1 and not loop.inside for loop in merge), "chain")
    blocks, merges = _blocks(n, BLOCK), n - 1
    of_search = search.own + (_coordinates(search.inside, d, "chain") if search.inside else 0)
    total = code.once + blocks * (load.own + _coordinates(load.inside, d, "chain"))
    # The shortest way through a turn goes on with the chain; the rest of it is for merges.
    total += float(np.mean(work)) * (turn.least + blocks * of_search) + merges * (turn.own - turn.least)
    if not ward:
        rows_of = [loop for loop in begin if any(block.inside for block in loop.inside)]  # without: for d = 0
        _expect(len(rows_of) == 1 and len(rows_of[0].inside) == 1, "chain")
        (row,), (block,) = rows_of, rows_of[0].inside
        total += n * (row.own + blocks * (block.own + _coordinates(block.inside, d, "chain")))
        total += merges * blocks * merge[0].own
    return total


def _magnitude(code: Code, size: int, BLOCK: int) -> float:
    """Count instructions; size: numbers of a filter."""
    _expect(len(code.loops) == 1 and code.loops[0].has("LDG") and not code.loops[0].inside, "magnitude")
    return code.once + _blocks(size, BLOCK) * code.loops[0].least  # float32 is the shortest of its branches


def _cut_height(code: Code, n: int, BLOCK: int) -> float:
    _expect(len(code.loops) == 1 and len(code.loops[0].inside) == 1, "cut_height")
    halving = code.loops[0]
    (block,) = halving.inside
    _expect(block.has("LDG") and not halving.count("LDG") and not block.inside, "cut_height")
    return code.once + 31 * (halving.own + _blocks(n, BLOCK) * block.own)


def _label(code: Code, climbs: Sequence[Sequence[int]]) -> float:
    """Count instructions; climbs: for every sampled problem the steps of every block of points."""
    _expect(len(code.loops) == 2 and not code.loops[0].inside and len(code.loops[1].inside) == 1, "label")
    roots, climb = code.loops
    _expect(roots.has("SHFL") and climb.inside[0].has("LDG") and not climb.inside[0].inside, "label")
    steps = [step for problem in climbs for step in problem]
    return code.once + sum(roots.own + climb.own + step * climb.inside[0].own for step in steps) / len(climbs)


# Rounds, counted on the CPU


class Sample(NamedTuple):
    """The work that the first problems of a layer are for the kernels."""

    work: list[Any]  # for each problem what `count_rounds`, `count_line_rounds` or `count_searches` says
    climbs: list[list[int]]  # for each problem, and each block of points, the steps to the roots under the cut


def _sample(layer: ops.Layer, linkage: str, config: Any) -> Sample:
    points = layer.points()[:SAMPLED].cpu().double().contiguous()
    return _counted(points.numpy().tobytes(), tuple(points.shape), linkage, config.kernel.__name__)


@functools.lru_cache(maxsize=128)
def _counted(data: bytes, shape: tuple[int, int, int], linkage: str, kernel: str) -> Sample:
    from reprune_triton.kernels.clustering import launch

    points = torch.frombuffer(bytearray(data), dtype=torch.float64).view(shape)
    n, keep = shape[1], max(1, round(KEPT * shape[1]))
    work: list[Any]
    if kernel == "line_kernel":
        work = count_line_rounds(points)
    elif kernel == "reciprocal_kernel":
        work = count_rounds(points)
    else:
        work = count_searches(points, linkage)
    parent, height = reference.forest(points, linkage)
    height = height.clone()
    h = -1.0 if keep == n else reference.cut(parent, height, keep)[1]
    depth = torch.zeros_like(parent)
    at = torch.arange(n).repeat(shape[0], 1)
    while (moves := height.gather(1, at) <= h).any():
        depth += moves
        at = torch.where(moves, parent.long().gather(1, at), at)
    steps = [block.amax(1) + 1 for block in depth.split(dict(launch.LABEL.constants)["BLOCK"], dim=1)]
    return Sample(work, torch.stack(steps, 1).tolist())


def count_rounds(points: torch.Tensor) -> list[list[tuple[int, int]]]:
    """Count stale and live clusters of every round of reciprocal merging, for every problem of points (P, n, d).

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
    """Count live clusters of every round of merging adjacent local minima, for every problem of points (P, n, 1)."""
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


def count_searches(points: torch.Tensor, linkage: str) -> list[int]:
    """Count searches of the nearest-neighbour chain for every problem of points (P, n, d)."""
    found = []
    for problem in points.double():
        n = len(problem)
        dist = reference.distances(problem[None], problem[None])[0]
        dist = dist.square() / 2 if linkage == "ward" else dist
        dist.fill_diagonal_(torch.inf)
        size = torch.ones(n, dtype=torch.float64)
        chain: list[int] = []
        searches = merges = 0
        while merges < n - 1:
            chain = chain or [0]
            tip, before = chain[-1], chain[-2] if len(chain) > 1 else -1
            nearest = int(dist[tip].argmin())
            searches += 1
            if before < 0 or dist[tip, before] > dist[tip, nearest]:  # of equal ones the one before
                chain.append(nearest)
                continue
            into, gone = min(tip, before), max(tip, before)
            a, b = size[into].clone(), size[gone].clone()
            if linkage == "ward":
                far = (a + size) * dist[into] + (b + size) * dist[gone] - size * dist[into, gone]
                far /= a + b + size
            else:
                far = reference.LANCE_WILLIAMS[linkage](dist[into], dist[gone], a, b)
            dist[into] = dist[:, into] = far
            dist[gone] = dist[:, gone] = dist[into, into] = torch.inf
            size[into], size[gone] = a + b, 0.0
            chain = chain[:-2]
            merges += 1
        found.append(searches)
    return found
