"""The emulator's C++ library: built at first use, kept in the user's cache, and called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
# Contracting a product and a sum would change what the kernels compute: PTX says where an fma is.
FLAGS = (
    "-std=c++17", "-O2", "-ftree-vectorize", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=off",
    "-fno-math-errno", "-fno-strict-aliasing", "-shared", "-fPIC",
)  # fmt: skip


class Options(ctypes.Structure):
    """What `emu_launch` is told beside the arguments of the kernel; `Options` of src/program.hpp."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("seed", "budget")] + [
        (name, ctypes.c_int32) for name in ("policy", "max_quantum", "count")
    ]


def why_not() -> str | None:
    """Why there is no emulator on this machine; None if there is one."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the emulator needs Linux on x86-64, not {sys.platform} on {platform.machine()}"
    if shutil.which("g++") is None:
        return "the emulator needs g++ to be built (apt install g++, or dnf install gcc-c++)"
    return None


def build() -> Path:
    """The library for these sources, this compiler and this CPU. Several processes may build it at once."""
    cpu = subprocess.run(["g++", "-march=native", "-Q", "--help=target"], capture_output=True, check=True).stdout
    version = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    sources = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]pp")))
    key = hashlib.sha256(b"\0".join([sources, version, cpu, *map(str.encode, FLAGS)])).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reprune_triton" / "ptxemu"
    path = cache / f"{key}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            new = Path(folder) / path.name
            subprocess.run(["g++", *FLAGS, "-o", str(new), str(SOURCES / "emulator.cpp")], check=True)
            new.replace(path)
    return path


@functools.cache
def load() -> ctypes.CDLL:
    """The library with the types of its functions; see src/emulator.cpp."""
    lib = ctypes.CDLL(str(build()))
    kernel, number, text = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_char_p
    types = {
        "emu_parse": (kernel, [text, ctypes.c_int]),
        "emu_error": (text, []),
        "emu_signature": (text, [kernel]),
        "emu_hook": (ctypes.c_int, []),
        "emu_region": (None, [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int, text]),
        "emu_unregion": (None, [ctypes.c_uint64]),
        "emu_launch": (
            ctypes.c_int, [kernel, ctypes.POINTER(number), number, number, text, ctypes.POINTER(Options)]
        ),
        "emu_result": (text, []),
        "emu_profile": (text, [kernel]),
    }  # fmt: skip
    for name, (result, arguments) in types.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
