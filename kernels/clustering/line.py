"""Ward clustering of points on a line (1x1 kernels): sort, then merge neighbours at all local minima, in rounds."""

import triton
import triton.language as tl

from reprune_triton.kernels.clustering import table

PAD, PAD_END = tl.constexpr(2), tl.constexpr(3)  # places before the first cluster and after the last


def scratch(n: int) -> tuple[int, int]:
    """Return the floats (mean, inverse, size, newest; each twice) and ints (lowest, twice)."""
    room = n + PAD.value + PAD_END.value
    return 8 * room, 2 * room


@triton.jit
def _gap(x, inverse_x, y, inverse_y):
    """Return the merge height I(A, B) of two neighbours, from their means x, y and 1 / size. Any one shape."""
    step = y - x
    root = tl.rsqrt(inverse_x + inverse_y)
    return step * step * (root * root)


@triton.jit
def _goes_first(left, middle, right, even):
    """Return whether the middle one of three gaps is a local minimum; of equal gaps the even one counts as smaller."""
    return ((middle < left) | ((middle == left) & even)) & ((middle < right) | ((middle == right) & even))


@table.kernel
def line_kernel(
    table_ptr, owner_ptr, report_ptr,
    parent_ptr, height_ptr, work_ptr,  # results
    floats_ptr, ints_ptr,  # scratch memory
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cluster the n numbers of one input channel, by one program: parent and height of every point (see ops.Merges).

    Clusters are intervals of the sorted line, and a cluster's nearest stands beside it. The gap I(A, B) between two
    neighbours only grows when A or B merges with another. So a gap that is smaller than both gaps beside it is merged
    before these, and all such gaps can go at once: about 20 rounds, each over the clusters that are left.

    WIDTH is a power of two, at least n.

    Ties: points are sorted by value, then by index. Of equal gaps side by side the one at an even place goes first: in
    a run of equal gaps every other one, so there is always a gap to merge. A program that finds none stops and says so
    in the report. Any other round ends a cluster, so the loop is bounded.

    Before the first cluster and after the last stand infinities of alternating sign, which make every gap infinite: so
    a cluster need not ask whether it has neighbours.

    No race. All state is in scratch memory of this program alone, in two copies: a round reads one and writes the
    other, and ends in a barrier, after which they change roles. Survivors are numbered by a cumulative sum, so two
    threads never write one place of a copy. A cluster dies once, so they never write one place of parent or height,
    which are not read.

    Precision: float32, by direct differences. 1 / (1/|A| + 1/|B|) is the square of a reciprocal square root, at 2 ulp.
    Heights along a path are kept in order by a maximum, since rounding is not.
    """
    row_ptr, number, n, d, scale, parent_ptr, height_ptr, floats_ptr, ints_ptr = table.begin_problem(
        table_ptr, owner_ptr, report_ptr, parent_ptr, height_ptr, floats_ptr, ints_ptr
    )
    # Where the arrays begin, each in two copies of `room` places, with cluster 0 at place PAD.
    room = n + (PAD + PAD_END)
    mean_ptr, inverse_ptr = floats_ptr + PAD, floats_ptr + PAD + 2 * room
    size_ptr, newest_ptr, lowest_ptr = floats_ptr + PAD + 4 * room, floats_ptr + PAD + 6 * room, ints_ptr + PAD

    # Sort (value, index) as one integer: with the bits of negative floats flipped, integers compare as floats do.
    point = tl.arange(0, WIDTH)  # [WIDTH]
    exists = point < n
    value = table.read(row_ptr, table.point_offsets(row_ptr, number, point, exists), exists) * scale  # [WIDTH]
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.sort(tl.where(exists, (bits.to(tl.int64) << 32) | point.to(tl.int64), 0x7FFFFFFFFFFFFFFF))
    bits = (key >> 32).to(tl.int32)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    one = tl.full((WIDTH,), 1.0, tl.float32)
    tl.store(mean_ptr + point, bits.to(tl.float32, bitcast=True), mask=exists)
    tl.store(inverse_ptr + point, one, mask=exists)
    tl.store(size_ptr + point, one, mask=exists)
    tl.store(newest_ptr + point, one * 0.0, mask=exists)
    tl.store(lowest_ptr + point, (key & 0xFFFFFFFF).to(tl.int32), mask=exists)
    tl.store(parent_ptr + point, point, mask=exists)
    tl.store(height_ptr + point, one * float("inf"), mask=exists)
    pad = tl.arange(0, 4)  # [4], of which PAD or PAD_END are used
    pad_mean = tl.where((pad & 1) == 0, float("inf"), float("-inf"))
    pad_inverse = tl.full((4,), 1.0, tl.float32)
    for copy in range(0, tl.where(n > 0, 2 * room, 0), room):
        tl.store(mean_ptr + copy - PAD + pad, pad_mean, mask=pad < PAD)
        tl.store(inverse_ptr + copy - PAD + pad, pad_inverse, mask=pad < PAD)
    tl.store(mean_ptr + n + pad, pad_mean, mask=(pad < PAD_END) & (n > 0))
    tl.store(inverse_ptr + n + pad, pad_inverse, mask=(pad < PAD_END) & (n > 0))
    tl.debug_barrier()

    m = n
    now = 0  # where the copy that is read begins
    rounds = 0
    blocks = 0
    merged = 1
    while (m > 1) & (merged > 0):
        then = room - now
        left = 0
        for begin in range(0, m, BLOCK):
            i = begin + tl.arange(0, BLOCK)  # [BLOCK]
            live = i < m
            at = now + tl.minimum(i, m)  # [BLOCK], as all that follow
            x0, x1, x2 = tl.load(mean_ptr + at - 2), tl.load(mean_ptr + at - 1), tl.load(mean_ptr + at)
            x3, x4 = tl.load(mean_ptr + at + 1), tl.load(mean_ptr + at + 2)
            v0, v1, v2 = tl.load(inverse_ptr + at - 2), tl.load(inverse_ptr + at - 1), tl.load(inverse_ptr + at)
            v3, v4 = tl.load(inverse_ptr + at + 1), tl.load(inverse_ptr + at + 2)
            before, gap = _gap(x1, v1, x2, v2), _gap(x2, v2, x3, v3)
            even = (i & 1) == 0
            lead = live & (gap < float("inf")) & _goes_first(before, gap, _gap(x3, v3, x4, v4), even)
            dies = live & (before < float("inf")) & _goes_first(_gap(x0, v0, x1, v1), before, gap, even == 0)
            stays = live & (dies == 0)
            to = then + left + tl.cumsum(stays.to(tl.int32), 0) - 1

            own, other = tl.load(lowest_ptr + at, mask=live, other=0), tl.load(lowest_ptr + at + 1, mask=lead, other=0)
            low, high = tl.minimum(own, other), tl.maximum(own, other)
            own_newest = tl.load(newest_ptr + at, mask=live, other=0.0)
            top = tl.maximum(gap, tl.maximum(own_newest, tl.load(newest_ptr + at + 1, mask=lead, other=0.0)))
            tl.store(parent_ptr + high, low, mask=lead)
            tl.store(height_ptr + high, top, mask=lead)

            a, b = tl.load(size_ptr + at, mask=live, other=1.0), tl.load(size_ptr + at + 1, mask=lead, other=0.0)
            inverse = 1.0 / (a + b)
            tl.store(mean_ptr + to, tl.fma(b * inverse, tl.where(lead, x3 - x2, 0.0), x2), mask=stays)
            tl.store(inverse_ptr + to, inverse, mask=stays)
            tl.store(size_ptr + to, a + b, mask=stays)
            tl.store(newest_ptr + to, tl.where(lead, top, own_newest), mask=stays)
            tl.store(lowest_ptr + to, tl.where(lead, low, own), mask=stays)
            left += tl.sum(stays.to(tl.int32), 0)
            blocks += 1
        tl.store(mean_ptr + then + left + pad, pad_mean, mask=pad < PAD_END)
        tl.store(inverse_ptr + then + left + pad, pad_inverse, mask=pad < PAD_END)
        tl.debug_barrier()
        merged = m - left
        m = left
        now = then
        rounds += 1

    table.end_problem(row_ptr, number, report_ptr, work_ptr, rounds, blocks, m)
