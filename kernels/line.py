"""Ward clustering of points on a line (1x1 kernels): sort, then merge all adjacent local minima, round by round."""

import triton
import triton.language as tl

from reprune_triton.kernels import table

FLOATS_PER_POINT = 6  # mean, size, newest; each twice
INTS_PER_POINT = 2  # lowest, twice


@triton.jit
def _gap(mean, size, k, m):
    """How much merging the clusters k and k + 1 [BLOCK] would add to the within-cluster SSE; infinite where the line
    of m clusters ends."""
    exists = (k >= 0) & (k + 1 < m)
    a = tl.load(size + k, mask=exists, other=1.0)
    b = tl.load(size + k + 1, mask=exists, other=1.0)
    step = tl.load(mean + k + 1, mask=exists, other=0.0) - tl.load(mean + k, mask=exists, other=0.0)
    return tl.where(exists, step * step * (a * b / (a + b)), float("inf"))


@triton.jit
def _goes_first(left, middle, right, even):
    """Is the middle one of three gaps a local minimum, where of equal neighbours the even one counts as smaller?"""
    return ((middle < left) | ((middle == left) & even)) & ((middle < right) | ((middle == right) & even))


@table.kernel
def line_kernel(
    table_ptr, owner_ptr, report_ptr,
    parent_ptr, height_ptr, work_ptr,
    floats_ptr, ints_ptr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program clusters the n numbers of one input channel: absorption forest parent, height (see ops.Merges).

    Clusters are intervals of the sorted line, and nearest neighbours are adjacent. A gap I(A, B) between neighbours
    only grows when A or B merges with someone else. So a gap smaller than both gaps beside it is merged before they
    are, and all such gaps can go at once: about 20 rounds, each over the clusters that are left.

    WIDTH is a power of two, at least n.

    Ties: points are sorted by value, then by index. Of equal gaps side by side the one at an even place goes first, so
    a run of them has one in every two, and there is always a gap to merge. A program without one stops and says so in
    the report; every other round ends a cluster, so the loop is bounded.

    No race. All state is in scratch memory of this program alone, in two copies: a round reads one and writes the
    other, and ends in a barrier, after which they change roles. Survivors are numbered by a cumulative sum, so no two
    threads write one place; a cluster dies once, so nor do they in parent and height, which are only written.

    Precision: float32, by direct differences. Heights along a path are kept in order by a maximum.
    """
    row_ptr, number, n, d, scale, parent_ptr, height_ptr, floats_ptr, ints_ptr = table.begin_problem(
        table_ptr, owner_ptr, report_ptr, parent_ptr, height_ptr, floats_ptr, ints_ptr
    )
    mean_ptr, size_ptr, newest_ptr, lowest_ptr = floats_ptr, floats_ptr + 2 * n, floats_ptr + 4 * n, ints_ptr

    # Sort (value, index) as one integer: flip the bits of negative floats and integers compare as the floats do.
    point = tl.arange(0, WIDTH)  # [WIDTH]
    exists = point < n
    value = table.read(row_ptr, table.point_offsets(row_ptr, number, point, exists), exists) * scale
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.sort(tl.where(exists, (bits.to(tl.int64) << 32) | point.to(tl.int64), 0x7FFFFFFFFFFFFFFF))
    bits = (key >> 32).to(tl.int32)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    tl.store(mean_ptr + point, bits.to(tl.float32, bitcast=True), mask=exists)
    tl.store(lowest_ptr + point, (key & 0xFFFFFFFF).to(tl.int32), mask=exists)
    tl.store(size_ptr + point, tl.full((WIDTH,), 1.0, tl.float32), mask=exists)
    tl.store(newest_ptr + point, tl.full((WIDTH,), 0.0, tl.float32), mask=exists)
    tl.store(parent_ptr + point, point, mask=exists)
    tl.store(height_ptr + point, tl.full((WIDTH,), float("inf"), tl.float32), mask=exists)
    tl.debug_barrier()

    m = n
    now = 0  # which copy is read
    rounds = 0
    blocks = 0
    merged = 1
    while (m > 1) & (merged > 0):
        mean, size, newest, lowest = mean_ptr + now * n, size_ptr + now * n, newest_ptr + now * n, lowest_ptr + now * n
        then = 1 - now
        left = 0
        for begin in range(0, m, BLOCK):
            i = begin + tl.arange(0, BLOCK)  # [BLOCK]
            live = i < m
            even = (i & 1) == 0
            gap = _gap(mean, size, i, m)
            gap_before = _gap(mean, size, i - 1, m)
            lead = live & (gap < float("inf")) & _goes_first(gap_before, gap, _gap(mean, size, i + 1, m), even)
            dies = live & (gap_before < float("inf"))
            dies = dies & _goes_first(_gap(mean, size, i - 2, m), gap_before, gap, even == 0)
            stays = live & (dies == 0)
            to = left + tl.cumsum(stays.to(tl.int32), 0) - 1

            own, other = tl.load(lowest + i, mask=live, other=0), tl.load(lowest + i + 1, mask=lead, other=0)
            low, high = tl.minimum(own, other), tl.maximum(own, other)
            own_newest = tl.load(newest + i, mask=live, other=0.0)
            top = tl.maximum(gap, tl.maximum(own_newest, tl.load(newest + i + 1, mask=lead, other=0.0)))
            tl.store(parent_ptr + high, low, mask=lead)
            tl.store(height_ptr + high, top, mask=lead)

            a, b = tl.load(size + i, mask=live, other=1.0), tl.load(size + i + 1, mask=lead, other=0.0)
            x, y = tl.load(mean + i, mask=live, other=0.0), tl.load(mean + i + 1, mask=lead, other=0.0)
            tl.store(mean_ptr + then * n + to, tl.where(lead, tl.fma(b / (a + b), y - x, x), x), mask=stays)
            tl.store(size_ptr + then * n + to, a + b, mask=stays)
            tl.store(newest_ptr + then * n + to, tl.where(lead, top, own_newest), mask=stays)
            tl.store(lowest_ptr + then * n + to, tl.where(lead, low, own), mask=stays)
            left += tl.sum(stays.to(tl.int32), 0)
            blocks += 1
        tl.debug_barrier()
        merged = m - left
        m = left
        now = then
        rounds += 1

    table.end_problem(row_ptr, number, report_ptr, work_ptr, rounds, blocks, m)
