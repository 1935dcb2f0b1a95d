"""Gather the kept filters and input channels of a weight into a dense, narrow one.

out[i, j] = weight[rows[i], cols[j]]            (n_out, n_in, k) -> (keep_out, keep_in, k), k = kh * kw
"""

import torch
import triton
import triton.language as tl

from reprune_triton.errors import RepruneError

BLOCK = 256  # elements of one output row [keep_in * k] a program copies at a time


@triton.jit
def _gather_kernel(
    weight_ptr, rows_ptr, cols_ptr, out_ptr,
    keep_in, k,
    stride_row, stride_col,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    row = tl.load(rows_ptr + i).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = offs < keep_in * k
    col = tl.load(cols_ptr + offs // k, mask=inside, other=0).to(tl.int64)
    value = tl.load(weight_ptr + row * stride_row + col * stride_col + offs % k, mask=inside)
    tl.store(out_ptr + i.to(tl.int64) * keep_in * k + offs, value, mask=inside)


def gather(weight: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """The narrow copy `weight[rows][:, cols]`; bit for bit, with no tie or rounding to decide."""
    if weight.dim() < 2 or not weight.is_contiguous():
        raise RepruneError(f"gather needs a contiguous weight (n_out, n_in, ...), not {tuple(weight.shape)}: call "
                           "weight.contiguous() first")  # fmt: skip
    k = weight[0, 0].numel()
    out = weight.new_empty(len(rows), len(cols), *weight.shape[2:])
    if out.numel():
        grid = (len(rows), triton.cdiv(len(cols) * k, BLOCK))
        _gather_kernel[grid](
            weight, rows, cols, out, len(cols), k, weight.stride(0), weight.stride(1), BLOCK=BLOCK, num_warps=4
        )
    return out
