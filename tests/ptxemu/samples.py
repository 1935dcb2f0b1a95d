"""Kernels for the tests of the emulator, right and wrong ones."""

import triton
import triton.language as tl


@triton.jit
def add(x, y, z, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(z + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


OPERATIONS = ("sum", "max", "argmax", "cumsum", "cumprod", "sort")


@triton.jit
def row(x, out, n, OP: tl.constexpr, B: tl.constexpr):
    """One of OPERATIONS on a row of n numbers, behind which are zeros."""
    i = tl.arange(0, B)
    v = tl.load(x + tl.program_id(0) * n + i, mask=i < n, other=0)
    if OP == 0:
        tl.store(out + tl.program_id(0), tl.sum(v, 0))
    elif OP == 1:
        tl.store(out + tl.program_id(0), tl.max(v, 0))
    elif OP == 2:
        tl.store(out + tl.program_id(0), tl.argmax(v, 0))
    elif OP == 3:
        tl.store(out + tl.program_id(0) * n + i, tl.cumsum(v, 0), mask=i < n)
    elif OP == 4:
        tl.store(out + tl.program_id(0) * n + i, tl.cumprod(v, 0), mask=i < n)
    elif OP == 5:
        tl.store(out + tl.program_id(0) * n + i, tl.sort(v), mask=i < n)


@triton.jit
def softmax(x, out, n, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + tl.program_id(0) * n + i, mask=i < n, other=float("-inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(out + tl.program_id(0) * n + i, e / tl.sum(e, 0), mask=i < n)


@triton.jit
def histogram(x, out, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.atomic_add(out + tl.load(x + i, mask=i < n, other=0), 1, mask=i < n)


@triton.jit
def atomics(out, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.atomic_max(out + 0 * i, i)
    tl.atomic_min(out + 1 + 0 * i, -i)
    tl.atomic_or(out + 2 + 0 * i, 1 << (i % 31))
    tl.atomic_xor(out + 3 + 0 * i, i)
    tl.atomic_and(out + 4 + 0 * i, ~(1 << (i % 31)))
    tl.atomic_cas(out + 6 + 0 * i + B * tl.num_programs(0), 0 * i, i + 1)


@triton.jit
def matmul(
    a, b, c, M, N, K, sam, sak, sbk, sbn, PREC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """c = a @ b."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), c.dtype.element_ty if c.dtype.element_ty == tl.float64 else tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(a + m[:, None] * sam + k[None, :] * sak, mask=(m < M)[:, None] & (k < K)[None, :], other=0)
        y = tl.load(b + k[:, None] * sbk + n[None, :] * sbn, mask=(k < K)[:, None] & (n < N)[None, :], other=0)
        acc = tl.dot(x, y, acc, input_precision=PREC, out_dtype=acc.dtype)
    tl.store(c + m[:, None] * N + n[None, :], acc.to(c.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def transpose(x, y, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    tl.store(y + n[:, None] * M + m[None, :], tl.trans(tl.load(x + m[:, None] * N + n[None, :])))


@triton.jit
def division(x, y, q, r, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(q + i, a // b)
    tl.store(r + i, a % b)


@triton.jit
def casts(x, i32, f16, bf16, f64, i8, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.store(i32 + i, v.to(tl.int32))
    tl.store(f16 + i, v.to(tl.float16))
    tl.store(bf16 + i, v.to(tl.bfloat16))
    tl.store(f64 + i, v.to(tl.float64) * 3)
    tl.store(i8 + i, v.to(tl.int32).to(tl.int8))


@triton.jit
def functions(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.store(y + i, tl.exp(v))
    tl.store(y + B + i, tl.log(tl.abs(v)))
    tl.store(y + 2 * B + i, tl.sqrt(tl.abs(v)))
    tl.store(y + 3 * B + i, tl.rsqrt(tl.abs(v)))
    tl.store(y + 4 * B + i, tl.floor(v) + tl.ceil(v) * 3)
    tl.store(y + 5 * B + i, tl.fma(v, v, v) + tl.div_rn(v, v * v + 1) + tl.sqrt_rn(v * v))


@triton.jit
def random(out, seed, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(out + i, tl.randint(seed, i))
    tl.store(out + B + i, tl.rand(seed, i).to(tl.int32, bitcast=True))


@triton.jit
def through_memory(x, scratch, y, BARRIER: tl.constexpr, B: tl.constexpr):
    """y = x reversed, by way of global memory."""
    i = tl.arange(0, B)
    tl.store(scratch + i, tl.load(x + i))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y + i, tl.load(scratch + B - 1 - i))


@triton.jit
def neighbour(x, B: tl.constexpr):
    """Between programs: each writes what the next one reads."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + B + i)
    tl.store(x + i, v + 1)


@triton.jit
def same_place(x, VALUE: tl.constexpr, B: tl.constexpr):
    """64 lanes store in each place: all the same, or each its own number times VALUE."""
    i = tl.arange(0, B)
    tl.store(x + i // 64, i * VALUE)


@triton.jit
def plain_against_atomic(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.atomic_add(x + i // 2, 1)
    tl.store(y + i, tl.load(x + (B - 1 - i) // 2))


@triton.jit
def endless(x):
    while tl.load(x) == 0:
        tl.atomic_add(x + 1, 1)
