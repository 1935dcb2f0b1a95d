"""Every kernel that can be launched, compiled for GPUs that are not here: what it costs, and where it has barriers."""

import itertools
import re
from typing import NamedTuple

import apart
import pytest

from reprune_triton.kernels import compiled
from reprune_triton.kernels.clustering import chain, launch

NVIDIA = ("sm_80", "sm_90", "sm_100")


class Budget(NamedTuple):
    """The most that one program may take on NVIDIA, and the fewest barriers it must have."""

    registers: int  # per thread
    shared: int  # bytes
    barriers: int  # written in the kernel (linkages other than ward: two more), and so at least in the machine code


BUDGET = {
    # Reads any strides and types once; runs for microseconds.
    "magnitude_kernel": Budget(128, 8192, 0),
    # One search after the other, waiting for memory: 5 programs of 4 warps at once, or 20 of one.
    "chain_kernel": Budget(96, 8192, 3),
    # Where the time goes. 5 programs of 4 warps have 65536 / (5 * 128) = 102 registers each, in units of 8: 96.
    "reciprocal_kernel": Budget(96, 8192, 5),
    # The sort in registers needs them; 8 warps of 128 registers are half an SM.
    "line_kernel": Budget(128, 8192, 2),
    # One warp, all of it waiting for memory: 32 at once on an SM, its maximum, at 64 registers.
    "cut_height_kernel": Budget(64, 8192, 0),
    "label_kernel": Budget(64, 8192, 1),
    "membership_kernel": Budget(64, 8192, 4),
    # One program for each layer, of 16 warps: what counts is how soon it is done.
    "cover_kernel": Budget(96, 8192, 3),
    "bits_kernel": Budget(64, 8192, 0),
}
# What is known to spill, and at most how much. An entry that is not needed any more fails.
SPILLS = {
    # Scalar registers, which go to lanes of vector registers, not to memory.
    ("gfx942", "reciprocal_kernel"): 22,
}

# Apart from this process, in which Triton interprets kernels. Prints one line for each configuration.
PROGRAM = """
import json
import re
import sys
from reprune_triton.kernels import compiled
from reprune_triton.kernels.clustering import launch


def deepest_spill(code):
    \"\"\"How many loops are around the innermost spilled register; 0 without one.\"\"\"
    code = code[: max(at for at, line in enumerate(code) if line.startswith("EXIT"))]  # the rest is out of line
    labels = {line[:-1]: at for at, line in enumerate(code) if line.endswith(":")}
    loops = {}  # where it begins: the last jump back there
    for at, line in enumerate(code):
        target = re.match(r"BRA.*?(\\.L_x_\\d+)", line)
        if target and labels.get(target[1], at) < at:
            loops[labels[target[1]]] = at
    spills = [at for at, line in enumerate(code) if re.match(r"(STL|LDL)\\b", line)]
    return max((sum(begin < at < end for begin, end in loops.items()) for at in spills), default=0)


configurations = list(launch.configurations())
binaries = [compiled.build(config, sys.argv[1]) for config in configurations]
cuda = sys.argv[1].startswith("sm")
codes = compiled.machine_codes(binaries) if cuda else [[]] * len(binaries)
for config, binary, code in zip(configurations, binaries, codes):
    print(json.dumps({
        "kernel": config.kernel.__name__, "constants": dict(config.constants), "warps": config.warps,
        "resources": compiled.resources(binary, code)._asdict(), "ttgir": binary.asm["ttgir"], "code": code,
        "deepest_spill": deepest_spill(code) if cuda else 0,
        "scratch": 0 if cuda else int(re.search(r"private_segment_fixed_size: *(\\d+)", binary.asm["amdgcn"])[1]),
        "parameters": [[p.name, p.is_constexpr, p.do_not_specialize_on_alignment] for p in config.kernel.params],
    }))
"""


@pytest.fixture(scope="module")
def built() -> dict[str, list[dict]]:
    """What PROGRAM prints, for every target."""
    return dict(zip(compiled.TARGETS, apart.run_each(PROGRAM, [[x] for x in compiled.TARGETS]), strict=True))


def name(row: dict) -> str:
    return f"{row['kernel']} {row['constants']}"


def barriers_of(row: dict) -> int:
    return BUDGET[row["kernel"]].barriers + 2 * (row["constants"].get("LINKAGE", 0) != chain.LINKAGES["ward"])


# What machine_codes gives for several kernels, and what nvdisasm shows of each alone.
TOGETHER = """
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from reprune_triton.kernels import compiled
from reprune_triton.kernels.clustering import launch


def numbered(code):
    \"\"\"Without labels; where one was, its place.\"\"\"
    places, lines = {}, []
    for line in code:
        if line.endswith(":"):
            places[line[:-1]] = len(lines)
        else:
            lines.append(line)
    lines = [re.sub(r"`\\((.*)\\)", lambda name: str(places.get(name[1])), line) for line in lines]
    return [re.sub(r"(CALL\\S*|RET\\S*.*) \\S+$", r"\\1", line) for line in lines]  # functions have names there


for target in sys.argv[1:]:
    binaries = [compiled.build(config, target) for config in list(launch.configurations())[::8]]
    for binary, code in zip(binaries, compiled.machine_codes(binaries), strict=True):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "binary")
            path.write_bytes(binary.asm["cubin"])
            text = compiled._tool("nvdisasm", "-c", path)
        alone = re.findall(r"^(\\.L_x_\\d+:)|^\\s+/\\*[0-9a-f]{4,}\\*/\\s+(?:@!?U?P\\w+\\s+)?(.*?)\\s*;", text, re.M)
        alone = [label or instruction for label, instruction in alone]
        labels = sum(line.endswith(":") for line in alone)
        print(json.dumps([binary.metadata.name, numbered(code) == numbered(alone), len(code), labels]))
"""


def test_kernels_that_are_disassembled_together_have_the_same_instructions():
    """Branches lead to the same places."""
    found = apart.run(TOGETHER, *NVIDIA)
    assert len(found) == 12 and all(labels > 0 for *_, labels in found)
    assert [name for name, same, *_ in found if not same] == []


def test_a_layer_is_always_given_a_configuration_that_is_compiled_here():
    found = list(launch.configurations())
    known = set(found)
    assert len(known) == len(found) and set(launch.FIXED) <= known
    sizes = {n for k in range(13) for n in (2**k - 1, 2**k, 2**k + 1) if 1 <= n <= launch.MAX_FILTERS}
    sizes |= {launch.SMALL, launch.SMALL + 1, 96, 160, 320, 1000, 3000}
    cases = [("ward", algorithm) for algorithm in launch.ALGORITHMS] + [(linkage, "auto") for linkage in chain.LINKAGES]
    used = {
        launch.configuration(n, d, *case)
        for n, d, case in itertools.product(sizes, range(1, launch.MAX_AREA + 1), cases)
    }
    assert used == known - set(launch.FIXED)
    assert {config.kernel.__name__ for config in known} == set(BUDGET)


def test_every_configuration_compiles(built):
    wanted = [(config.kernel.__name__, dict(config.constants), config.warps) for config in launch.configurations()]
    for target, rows in built.items():
        assert [(row["kernel"], row["constants"], row["warps"]) for row in rows] == wanted, target


def test_nothing_about_a_launch_makes_another_binary(built):
    """Arguments are pointers, whose alignment does not matter, and constants. See also test_launch."""
    for row in itertools.chain(*built.values()):
        for parameter, constant, any_alignment in row["parameters"]:
            assert constant or (parameter.endswith("_ptr") and any_alignment), f"{name(row)}: {parameter}"
        assert {parameter for parameter, constant, _ in row["parameters"] if constant} == set(row["constants"])


@pytest.mark.parametrize("target", NVIDIA)
def test_budget(built, target):
    over = []
    for row in built[target]:
        limit, found = BUDGET[row["kernel"]], row["resources"]
        for what in ("registers", "shared"):
            if found[what] > getattr(limit, what):
                over.append(f"{name(row)}: {found[what]} {what}, not {getattr(limit, what)}")
    assert not over, "\n".join([target, *over])


@pytest.mark.parametrize("target", compiled.TARGETS)
def test_spills(built, target):
    """None but what SPILLS says; on NVIDIA only outside the loops of a round, and on AMD never to memory."""
    most = dict.fromkeys(BUDGET, 0)
    for row in built[target]:
        most[row["kernel"]] = max(most[row["kernel"]], row["resources"]["spills"])
        assert row["deepest_spill"] <= 1, f"{target} {name(row)}: spills in an inner loop"
        assert row["scratch"] == 0, f"{target} {name(row)}: {row['scratch']} bytes of spilled registers in memory"
    for kernel, found in most.items():
        allowed = SPILLS.get((target, kernel), 0)
        assert found <= allowed, f"{target} {kernel}: {found} spills"
        assert found > 0 or allowed == 0, f"{target} {kernel} does not spill any more: take it out of SPILLS"


@pytest.mark.parametrize("target", compiled.TARGETS)
def test_barriers_are_in_the_machine_code(built, target):
    """As many as the kernel has, at least: scans, reductions and sorts have their own. A program that is one wave on
    AMD needs no instruction for one."""
    for row in built[target]:
        wanted = barriers_of(row)
        assert len(re.findall(r"\b(?:ttg|gpu)\.barrier\b", row["ttgir"])) == wanted, f"{target} {name(row)}"
        if target in NVIDIA or row["warps"] > 1:
            assert row["resources"]["barriers"] >= wanted, f"{target} {name(row)}: {row['resources']['barriers']}"


@pytest.mark.parametrize("target", compiled.TARGETS)
def test_a_round_begins_and_ends_with_a_barrier(built, target):
    """What is stored before the loop of rounds or in one round is there for the next, whichever thread stored it."""
    memory = re.compile(r"tt\.load|tt\.store|tt\.atomic|(?:ttg|gpu)\.barrier")
    seen = set()
    for row in built[target]:
        if row["kernel"] not in ("chain_kernel", "reciprocal_kernel", "line_kernel", "cover_kernel"):
            continue
        lines = row["ttgir"].splitlines()
        if row["kernel"] == "cover_kernel":  # the second of the outer loops; the first clears the gains
            loops = [at for at, line in enumerate(lines) if "scf.for" in line]
            outermost = min(len(lines[at]) - len(lines[at].lstrip()) for at in loops)
            _, begin = (at for at in loops if len(lines[at]) - len(lines[at].lstrip()) == outermost)
        else:
            (begin,) = (at for at, line in enumerate(lines) if "scf.while" in line)
        indent = lines[begin][: -len(lines[begin].lstrip())]
        end = next(at for at, line in enumerate(lines) if at > begin and re.match(indent + r"}(?! do)", line))
        for what, part in (("before", lines[:begin]), ("in", lines[begin:end])):
            last = [found[0] for line in part if (found := memory.search(line))][-1]
            assert last.endswith("barrier"), f"{target} {name(row)}: the last thing {what} the loop is {last}"
        seen.add(row["kernel"])
    assert len(seen) == 4


@pytest.mark.parametrize("target", compiled.TARGETS)
def test_gains_change_after_all_have_read_them(built, target):
    """In a step of coverage: loads of gains past the first-level cache, a barrier, and only then atomics."""
    rows = [row for row in built[target] if row["kernel"] == "cover_kernel"]
    assert len(rows) == 2
    for row in rows:
        lines = row["ttgir"].splitlines()
        loads = [at for at, line in enumerate(lines) if "tt.load" in line and "cacheModifier = cg" in line]
        atomics = [at for at, line in enumerate(lines) if "tt.atomic_rmw" in line]
        barriers = [at for at, line in enumerate(lines) if re.search(r"\b(?:ttg|gpu)\.barrier\b", line)]
        assert len(loads) == 1 and len(atomics) == 2, name(row)
        assert any(loads[0] < at < atomics[0] for at in barriers), name(row)
        assert all("relaxed, cta" in lines[at] for at in atomics), name(row)


@pytest.mark.parametrize("target", NVIDIA)
def test_coverage_does_not_wait_for_its_atomics(built, target):
    """Subtractions without an answer, and no fence of the whole GPU."""
    for row in built[target]:
        if row["kernel"] == "cover_kernel":
            code = row["code"]
            assert sum(line.startswith("RED") for line in code) >= 2, name(row)
            assert not [line for line in code if line.startswith(("ATOM", "MEMBAR"))], name(row)
            assert any(line.startswith("LDG.E.STRONG.GPU") for line in code), name(row)


@pytest.mark.parametrize("target", NVIDIA)
def test_loads_are_not_pipelined(built, target):
    """An asynchronous copy or a load ahead of its turn could pass a barrier."""
    for row in built[target]:
        assert not re.search(r"async_copy|async_wait|memdesc_subview|num_stages|loop_schedule", row["ttgir"]), name(row)
