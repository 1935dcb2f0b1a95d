"""A Triton driver whose GPU is the emulator: kernels are compiled to PTX as for a GPU, and run on CPU tensors.

    from ptxemu import driver
    driver.activate(arch=90, seed=3)
    kernel[grid](x, y, n, BLOCK=128)
    driver.summary()                  # what the checks found, a line each
    driver.launches[-1].counts        # what was executed, with settings.count
"""

from __future__ import annotations

import ctypes
import json
import struct
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver as triton_driver

from ptxemu import library

FENCELESS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
ANY_WARP, FIRST_WARP, LAST_WARP = range(3)  # which of the warps that can run is next
FATAL = ("deadlock", "budget", "trap", "brx-out-of-range")  # findings that end a launch


@dataclass
class Settings:
    arch: int = 80  # 80, 90 or 100
    seed: int = 0  # of the interleaving
    policy: int = ANY_WARP
    max_quantum: int = 8  # a warp runs for 1 .. 2^this accesses or branches before another may; 0: one at a time
    inexact: bool = False  # products and sums become fmas as in ptxas; functions are a unit in the last place off
    budget: int = 400_000_000  # warp instructions of a launch, after which a loop is taken to be endless
    count: bool = False  # sectors and bank conflicts


settings = Settings()


class EmulatorError(RuntimeError):
    """A kernel that has no end or a failed assertion, or PTX that is not implemented."""


class Finding(NamedTuple):
    kernel: str
    kind: str
    place: str  # in the PTX and in the source


class Row(NamedTuple):
    """What one instruction did in a launch."""

    kind: str
    place: str
    executed: int  # by warps
    threads: int
    sectors: int  # of global memory, 32 bytes each
    conflicts: int  # between banks of shared memory
    requests: int


@dataclass
class Launch:
    name: str
    grid: tuple[int, int, int]
    threads: int  # of a program
    instructions: int  # of warps
    profile: list[Row]  # by instruction; empty without settings.count

    @property
    def counts(self) -> Counter[str]:
        """Warp instructions by class, and what memory had to do for them."""
        found: Counter[str] = Counter()
        for row in self.profile:
            found[row.kind] += row.executed
            found[f"{row.kind} sectors"] += row.sectors
            found["bank conflicts"] += row.conflicts
        return found


launches: deque[Launch] = deque(maxlen=1000)  # the last ones
findings: Counter[Finding] = Counter()
_examples: dict[Finding, str] = {}
_lock = threading.RLock()


def clear() -> None:
    """Forget all launches and findings."""
    launches.clear()
    findings.clear()
    _examples.clear()


def harmless(kind: str) -> bool:
    """Several threads store the same value in one place: in shared memory, where Triton's own code lets all threads
    with copies of a value store it, or two programs of a launch. And what is Triton's: 3.6 puts no fence between an
    asynchronous copy and a wgmma that reads it (nor does CUTLASS), 3.8 does."""
    if kind == "proxy-fence-missing":
        return FENCELESS
    return "/same-value" in kind and kind.endswith("write-after-write") and ("shared" in kind or "ctas" in kind)


def summary() -> str:
    """The findings since `clear`, a line each; harmless ones are left out."""
    return "\n".join(
        f"{found.kernel}: {found.kind} ({count} times) at {found.place}: {_examples[found]}"
        for found, count in sorted(findings.items())
        if not harmless(found.kind)
    )


class Program:
    """A kernel in PTX."""

    def __init__(self, ptx: str):
        lib = library.load()
        self.handle = lib.emu_parse(ptx.encode(), settings.inexact)
        if not self.handle:
            raise EmulatorError(lib.emu_error().decode())
        self.name, self.parameters = json.loads(lib.emu_signature(self.handle))  # [bytes, offset] of each

    def launch(
        self, grid: Sequence[int], threads: int, shared: int, types: Sequence[str], values: Sequence[Any],
        names: Sequence[str] = (),
    ) -> Launch:  # fmt: skip
        """Run it on tensors, numbers and addresses. types: as Triton writes them, "*fp32" or "i32"."""
        lib = library.load()
        with _lock:
            named = []
            for i, value in enumerate(values):
                if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes():
                    storage = value.untyped_storage()
                    name = names[i] if names else f"argument {i}"
                    lib.emu_region(storage.data_ptr(), storage.nbytes(), value.element_size(), name.encode())
                    named.append(storage.data_ptr())
            options = library.Options(
                settings.seed, settings.budget, settings.policy, settings.max_quantum, settings.count
            )
            sizes = (ctypes.c_uint32 * 3)(*grid)
            packed = self._pack(types, values)
            failed = lib.emu_launch(self.handle, sizes, threads, shared, packed, ctypes.byref(options))
            if failed:
                raise EmulatorError(lib.emu_error().decode())
            instructions, reports = json.loads(lib.emu_result())
            profile = [Row(*row) for row in json.loads(lib.emu_profile(self.handle))] if settings.count else []
            for address in named:
                lib.emu_unregion(address)
            done = Launch(self.name, tuple(grid), threads, instructions, profile)
            launches.append(done)
            for kind, place, text, count in reports:
                found = Finding(self.name, kind, place)
                findings[found] += count
                _examples.setdefault(found, text)
            fatal = [f"{self.name}: {kind}: {text}" for kind, _, text, _ in reports if kind in FATAL]
            if fatal:
                raise EmulatorError("; ".join(fatal))
            return done

    def _pack(self, types: Sequence[str], values: Sequence[Any]) -> bytes:
        packed = bytearray(max((offset + size for size, offset in self.parameters), default=0))
        missing = len(self.parameters) - len(values)
        if not 0 <= missing <= 2:  # Triton adds pointers to scratch memory, which our kernels do not use
            raise EmulatorError(f"{self.name} has {len(self.parameters)} parameters, not {len(values)}")
        types, values = [*types, *["*i8"] * missing], [*values, *[0] * missing]
        for (size, offset), form, value in zip(self.parameters, types, values, strict=True):
            packed[offset : offset + size] = pack(form, value, size)
        return bytes(packed)


def pack(form: str, value: Any, size: int) -> bytes:
    """One argument as a kernel reads it."""
    if form[0] == "*":
        return struct.pack("Q", value.data_ptr() if isinstance(value, torch.Tensor) else value or 0)
    if form == "bf16":
        return struct.pack("f", value)[2:]
    if form.startswith(("fp", "f")):
        return struct.pack({2: "e", 4: "f", 8: "d"}[size], value)
    return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _flatten(types: Sequence[Any], values: Sequence[Any], names: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    """Arguments without constants; those of a tuple one by one."""
    for form, value, name in zip(types, values, names, strict=True):
        if isinstance(form, tuple):
            yield from _flatten(form, value, [name] * len(form))
        elif form != "constexpr":
            yield form, value, name


class Launcher:
    """What Triton calls for a launch."""

    def __init__(self, src: Any, metadata: Any):
        self.names, self.types = list(src.signature), list(src.signature.values())
        self.metadata = metadata

    def __call__(self, x, y, z, stream, program, packed_metadata, launch_metadata, enter, leave, *arguments):
        flat = list(_flatten(self.types, arguments, self.names))
        types, values, names = ([entry[i] for entry in flat] for i in range(3))
        if x * y * z:
            program.launch((x, y, z), 32 * self.metadata.num_warps, self.metadata.shared, types, values, names)


class Driver:
    """A GPU of the architecture in `settings`, as Triton asks for it."""

    launcher_cls = Launcher

    def __init__(self):
        self.utils = SimpleNamespace(
            load_binary=self._load, unload_module=lambda module: None, get_device_properties=self._properties
        )

    @staticmethod
    def _load(name, binary, shared, device):
        program = Program(binary.decode() if isinstance(binary, bytes) else binary)
        return program, program, 0, 0, 1024  # module, function, registers, spills, most threads

    @staticmethod
    def _properties(device):
        """Of the smaller kind of each architecture."""
        return {
            "max_shared_mem": 232448 if settings.arch >= 90 else 166912, "multiprocessor_count": 132, "warpSize": 32,
            "sm_clock_rate": 1_000_000, "mem_clock_rate": 1_000_000, "mem_bus_width": 5120, "max_num_regs": 65536,
        }  # fmt: skip

    @staticmethod
    def is_active():
        return True

    def get_current_target(self):
        return GPUTarget("cuda", settings.arch, 32)

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def map_python_to_cpp_type(self, form):
        return form


def activate(arch: int = 80, seed: int = 0, inexact: bool = False) -> None:
    """Make the emulator the GPU of this process. Every CPU tensor that is allocated from now on has red zones, and
    poison where nothing was written."""
    if not isinstance(triton.language.standard.zeros, triton.JITFunction):
        raise EmulatorError("Triton interprets kernels in this process: unset TRITON_INTERPRET before it is imported")
    settings.arch, settings.seed, settings.inexact = arch, seed, inexact
    _end_with_ptx()
    triton_driver.set_active(Driver())
    library.load().emu_hook()


def _end_with_ptx() -> None:
    """Compilation ends with PTX, which is cached apart from what a GPU needs."""
    if hasattr(CUDABackend, "ends_with_ptx"):
        return
    CUDABackend.ends_with_ptx = True
    begin, add_stages, own_hash = CUDABackend.__init__, CUDABackend.add_stages, CUDABackend.hash

    def __init__(self, target):
        begin(self, target)
        self.binary_ext = "ptx"

    def stages_to_ptx(self, stages, options, language):
        add_stages(self, stages, options, language)
        stages.pop("cubin", None)

    CUDABackend.__init__, CUDABackend.add_stages = __init__, stages_to_ptx
    CUDABackend.hash = lambda self: f"ptxemu-{own_hash(self)}"
