"""What the emulator computes against torch, and what its checks must find."""

import dataclasses
import re

import pytest
import torch

from ptxemu import driver, samples


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing found yet, and settings that go back to what they were."""
    monkeypatch.setattr(driver, "settings", dataclasses.replace(driver.settings, seed=0, inexact=False, count=True))
    driver.clear()
    yield
    driver.clear()


def kinds(everything=False):
    """The kinds of what was found."""
    return {f.kind.split()[0] for f in driver.findings if everything or not driver.harmless(f.kind)}


# ---- what is computed


@pytest.mark.parametrize("n", [1, 100, 4097])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int64", "float64"])
def test_add(n, dtype):
    x, y = ((torch.randn(n) * 9).to(getattr(torch, dtype)) for _ in range(2))
    z = torch.empty_like(x)
    samples.add[(-(-n // 256),)](x, y, z, n, B=256)
    assert torch.equal(z, x + y) and not kinds()


@pytest.mark.parametrize(("n", "warps"), [(5, 1), (64, 4), (777, 8), (777, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
@pytest.mark.parametrize("op", ["sum", "max", "cumsum", "sort", "argmax", "cumprod"])
def test_rows(op, dtype, n, warps):
    x = torch.randint(-50, 50, (3, n)).to(dtype)
    if op == "cumprod":
        x = x.sign()
    if op in ("sort", "argmax", "max"):  # distinct, and above what pads a row
        x = torch.stack([torch.randperm(n) + 1 for _ in range(3)]).to(dtype)
    of_rows = op in ("sum", "max", "argmax")
    out = torch.zeros(3, dtype=dtype) if of_rows else torch.zeros(3, n, dtype=dtype)
    width = max(16, 1 << (n - 1).bit_length())
    samples.row[(3,)](x, out, n, samples.OPERATIONS.index(op), width, num_warps=warps)
    if op == "sort":  # zeros in front
        x = torch.nn.functional.pad(x, (0, width - n)).sort(1).values[:, :n]
    wanted = {"sum": x.sum, "max": x.amax, "cumsum": x.cumsum, "sort": lambda _: x, "argmax": x.argmax,
              "cumprod": x.cumprod}[op](1)  # fmt: skip
    assert torch.equal(out, wanted.to(dtype)) and not kinds()


def test_softmax():
    x = torch.randn(3, 777)
    out = torch.empty_like(x)
    samples.softmax[(3,)](x, out, 777, 1024, num_warps=4)
    assert torch.allclose(out, x.softmax(1), rtol=1e-5, atol=1e-7) and not kinds()


def test_atomics():
    x = torch.randint(0, 10, (5000,), dtype=torch.int32)
    out = torch.zeros(10, dtype=torch.int32)
    samples.histogram[(20,)](x, out, 5000, B=256)
    assert torch.equal(out, torch.bincount(x, minlength=10).int())
    out = torch.zeros(1100, dtype=torch.int32)
    out[4] = -1
    samples.atomics[(4,)](out, B=256)
    parity = 0
    for i in range(1024):
        parity ^= i
    assert out[:5].tolist() == [1023, -1023, 2**31 - 1, parity, -(2**31)] and out[6 + 1024] > 0
    assert not kinds()


PRODUCTS = [("bfloat16", "ieee"), ("float16", "ieee"), ("float32", "tf32"), ("float32", "ieee"), ("float64", "ieee"),
            ("float32", "tf32x3")]  # fmt: skip


@pytest.mark.parametrize(("tile", "stages"), [((64, 64, 32), 3), ((128, 64, 64), 1), ((16, 16, 16), 3)])
@pytest.mark.parametrize(("dtype", "precision"), PRODUCTS)
def test_matmul(dtype, precision, tile, stages):
    if dtype == "float64" and tile[0] * tile[1] > 4096:
        pytest.skip("does not fit into shared memory")
    M, N, K = 100, 130, 150
    a, b = torch.randn(M, K).to(getattr(torch, dtype)), torch.randn(K, N).to(getattr(torch, dtype))
    for x in (a, a.t().contiguous().t()):
        c = torch.empty(M, N, dtype=torch.float64 if dtype == "float64" else torch.float32)
        grid = (-(-M // tile[0]), -(-N // tile[1]))
        samples.matmul[grid](x, b, c, M, N, K, *x.stride(), *b.stride(), precision, *tile, num_stages=stages)
        wanted = a.double() @ b.double()
        error = ((c.double() - wanted).norm() / wanted.norm()).item()
        assert error < (2e-3 if precision == "tf32" else 1e-6), error
    assert not kinds(), driver.summary()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_transpose(dtype):
    x = (torch.randn(64, 32) * 10).to(dtype)
    y = torch.empty(32, 64, dtype=dtype)
    samples.transpose[(1,)](x, y, 64, 32)
    assert torch.equal(y, x.t()) and not kinds()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_division(dtype):
    x, y = torch.randint(-30000, 30000, (512,)).to(dtype), torch.randint(1, 300, (512,)).to(dtype)
    if dtype == torch.int64:
        x[::3] *= 10**12
        y[::5] *= 10**10
    y[::2] *= -1
    q, r = torch.empty_like(x), torch.empty_like(x)
    samples.division[(2,)](x, y, q, r, B=256)
    assert torch.equal(q, torch.div(x, y, rounding_mode="trunc")) and torch.equal(r, torch.fmod(x, y)) and not kinds()


def test_casts():
    x = torch.randn(256) * 100
    dtypes = torch.int32, torch.float16, torch.bfloat16, torch.float64, torch.int8
    outs = [torch.empty(256, dtype=dtype) for dtype in dtypes]
    samples.casts[(1,)](x, *outs, B=256)
    for out, wanted in zip(outs, (x.int(), x.half(), x.bfloat16(), x.double() * 3, x.int().char()), strict=True):
        assert torch.equal(out, wanted)
    assert not kinds()


@pytest.mark.parametrize("inexact", [False, True])
def test_functions(inexact):
    driver.settings.inexact = inexact
    x, y = torch.randn(256), torch.empty(6 * 256)
    samples.functions[(1,)](x, y, B=256)
    a, d = x.abs(), x.double()
    last = (d * d + d + d / (d * d + 1) + d.abs()).float()
    wanted = torch.stack([x.exp(), a.log(), a.sqrt(), a.rsqrt(), x.floor() + x.ceil() * 3, last])
    assert torch.allclose(y.view(6, 256), wanted, rtol=1e-5, atol=1e-6) and not kinds()


def test_random_numbers_are_those_of_philox():
    out = torch.empty(128, dtype=torch.int32)
    key = 1234567890123
    samples.random[(1,)](out, key, B=64)
    for i in range(64):  # Philox 4x32-10, counter i
        c, k0, k1 = [i, 0, 0, 0], key & 0xFFFFFFFF, key >> 32
        for _ in range(10):
            a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(b >> 32) ^ c[1] ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k1, a & 0xFFFFFFFF]
            k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
        assert out[i].item() % 2**32 == c[0]
    assert not kinds()


# ---- what must be found


@pytest.mark.parametrize("seed", range(3))
def test_a_missing_barrier_is_found_and_shows(seed):
    driver.settings.seed = seed
    x = torch.arange(256.0)
    y, scratch = torch.zeros(256), torch.zeros(256)
    samples.through_memory[(1,)](x, scratch, y, True, B=256, num_warps=4)
    assert torch.equal(y, x.flip(0)) and not kinds()
    scratch.zero_()
    samples.through_memory[(1,)](x, scratch, y, False, B=256, num_warps=4)
    assert kinds() == {"race-warps"} and not torch.equal(y, x.flip(0))
    driver.clear()
    samples.through_memory[(1,)](x, scratch, y, False, B=32, num_warps=1)
    assert kinds() and kinds() <= {"race-lanes", "race-lanes/same-value"}


def test_races_between_programs_are_found():
    samples.neighbour[(4,)](torch.zeros(1024), B=128)
    assert kinds() == {"race-ctas"}


def test_lanes_that_store_different_values_in_one_place_are_found():
    x = torch.zeros(8, dtype=torch.int32)
    samples.same_place[(1,)](x, 0, B=128, num_warps=2)
    assert "race-lanes-same-instruction/same-value" in kinds(everything=True)
    driver.clear()
    samples.same_place[(1,)](x, 1, B=128, num_warps=2)
    assert "race-lanes-same-instruction" in kinds()


def test_an_atomic_against_a_load_is_found():
    x, y = torch.zeros(128, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    samples.plain_against_atomic[(1,)](x, y, B=256, num_warps=4)
    assert "race-warps" in kinds()


def test_accesses_out_of_bounds_are_found_and_not_carried_out():
    x, y, z = torch.ones(100), torch.ones(100), torch.zeros(100)
    samples.add[(1,)](x, y, z, 101, B=128)
    assert kinds() == {"oob-global-read", "oob-global-write"} and torch.equal(z, x + y)
    assert "z of 400 bytes" in driver.summary()


def test_memory_that_was_freed_is_out_of_bounds():
    x, y, z = torch.ones(100), torch.ones(100), torch.zeros(100)
    program = samples.add.warmup(x, y, z, 100, B=128, grid=(1,))
    address = x.data_ptr()
    del x
    types = ["*fp32", "*fp32", "*fp32", "i32"]
    driver.Program(text_of(program)).launch((1, 1, 1), 128, 0, types, [address, y, z, 100])
    assert "oob-global-read" in kinds()


def test_memory_that_nothing_wrote_is_found():
    x, y, z = torch.empty(100), torch.zeros(100), torch.zeros(100)
    x[:50] = 1
    samples.add[(1,)](x, y, z, 50, B=128)
    assert not kinds()
    samples.add[(1,)](x, y, z, 51, B=128)
    assert kinds() == {"uninit-global"}


def test_an_endless_loop_is_found():
    driver.settings.budget = 100_000
    with pytest.raises(driver.EmulatorError, match="an endless loop"):
        samples.endless[(1,)](torch.zeros(2, dtype=torch.int32))
    assert kinds() == {"budget"}


# ---- PTX of our own

HEAD = """.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k(.param .u64 p)
.reqntid 64
{
.reg .pred %p<9>; .reg .b32 %r<20>; .reg .b64 %rd<9>;
"""
OWN = "mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; "  # thread, and where its number is
STORE = OWN + "st.shared.u32 [%r2], %r1; "
OUT = "ld.param.u64 %rd1, [p]; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd1, %rd1, %rd2; "
LOAD = "xor.b32 %r3, %r2, {x}; ld.shared.u32 %r4, [%r3]; " + OUT + "st.global.u32 [%rd1], %r4;"
COPY = OWN + OUT + "cp.async.ca.shared.global [%r2], [%rd1], 4; cp.async.commit_group; "


def raw(body, threads=64, shared=1024):
    """Run a kernel of 64 threads, and return what it stores."""
    out = torch.zeros(threads, dtype=torch.int32)
    driver.Program(HEAD + body + "\nret;\n}\n").launch((1, 1, 1), threads, shared, ["*i32"], [out])
    return out


def found(body):
    driver.clear()
    raw(body)
    return kinds()


def test_shared_memory():
    assert raw(STORE + "bar.sync 0;" + LOAD.format(x=128)).tolist() == [i ^ 32 for i in range(64)] and not kinds()
    assert "race-warps" in found(STORE + LOAD.format(x=128))
    assert found(STORE + LOAD.format(x=4)) == {"race-lanes"}
    assert not found(STORE + "bar.warp.sync -1;" + LOAD.format(x=4))
    assert found(OWN + LOAD.format(x=128)) == {"uninit-shared"}
    assert found(STORE + "bar.sync 0;" + LOAD.format(x=1024)) == {"oob-shared-read"}
    assert "misaligned-shared" in found(STORE + "bar.sync 0;" + LOAD.format(x=1))


def test_asynchronous_copies():
    use = "bar.sync 0; ld.shared.u32 %r4, [%r2]; xor.b32 %r3, %r2, 128; ld.shared.u32 %r4, [%r3];"
    assert "race-async" in found(COPY + "cp.async.wait_group 1;" + use)
    assert not found(COPY + "cp.async.wait_group 0;" + use)
    assert not found(COPY + "cp.async.wait_all;" + use)
    assert "race-warps" in found(COPY + "cp.async.wait_group 0; xor.b32 %r3, %r2, 128; ld.shared.u32 %r4, [%r3];")


def test_barriers():
    some = OWN + "setp.lt.u32 %p1, %r1, {n}; @%p1 bra L; "
    end = " L: mov.u32 %r2, 0;"
    assert not found(some.format(n=32) + "bar.sync 0; ret;" + end), "threads that have ended do not count"
    with pytest.raises(driver.EmulatorError, match="wait for the barrier"):
        found(some.format(n=32) + "bar.sync 0; bra M; L: bar.sync 1; M: mov.u32 %r2, 0;")
    assert "deadlock" in kinds()
    with pytest.raises(driver.EmulatorError, match="wait for the barrier"):
        found(some.format(n=16) + "bar.sync 0;" + end)
    assert {"deadlock", "barrier-divergence"} <= kinds()
    lane = "mov.u32 %r1, %laneid; setp.lt.u32 %p1, %r1, 16; @%p1 bra L; shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;"
    with pytest.raises(driver.EmulatorError, match="wait to converge"):
        found(lane + end)


def test_lanes_that_part_meet_again():
    """Loops with a different number of turns in each lane, and branches within."""
    body = """
    mov.u32 %r1, %tid.x; and.b32 %r5, %r1, 7; mov.u32 %r6, 0;
    A: setp.eq.u32 %p1, %r5, 0; @%p1 bra B;
    add.s32 %r6, %r6, %r5; sub.s32 %r5, %r5, 1; and.b32 %r7, %r5, 1;
    setp.eq.u32 %p2, %r7, 0; @%p2 bra C; add.s32 %r6, %r6, 100; bra A;
    C: add.s32 %r6, %r6, 1000; bra A;
    B: shfl.sync.bfly.b32 %r4, %r6, 1, 31, -1; bar.sync 0;
    """

    def total(k):
        return sum(i + (1000 if i % 2 else 100) for i in range(1, k + 1))

    for driver.settings.seed in range(5):
        assert raw(body + OUT + "st.global.u32 [%rd1], %r4;").tolist() == [total((i ^ 1) & 7) for i in range(64)]
        assert not kinds()


def signed(a):
    return a - (a >> 31 << 32)


INTEGERS = {  # %r4 from %r1 and %r2: the same in Python
    "bfe.u32 %r4, %r1, 5, 9": lambda a, b: a >> 5 & 511,
    "bfe.s32 %r4, %r1, 28, 9": lambda a, b: (a >> 28) - (16 if a >> 31 else 0),
    "prmt.b32 %r4, %r1, %r2, 0x7412": lambda a, b: sum(
        ((b << 32 | a) >> 8 * byte & 255) << 8 * i for i, byte in enumerate((2, 1, 4, 7))
    ),
    "lop3.b32 %r4, %r1, %r2, %r1, 0x96": lambda a, b: b,
    "lop3.b32 %r4, %r1, %r2, 0, 0x50": lambda a, b: a,
    "mul.hi.u32 %r4, %r1, %r2": lambda a, b: a * b >> 32,
    "mul.hi.s32 %r4, %r1, %r2": lambda a, b: signed(a) * signed(b) >> 32,
    "mad.lo.s32 %r4, %r1, %r2, %r1": lambda a, b: a * b + a,
    "shf.l.wrap.b32 %r4, %r1, %r2, 7": lambda a, b: ((b << 32 | a) << 7) >> 32,
    "shr.s32 %r4, %r1, 40": lambda a, b: -1 if a >> 31 else 0,
    "shl.b32 %r4, %r1, 33": lambda a, b: 0,
    "popc.b32 %r4, %r1": lambda a, b: a.bit_count(),
    "clz.b32 %r4, %r1": lambda a, b: 32 - a.bit_length(),
    "brev.b32 %r4, %r1": lambda a, b: int(f"{a:032b}"[::-1], 2),
    "max.s32 %r4, %r1, %r2": lambda a, b: max(signed(a), signed(b)),
    "copysign.f32 %r4, %r1, %r2": lambda a, b: (a & 1 << 31) | (b & 0x7FFFFFFF),
}


@pytest.mark.parametrize("text", INTEGERS)
def test_integers(text):
    draw = "mul.lo.u32 %r5, %r1, 2654435761; xor.b32 %r5, %r5, 0x5bd1e995; mul.lo.u32 %r6, %r5, 40503;"
    body = OWN + OUT + draw + "add.u32 %r2, %r6, 0x9e3779b9; mov.u32 %r1, %r5;" + text + "; st.global.u32 [%rd1], %r4;"
    for i, out in enumerate(raw(body).tolist()):
        a = i * 2654435761 % 2**32 ^ 0x5BD1E995
        b = (a * 40503 + 0x9E3779B9) % 2**32
        assert out % 2**32 == INTEGERS[text](a, b) % 2**32


def test_what_is_not_implemented_is_said():
    with pytest.raises(driver.EmulatorError, match="mbarrier.init"):
        raw("mbarrier.init.shared.b64 [%r1], 1;")


def test_bank_conflicts_and_sectors_are_counted():
    for stride, conflicts in ((4, 0), (8, 1), (128, 31), (132, 0), (0, 0)):
        raw(f"mov.u32 %r1, %tid.x; mul.lo.u32 %r2, %r1, {stride}; st.shared.u32 [%r2], %r1;", 32, 8192)
        counts = driver.launches[-1].counts
        assert counts["bank conflicts"] == conflicts and counts["st.shared"] == 1
    x, y, z = (torch.zeros(4096) for _ in range(3))
    samples.add[(1,)](x, y, z, 1024, B=1024, num_warps=4)
    counts = driver.launches[-1].counts
    assert counts["ld.global sectors"] == 256 and counts["st.global sectors"] == 128


def text_of(compiled):
    ptx = compiled.asm["ptx"]
    return ptx.decode() if isinstance(ptx, bytes) else ptx


def test_what_is_missing_in_a_pipelined_product_is_found():
    a, b, c = torch.randn(64, 128).bfloat16(), torch.randn(128, 64).bfloat16(), torch.zeros(64, 64)
    arguments = {"a": a, "b": b, "c": c, "M": 64, "N": 64, "K": 128, "sam": 128, "sak": 1, "sbk": 64, "sbn": 1}
    constants = {"PREC": "ieee", "BM": 64, "BN": 64, "BK": 32}
    compiled = samples.matmul.warmup(**arguments, **constants, grid=(1,), num_stages=3)
    signature = {name: form for name, form in compiled.src.signature.items() if form != "constexpr"}
    ptx = text_of(compiled)

    def run(text):
        driver.clear()
        values = [arguments[name] for name in signature]
        driver.Program(text).launch((1, 1, 1), 128, compiled.metadata.shared, [*signature.values()], values)
        right = torch.allclose(c, a.float() @ b.float(), rtol=1e-4, atol=1e-3)
        return right, {kind.split("/")[0] for kind in kinds()}

    assert run(ptx) == (True, set())
    assert "race-warps" in run(ptx.replace("bar.sync \t0;", ""))[1]
    right, kind = run(re.sub(r"cp\.async\.wait_group \t(\d);", "", ptx))
    assert "race-async" in kind and not right
    if "wgmma" in ptx:
        run(re.sub(r"fence\.proxy\.async\S*;", "", ptx))
        assert "proxy-fence-missing" in {f.kind for f in driver.findings}
        wait = "wgmma.wait_group.sync.aligned "
        assert "race-wgmma" in run(re.sub(re.escape(wait) + r"(\d);", wait + "7;", ptx))[1]
