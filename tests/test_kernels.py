"""Every kernel compiles for the GPUs we support, without one at hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Apart from this process, in which Triton interprets kernels instead of compiling them.
COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from reprune_triton.kernels import gather

signature = {"weight_ptr": "*fp32", "rows_ptr": "*i64", "cols_ptr": "*i64", "out_ptr": "*fp32", "keep_in": "i32",
             "k": "i32", "stride_row": "i32", "stride_col": "i32", "BLOCK": "constexpr"}
source = ASTSource(gather._gather_kernel, signature, constexprs={"BLOCK": gather.BLOCK})
kernel = compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 4})
print(len(kernel.asm["cubin"]))
"""


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_ahead_of_time(capability):
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)],
        env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000
