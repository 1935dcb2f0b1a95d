"""A kernel with its constants, and launches of it that skip Triton's search for its binary."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import triton


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up. triton.cdiv is ten times slower on the host."""
    return -(-a // b)


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A kernel, the constants that it is compiled with, and the resources of a program."""

    kernel: Any
    constants: tuple[tuple[str, int], ...]
    warps: int
    max_registers: int | None = None  # per thread, on NVIDIA
    stages: int = 1  # of pipelined loads; 1 in clustering, where a load ahead of its turn could pass a barrier
    # For each device, dtypes and numbers: the binary, its constants, and Triton's cache in which it was found. Once
    # Triton has emptied its caches there is another.
    binaries: dict[Any, tuple[Any, tuple[int, ...], Any]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __hash__(self) -> int:
        return hash((id(self.kernel), self.constants, self.warps))  # Triton hashes a kernel's source

    def options(self) -> dict[str, int]:
        """Return Triton's options for the compilation."""
        nvidia = torch.version.hip is None
        limit = {"maxnreg": self.max_registers} if nvidia and self.max_registers is not None else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}

    @functools.cached_property
    def pointers(self) -> int:
        """The number of tensors among its arguments; they come first."""
        return sum(name.endswith("_ptr") for name in self.kernel.arg_names)

    def run(self, programs: int, *arguments: Any) -> None:
        """Launch the kernel on the device of the first argument, a tensor. Tensors come before numbers.

        Triton launches on the current device: so that is switched.
        """
        index = arguments[0].get_device()
        if not programs:
            return
        if index < 0 or index == torch._C._cuda_getDevice():
            self._launch(programs, arguments, index)
        else:
            with torch.cuda.device(index):
                self._launch(programs, arguments, index)

    def _launch(self, programs: int, arguments: tuple[Any, ...], index: int) -> None:
        """Launch the binary that Triton found for these dtypes and numbers before.

        Triton takes longer to look for a binary than to launch it, so it looks once. This goes for tensors that are
        aligned to 16 bytes, as PyTorch allocates them; for others Triton looks every time.
        """
        count, addresses = self.pointers, 0
        tensors = arguments[:count]
        for tensor in tensors:
            addresses |= tensor.data_ptr()
        key = index, tuple([tensor.dtype for tensor in tensors]), arguments[count:]
        found = self.binaries.get(key)
        if found is None or addresses % 16 != 0:
            self._launch_first(programs, arguments, key if addresses % 16 == 0 else None)
            return
        binary, constants, cache = found
        active = triton.runtime.driver.active
        device = index if index >= 0 else active.get_current_device()
        if self.kernel.device_caches[device][0] is not cache:
            self._launch_first(programs, arguments, key)
            return
        stream, hooks = active.get_current_stream(device), triton.knobs.runtime
        enter, metadata = hooks.launch_enter_hook, None
        if getattr(enter, "calls", enter):  # a profiler wants to know
            metadata = binary.launch_metadata((programs, 1, 1), stream, *arguments, *constants)
        binary.run(
            programs, 1, 1, stream, binary.function, binary.packed_metadata, metadata, enter, hooks.launch_exit_hook,
            *arguments, *constants,
        )  # fmt: skip

    def _launch_first(self, programs: int, arguments: tuple[Any, ...], key: Any) -> None:
        """Launch by Triton, and keep the binary under this key; None: do not keep it."""
        constants = dict(self.constants)
        binary = self.kernel[(programs,)](*arguments, **constants, **self.options())
        if key is not None and isinstance(binary, triton.compiler.CompiledKernel):  # not interpreted
            rest = tuple(constants[name] for name in self.kernel.arg_names[len(arguments) :])
            device = triton.runtime.driver.active.get_current_device()
            self.binaries[key] = binary, rest, self.kernel.device_caches[device][0]
