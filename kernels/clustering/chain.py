"""Clustering by a nearest-neighbour chain: for all linkages and for small problems; the classical algorithm."""

import triton
import triton.language as tl

from reprune_triton.kernels.clustering import table

LINKAGES = {"ward": 0, "single": 1, "complete": 2, "average": 3}
WARD, SINGLE, COMPLETE, AVERAGE = (tl.constexpr(number) for number in LINKAGES.values())


def scratch(linkage: str, n: int, d: int) -> tuple[int, int]:
    """Return the floats (mean (d), size, newest; for linkages other than ward all distances) and ints (the chain)."""
    return (d + 2) * n + (n * n if linkage != "ward" else 0), n


@triton.jit
def _add_square(total, point, k, n, i, inside, tip):
    """Return total [BLOCK] + (x_i - x_tip)^2 for coordinate k."""
    step = tl.load(point + k * n + i, mask=inside, other=0.0) - tl.load(point + k * n + tip)
    return tl.fma(step, step, total)


@triton.jit
def _squared_distances(point, n, d, i, inside, tip, D: tl.constexpr):
    """Return ||x_i - x_tip||^2 for i [BLOCK]. Coordinates are in ascending order: the same bits from either end."""
    total = i.to(tl.float32) * 0.0  # [BLOCK]
    if D > 0:
        for k in tl.static_range(D):
            total = _add_square(total, point, k, n, i, inside, tip)
    else:
        for k in range(d):
            total = _add_square(total, point, k, n, i, inside, tip)
    return total


@triton.jit
def _lance_williams(of_a, of_b, a, b, LINKAGE: tl.constexpr):
    """Return d(A + B, C) [BLOCK] from d(A, C), d(B, C) [BLOCK] and the sizes of A and B."""
    if LINKAGE == SINGLE:
        merged = tl.minimum(of_a, of_b)
    elif LINKAGE == COMPLETE:
        merged = tl.maximum(of_a, of_b)
    else:
        tl.static_assert(LINKAGE == AVERAGE, "a linkage without a formula")
        merged = (a * of_a + b * of_b) / (a + b)
    return merged


@table.kernel
def chain_kernel(
    table_ptr, owner_ptr, report_ptr,
    parent_ptr, height_ptr, work_ptr,  # results
    floats_ptr, ints_ptr,  # scratch memory
    LINKAGE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cluster the n kernels of one input channel, by one program: parent and height of every point (see ops.Merges).

    A chain begins anywhere and goes from a cluster to its nearest. Distances along it only fall, so it ends in two
    clusters that are each other's nearest. These merge, and the chain goes on from the one before them, as reducible
    linkages allow (Murtagh 1983; SciPy's `nn_chain`). About 3 n searches of up to n distances, one after the other.

    Ward keeps means, and distances are computed when needed: I(A, B) = |A||B| / (|A| + |B|) * ||m_A - m_B||^2. The
    other linkages keep all n x n Euclidean distances and update them by Lance and Williams (1967).

    D is kh * kw where that is unrolled, 0 where it is read from the table.

    Ties: the cluster before in the chain wins, so that the chain ends; then the lowest. A merged cluster has the place
    of the lower of the two, so cluster 0 never dies. A chain is lost if its tip has merged, or if it is longer than
    there are clusters; only rounding can bring that about. It begins again at cluster 0. A program that needs more than
    n (n + 1) searches, which no order of merges does, stops and says so in the report.

    No race. All state is in scratch memory of this program alone. A search only reads. A turn that makes the chain
    longer stores in the chain alone, which no search reads. A merge loads sizes, means and the chain, passes a barrier,
    by which the search has ended too, and then stores; every turn of the loop ends in a barrier. The distances of the
    merged cluster are loaded and stored in one step, each by one thread: row `into` at column c, and column `into` at
    row c, for every living c but the two. What this skips in the two rows belongs to dead clusters, or to a cluster and
    itself, and is never read again.

    Precision: float32, by direct differences. Heights along a path are kept in order by a maximum.
    """
    row_ptr, number, n, d, scale, parent_ptr, height_ptr, floats_ptr, ints_ptr = table.begin_problem(
        table_ptr, owner_ptr, report_ptr, parent_ptr, height_ptr, floats_ptr, ints_ptr
    )
    # Points or means [d, n], sizes [n] (0: dead), heights of the newest merges [n]; distances [n, n], not for ward.
    point_ptr, size_ptr, newest_ptr = floats_ptr, floats_ptr + d * n, floats_ptr + (d + 1) * n
    dist_ptr = floats_ptr + (d + 2) * n

    for begin in range(0, n, BLOCK):
        i = begin + tl.arange(0, BLOCK)  # [BLOCK]
        inside = i < n
        offs = table.point_offsets(row_ptr, number, i, inside)  # [BLOCK]
        for k in range(d):
            x = table.read(row_ptr, offs + table.kernel_offset(row_ptr, k), inside) * scale
            tl.store(point_ptr + k * n + i, x, mask=inside)
        one = tl.full((BLOCK,), 1.0, tl.float32)
        tl.store(size_ptr + i, one, mask=inside)
        tl.store(newest_ptr + i, one * 0.0, mask=inside)
        tl.store(parent_ptr + i, i, mask=inside)
        tl.store(height_ptr + i, one * float("inf"), mask=inside)
    tl.debug_barrier()
    if LINKAGE != WARD:
        for r in range(0, n):
            for begin in range(0, n, BLOCK):
                i = begin + tl.arange(0, BLOCK)  # [BLOCK]
                squared = _squared_distances(point_ptr, n, d, i, i < n, r, D)  # [BLOCK]
                tl.store(dist_ptr + r * n + i, tl.sqrt_rn(squared), mask=i < n)
        tl.debug_barrier()

    left = n - 1  # merges to come
    length = 0  # of the chain, whose last two are before, tip
    tip = 0
    before = -1
    searches = 0
    while (left > 0) & (searches < n * (n + 1)):
        a = tl.load(size_ptr + tip)
        if (length == 0) | (a == 0):
            tip = 0
            before = -1
            length = 1
            tl.store(ints_ptr, 0)
            a = tl.load(size_ptr)

        # The nearest: the least of (distance, 0 for the one before or column + 1), in one number. In a block two minima
        # of 32 bits are cheaper than one of 64.
        least = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
        for begin in range(0, n, BLOCK):
            c = begin + tl.arange(0, BLOCK)  # [BLOCK]
            b = tl.load(size_ptr + c, mask=c < n, other=0.0)  # [BLOCK]
            if LINKAGE == WARD:
                far = _squared_distances(point_ptr, n, d, c, c < n, tip, D) * (a * b / (a + b))
            else:
                far = tl.load(dist_ptr + tip * n + c, mask=c < n, other=0.0)
            far = tl.where((b > 0) & (c != tip), far, float("inf"))  # [BLOCK]
            order = tl.where(c == before, 0, c + 1)  # [BLOCK]
            bits = far.to(tl.int32, bitcast=True)
            nearest = tl.min(bits, 0)
            order = tl.min(tl.where(bits == nearest, order, 0x7FFFFFFF), 0)
            least = tl.minimum(least, (nearest.to(tl.int64) << 32) | order.to(tl.int64))
        order = (least & 0xFFFFFFFF).to(tl.int32)
        searches += 1

        if order == 0:
            into = tl.minimum(tip, before)
            gone = tl.maximum(tip, before)
            a = tl.load(size_ptr + into)
            b = tl.load(size_ptr + gone)
            top = (least >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            top = tl.maximum(top, tl.maximum(tl.load(newest_ptr + into), tl.load(newest_ptr + gone)))
            length -= 2
            tip = tl.load(ints_ptr + length - 1, mask=length > 0, other=0)
            before = tl.load(ints_ptr + length - 2, mask=length > 1, other=-1)
            if LINKAGE == WARD:
                k = tl.arange(0, 16 if D > 0 else 128)  # [16] or [128], at least d
                x = tl.load(point_ptr + k * n + into, mask=k < d, other=0.0)  # as k
                y = tl.load(point_ptr + k * n + gone, mask=k < d, other=0.0)  # as k
                tl.debug_barrier()
                tl.store(point_ptr + k * n + into, tl.fma(b / (a + b), y - x, x), mask=k < d)
            else:
                tl.debug_barrier()
                for begin in range(0, n, BLOCK):
                    c = begin + tl.arange(0, BLOCK)  # [BLOCK]
                    other = (tl.load(size_ptr + c, mask=c < n, other=0.0) > 0) & (c != into) & (c != gone)
                    of_a = tl.load(dist_ptr + into * n + c, mask=other, other=0.0)
                    of_b = tl.load(dist_ptr + gone * n + c, mask=other, other=0.0)
                    far = _lance_williams(of_a, of_b, a, b, LINKAGE)
                    tl.store(dist_ptr + into * n + c, far, mask=other)
                    tl.store(dist_ptr + c * n + into, far, mask=other)
                tl.debug_barrier()
            tl.store(size_ptr + into, a + b)
            tl.store(size_ptr + gone, 0.0)
            tl.store(newest_ptr + into, top)
            tl.store(parent_ptr + gone, into)
            tl.store(height_ptr + gone, top)
            left -= 1
        else:
            before = tip
            tip = order - 1
            tl.store(ints_ptr + length, tip, mask=length < n)
            length = tl.where(length < n, length + 1, 0)
        tl.debug_barrier()

    table.end_problem(row_ptr, number, report_ptr, work_ptr, searches, searches * ((n + BLOCK - 1) // BLOCK), left + 1)
