"""Whether Triton can be used, with faults that are real: of a compiler, a driver, an installation. What is played is
the GPU, by a driver library that says yes to everything."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import conftest
import pytest
import torch

from reprune_triton import availability

ROOT = Path(__file__).resolve().parents[1]
# A library in which every function that Triton's own driver calls succeeds.
LIBCUDA = """
#include <stdlib.h>
typedef long long any;
int cuGetErrorString(int error, const char **text) { *text = "no binary for this GPU"; return 0; }
int cuModuleLoadData(any *module) { *module = 1; return getenv("LOAD_FAILS") ? 209 : 0; }
"""
NUMBERS = ("cuDeviceGetAttribute", "cuFuncGetAttribute")  # write an int
HANDLES = ("cuCtxGetCurrent", "cuDevicePrimaryCtxRetain", "cuModuleGetFunction")  # write a pointer
# One GPU, as far as PyTorch knows: what its C++ side is asked, when Triton asks PyTorch.
GPU = """
import torch
torch._C._cuda_getDeviceCount = lambda: 1
torch._C._cuda_getDevice = torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = lambda *_: 0
torch._C._cuda_getCurrentRawStream = lambda device: 0
torch.cuda._lazy_init = lambda: None
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.is_current_stream_capturing = lambda: False
"""
ASK = """
import json, warnings
from reprune_triton import availability
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    answers = [availability.why_not(torch.device("cuda", 0)) for _ in range(3)]
assert answers[0] is answers[1] is answers[2], "asked once, warned once"
assert len(seen) == (answers[0] is not None), [str(x.message) for x in seen]
if seen:
    assert seen[0].filename == "<string>", "the warning points at who asked"
cause = availability.refusal("", torch.device("cuda", 0)).__cause__
print(json.dumps([answers[0], type(cause).__name__]))
"""


# Each program in a child of one process, which has imported what takes long.
CHILDREN = """
import json, os, sys, traceback
import torch, reprune_triton
assert "triton" not in sys.modules
for env, program in json.loads(sys.stdin.read()):
    if os.fork():
        os.wait()
        continue
    os.environ.update(env)
    try:
        exec(program, {"torch": torch})
    except BaseException:
        print(json.dumps(["failed", traceback.format_exc()]), flush=True)
    os._exit(0)
"""


def run(programs, **env):
    """What each of some programs tells, in a process in which Triton does not interpret.

    programs: (variables of its environment, what to run) by name; it prints a list as JSON.
    """
    clean = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "CC", "PYTHONPATH")}
    clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | {key: str(value) for key, value in env.items()}
    some = [({key: str(value) for key, value in own.items()}, program) for own, program in programs.values()]
    done = subprocess.run(
        [sys.executable, "-c", CHILDREN], input=json.dumps(some), env=clean, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(programs, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The environment of a process with that library, and with nothing in Triton's cache."""
    if not sysconfig.get_config_var("EXT_SUFFIX").endswith("linux-gnu.so") or not shutil.which("gcc"):
        pytest.skip("builds a library with gcc")
    pytest.importorskip("triton")
    import triton.backends.nvidia.driver as nvidia

    folder = tmp_path_factory.mktemp("driver")
    source = "".join(Path(nvidia.__file__).with_suffix(end).read_text(encoding="utf-8") for end in (".c", ".py"))
    names = set(re.findall(r"\bcu[A-Z]\w+(?=\()", source)) - set(re.findall(r"\bcu\w+(?=\()", LIBCUDA))
    code = LIBCUDA + "".join(
        f"int {name}(int *x) {{ *x = 1024; return 0; }}\n" if name in NUMBERS
        else f"int {name}(any *x) {{ *x = 1; return 0; }}\n" if name in HANDLES
        else f"int {name}() {{ return 0; }}\n"
        for name in sorted(names)
    )  # fmt: skip
    (folder / "cuda.c").write_text(code, encoding="utf-8")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", "libcuda.so.1", "cuda.c"], cwd=folder, check=True)
    return {"TRITON_LIBCUDA_PATH": folder, "LD_LIBRARY_PATH": folder}


FAULTS = {
    "none": ({}, "^None$", "NoneType"),
    "no compiler": ({"PATH": "nowhere"}, "Failed to find C compiler", "RuntimeError"),
    "no such compiler": ({"CC": "nowhere"}, "nowhere", "FileNotFoundError"),
    "a compiler that fails": ({"CC": shutil.which("false")}, "non-zero exit status", "CalledProcessError"),
    "no library to link with": ({"TRITON_LIBCUDA_PATH": "nowhere"}, "non-zero exit status", "CalledProcessError"),
    "code for another GPU": ({"LOAD_FAILS": 1}, "no binary for this GPU", "RuntimeError"),
    "a cache that is a file": ({"TRITON_CACHE_DIR": __file__}, "exists|ot a dir", "(FileExists|NotADirectory)Error"),
}  # fmt: skip


@pytest.fixture(scope="module")
def found(driver, tmp_path_factory):
    caches = [{"TRITON_CACHE_DIR": tmp_path_factory.mktemp("cache")} for _ in FAULTS]
    some = zip(FAULTS.items(), caches, strict=True)
    return run({name: (cache | env, GPU + ASK) for (name, (env, *_)), cache in some}, **driver)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_has_a_reason_and_a_cause(fault, found):
    _, reason, cause = FAULTS[fault]
    assert re.search(reason, str(found[fault][0])) and re.fullmatch(cause, found[fault][1]), found[fault]
    assert fault == "none" or found[fault][0].startswith("Triton cannot compile for cuda:0 (")


BROKEN = {
    "not there": ("raise ModuleNotFoundError(\"No module named 'triton'\", name='triton')", "No module named 'triton'"),
    "of another Python": ("raise ImportError('undefined symbol: _PyThreadState_Current')", "undefined symbol"),
    "damaged": ("import ctypes; ctypes.CDLL('libnowhere.so')", "libnowhere.so"),
    "half installed": ("", "triton"),
}
WITHOUT = """
import json
from torch import nn
from reprune_triton import RepruneError, availability, ops
from reprune_triton.fused import norm
from reprune_triton.running.pack import Pack

x, causes = torch.randn(2, 8, 6, 6), []
bn = norm.BatchNorm(torch.ones(8), torch.zeros(8), None, None, True, 0.1, 1e-5, "relu")
weight, rows = nn.Parameter(torch.randn(8, 8, 3, 3)), torch.arange(4)
calls = {
    "ward": lambda impl: ops.ward(torch.randn(2, 9, 3), impl=impl),
    "cut": lambda impl: ops.cut(ops.ward(torch.randn(2, 9, 3)), 2, impl=impl),
    "cover": lambda impl: ops.cover(torch.zeros(2, 9, dtype=torch.int32), 2, impl=impl),
    "conv": lambda impl: ops.masked_conv2d(x, weight, impl=impl),
    "norm": lambda impl: norm.batch_norm_act(x, *bn[:4], impl=impl),
    "pack": lambda impl: Pack([[(0, rows)]], impl).gather([weight], [torch.float32]),
}
for name, call in calls.items():
    call("auto")
    try:
        call("triton")
    except RepruneError as error:
        assert str(error).startswith('impl="triton" cannot '), (name, error)
        assert availability.why_not(x.device) in str(error), (name, error)
        causes.append(error.__cause__)
    else:
        raise AssertionError(f"{name} did something else in silence")
assert len(causes) == len(calls) and len(set(causes)) == 1
print(json.dumps([availability.why_not(x.device), type(causes[0]).__name__]))
"""


def test_auto_works_without_triton_and_what_is_asked_for_by_name_is_refused(tmp_path):
    programs = {"intact, on the CPU": ({}, WITHOUT)}
    for damage, (code, _) in BROKEN.items():
        folder = tmp_path / damage / "triton"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(code, encoding="utf-8")
        programs[damage] = {}, f"import sys; sys.path.insert(0, {str(folder.parent)!r})\n{WITHOUT}"
    found = run(programs)
    assert found.pop("intact, on the CPU") == ["the kernels run on a GPU, not on cpu", "NoneType"]
    for damage, (why_not, cause) in found.items():
        assert why_not.startswith("Triton cannot be imported (") and BROKEN[damage][1] in why_not, (damage, why_not)
        assert cause in ("ModuleNotFoundError", "ImportError", "OSError", "AttributeError"), (damage, cause)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
def test_interpreted_kernels_run_anywhere():
    assert availability.why_not(torch.device("cpu")) is None


@pytest.mark.parametrize("triton, numpy, good", [
    ("3.6.0", "2.4.0", False), ("3.6.1", "2.10.1", False), ("3.6.0", "2.3.5", True), ("3.8.0", "2.4.6", True),
    ("3.6.0", "3.0.0rc1", False),
])  # fmt: skip
def test_a_numpy_that_is_too_new_for_the_interpreter_is_named(triton, numpy, good):
    found = conftest.mismatch(triton, numpy)
    assert found is None if good else f"NumPy {numpy}" in found and "pip install 'numpy<2.4'" in found
