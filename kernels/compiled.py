"""Kernels compiled without a GPU, and the resources and instructions of their machine code."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from reprune_triton.kernels.configuration import Configuration

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Types of the arguments of clustering kernels and of pack; all others are pointers to int32.
_TYPES = {
    "table_ptr": "*i64", "owner_ptr": "*i64", "height_ptr": "*fp32", "floats_ptr": "*fp32",
    "place_ptr": "*i16", "member_ptr": "*i16", "buffer_ptr": "*u8",
}  # fmt: skip
_TORCH = {"*i64": torch.int64, "*i32": torch.int32, "*i16": torch.int16, "*u8": torch.uint8, "*fp32": torch.float32}
# Arguments of norm_act and masked_conv. Pointers to the type of the activations; other pointers are to float32:
_ACTIVATIONS = ("x", "y", "w", "residual", "grad", "other", "g", "grad_x")
_NORM = ("mean", "rstd", "gamma", "beta")  # where masked_conv reads none of these, the activations stand in for them
# Numbers that are floats; the other numbers are int32:
_FLOATS = ("low", "high", "eps")
_JUMP = re.compile(r"^((?:BRA|BSSY|CALL|JMP|WARPSYNC\.COLLECTIVE)\b.*?)(0x[0-9a-f]+)$")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Resources(NamedTuple):
    """The resources that one program takes, and counts of instructions in the machine code."""

    registers: int  # per thread
    spills: int  # instructions that load or store spilled registers; for AMD spilled registers
    shared: int  # bytes of shared memory
    barriers: int  # instructions
    instructions: int


def build(
    config: Configuration, target: str, types: Mapping[str, str] | None = None, aligned: Sequence[str] = ()
) -> Any:
    """Compile a kernel for a target of TARGETS, as a launch on that GPU would.

    types: of arguments, as Triton writes them ("*bf16", "fp32"); without them those of `_TYPES`.
    aligned: pointers and numbers that are divisible by 16 in a launch. None for kernels that work on a table: these are
        compiled for any (`table.kernel`).
    """
    if not isinstance(config.kernel, triton.JITFunction):
        raise RuntimeError("Triton interprets kernels in this process: unset TRITON_INTERPRET to compile them.")
    constants, names = dict(config.constants), config.kernel.arg_names
    known = _TYPES | dict(types or {})
    signature = {name: "constexpr" if name in constants else known.get(name, "*i32") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    options = config.options()
    if target.startswith("gfx"):
        options.pop("maxnreg", None)
    source = ASTSource(config.kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def build_training(config: Configuration, target: str, dtype: str = "bf16") -> Any:
    """Compile a kernel of norm_act or masked_conv, as a launch with multiples of 16 channels would.

    dtype: of the activations, as Triton writes it.
    """
    names = config.kernel.arg_names
    types = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in names}
    types |= {f"{name}_ptr": f"*{dtype}" for name in _ACTIVATIONS} | dict.fromkeys(_FLOATS, "fp32")
    aligned = [name for name in names if name.endswith("_ptr") or name in ("C", "CI", "CO")]
    return build(config, target, types, aligned)


def warm(config: Configuration, dtype: torch.dtype = torch.bfloat16, n_in: int = 16, n_out: int = 16) -> Any:
    """Compile a kernel for the GPU here, into Triton's cache, where launches look first.

    The other arguments are for kernels of norm_act and masked_conv.

    dtype: of the activations.
    n_in, n_out: numbers of channels; it only counts which of them are multiples of 16. norm_act has n_out alone.
    """
    constants, names = dict(config.constants), config.kernel.arg_names
    given: list[torch.dtype | float | int] = []
    for name in names:
        end = name.removesuffix("_ptr")
        if "table_ptr" in names and end != name:
            given.append(_TORCH[_TYPES.get(name, "*i32")])
        elif end in _ACTIVATIONS or (end in _NORM and constants.get("NORM") == 0):
            given.append(dtype)
        elif end != name:
            given.append(torch.promote_types(dtype, torch.float32))
        elif name not in constants:
            given.append(0.5 if name in _FLOATS else n_in if name == "CI" else n_out)
    return config.kernel.warmup(*given, grid=(1,), **constants, **config.options())


def resources(compiled: Any, code: Sequence[str] | None = None) -> Resources:
    """Return the resources of a binary.

    code: its instructions, if they are known: see `machine_codes`. Not used for AMD.
    """
    if "hsaco" in compiled.asm:
        text = compiled.asm["amdgcn"]

        def count(name: str) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]

        instructions = len(re.findall(r"^\t[sv]_|^\t(?:global|flat|ds|buffer)_", text, re.M))
        return Resources(
            count("vgpr_count"), count("vgpr_spill_count") + count("sgpr_spill_count"), compiled.metadata.shared,
            len(re.findall(r"s_barrier", text)), instructions,
        )  # fmt: skip
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
    if code is None:
        (code,) = machine_codes([compiled])
    found = re.search(r"REG:(\d+)", usage)
    assert found, usage
    spills = sum(bool(re.match(r"(STL|LDL)\b", line)) for line in code)
    barriers = sum(line.startswith("BAR.") for line in code)
    return Resources(int(found[1]), spills, compiled.metadata.shared, barriers, len(code))


def machine_codes(binaries: Sequence[Any]) -> list[list[str]]:
    """Return the instructions of each NVIDIA binary, without predicates, and labels as 'LABEL:'.

    All binaries are for one GPU. They are disassembled as one text, as nvdisasm takes 0.3 s to start and then 0.01 s
    for a kernel.
    """
    texts = [_text(binary.asm["cubin"]) for binary in binaries]
    arch = binaries[0].metadata.target.arch
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(texts))
        file.flush()
        text = _tool("nvdisasm", "-b", f"SM{arch}{'a' if arch >= 90 else ''}", file.name)
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", text, re.M)
    lines = {
        int(address, 16): _JUMP.sub(lambda to: f"{to[1]}`(.L_x_{int(to[2], 16)})", line) for address, line in found
    }
    labels = {int(to[1]) for line in lines.values() if (to := re.search(r"`\(\.L_x_(\d+)\)$", line))}
    codes, begin = [], 0
    for size in map(len, texts):
        own = (at for at in range(begin, begin + size, 16) if at in lines)
        codes.append([part for at in own for part in ([f".L_x_{at}:"] if at in labels else []) + [lines[at]]])
        begin += size
    return codes


def _text(cubin: bytes) -> bytes:
    """Return the section of an ELF file that has the instructions of its kernel."""
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(count)]
    for name, _, _, _, offset, length in sections:
        if cubin.startswith(b".text.", sections[names][4] + name):
            return cubin[offset : offset + length]
    raise RuntimeError("the binary has no instructions.")


def _tool(name: str, *arguments: str) -> str:
    """Run one of NVIDIA's tools that come with Triton, and return its output."""
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout
