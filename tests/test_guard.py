"""Interpreted kernels run between red zones: what they store beside a tensor fails the launch."""

import guard
import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")


@triton.jit
def shift_kernel(x_ptr, y_ptr, n, BY: tl.constexpr, BLOCK: tl.constexpr):
    """y[i + BY] = x[i]."""
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i + BY, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def twice(x):
    return tl.sum(x + x)


@triton.jit
def sums_kernel(x_ptr, y_ptr, ROUNDS: tl.constexpr):
    for _ in range(ROUNDS):
        tl.store(y_ptr, tl.load(y_ptr) + twice(tl.load(x_ptr + tl.arange(0, 4))))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("n", [1, 7, 64])
def test_what_is_stored_beside_a_tensor_is_seen(n, dtype):
    x, y = torch.arange(1, n + 1).to(dtype), torch.zeros(n, dtype=dtype)
    shift_kernel[(1,)](x, y, n, BY=0, BLOCK=64)
    assert torch.equal(x, y)
    with pytest.raises(AssertionError, match="shift_kernel changed .* bytes behind y_ptr, which has"):
        shift_kernel[(1,)](x, y, n, BY=1, BLOCK=64)
    with pytest.raises(AssertionError, match="changed .* bytes in front of y_ptr"):
        shift_kernel[(1,)](x, y, n, BY=-1, BLOCK=64)


def test_views_share_their_storage():
    whole = torch.arange(12.0).view(3, 4)
    x, y = whole[1], whole[2, 1:]
    shift_kernel[(1,)](x_ptr=x, y_ptr=y, n=3, BY=0, BLOCK=4)
    assert whole.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 4, 5, 6]]
    shift_kernel[(1,)](whole, whole[1], 4, BY=-4, BLOCK=4)  # into another row, within the storage
    with pytest.raises(AssertionError, match="behind x_ptr, which has 48"):
        shift_kernel[(1,)](whole, whole[2], 4, BY=1, BLOCK=4)


def test_a_tensor_without_elements():
    shift_kernel[(1,)](torch.ones(4), torch.empty(0), 0, BY=0, BLOCK=4)


def test_what_is_read_beside_a_tensor_is_no_number():
    y = torch.zeros(8)
    shift_kernel[(1,)](torch.ones(4), y, 8, BY=0, BLOCK=8)
    assert y[:4].tolist() == [1] * 4 and y[4:].isnan().all()


def test_every_interpreted_launch_is_guarded():
    assert triton.runtime.interpreter.GridExecutor is guard.Guarded


def test_the_language_is_patched_once_a_launch(monkeypatch):
    """However often functions call others; in the next launch again, and nothing is left of it in `tl`."""
    patched, patch = [], guard._patch
    monkeypatch.setattr(guard, "_patch", lambda fn: patched.append(fn.__module__) or patch(fn))
    own, total = tl.load, torch.zeros(1)
    for launches in (1, 2):
        sums_kernel[(3,)](torch.ones(4), total, ROUNDS=5)
        assert total == launches * 3 * 5 * 8 and tl.load is own
        assert patched.count(__name__) == launches and len(patched) == launches * len(set(patched))
