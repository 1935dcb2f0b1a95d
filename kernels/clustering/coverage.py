"""Greedy maximum coverage: the members of every cluster, and the filters that cover most clusters, one after another.

    labels -> membership -> (place, cluster, member) -> cover -> order of the chosen filters

The clusters of input channel j stand in a row of n places, the members of each side by side (CSR form):

    member   (points,) int16  [columns, n]: the filters of channel j, cluster after cluster
    cluster  (points,) int32  [columns, n]: where a cluster begins in its row, its size and when it was covered
    place    (points,) int16  [n, columns]: where the cluster of filter i in channel j begins; read along j
"""

import triton.language as tl

from reprune_triton.kernels.clustering import table

# A cluster's word: its size, and in the upper half the step that covered it first.
SIZE = tl.constexpr(0xFFFF)
STEP = tl.constexpr(1 << 16)
NEVER = tl.constexpr(0x7FFF)  # later than all steps: there are at most 4096

# The key by which filters are chosen: gain | tie | reversed index. See reference.cover.
INDEX_BITS, TIE_BITS = tl.constexpr(12), tl.constexpr(31)
LAST = tl.constexpr((1 << INDEX_BITS.value) - 1)  # index

# The totals, int32 (layers, TOTALS), zero at first.
TOTALS = tl.constexpr(2)
COVERED, CLUSTERS = tl.constexpr(0), tl.constexpr(1)


@table.kernel
def membership_kernel(
    table_ptr, owner_ptr, report_ptr,
    label_ptr,
    count_ptr,  # scratch memory
    cluster_ptr, place_ptr, member_ptr, totals_ptr,  # results
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sort the kernels of one input channel by cluster, by counting: labels are less than n.

    count (points,): the size of each cluster, then where its next member goes. Atomics decide on the order of members
    in a cluster. Nothing depends on it, as gains are sums of integers.

    No race. Five passes, with a barrier after each: counts are cleared, added to by atomics, turned into places by the
    thread that loads them, read, and at last advanced by atomics. Loads bypass the first-level cache (.cg), as atomics
    do.
    """
    row_ptr, number = table.locate(table_ptr, owner_ptr)
    n = table.points_to_cluster(row_ptr, report_ptr)
    columns = tl.load(row_ptr + table.COLUMNS)
    forest = tl.load(row_ptr + table.FOREST)
    start = forest + number.to(tl.int64) * n
    label_ptr += start
    count_ptr += start
    cluster_ptr += start
    member_ptr += start
    place_ptr += forest + number
    for begin in range(0, n, BLOCK):
        i = begin + tl.arange(0, BLOCK)  # [BLOCK]
        tl.store(count_ptr + i, 0, mask=i < n)
    tl.debug_barrier()
    for begin in range(0, n, BLOCK):
        i = begin + tl.arange(0, BLOCK)  # [BLOCK]
        label = tl.load(label_ptr + i, mask=i < n, other=0)
        tl.atomic_add(count_ptr + label, 1, mask=i < n, sem="relaxed", scope="cta")
    tl.debug_barrier()
    points = 0
    clusters = 0
    for begin in range(0, n, BLOCK):
        i = begin + tl.arange(0, BLOCK)  # [BLOCK], labels here
        size = tl.load(count_ptr + i, mask=i < n, other=0, cache_modifier=".cg")
        at = points + tl.cumsum(size, 0) - size
        tl.store(cluster_ptr + at, size + NEVER * STEP, mask=size > 0)
        tl.store(count_ptr + i, at, mask=i < n)
        points += tl.sum(size, 0)
        clusters += tl.sum((size > 0).to(tl.int32), 0)
    tl.debug_barrier()
    for begin in range(0, n, BLOCK):
        i = begin + tl.arange(0, BLOCK)  # [BLOCK]
        label = tl.load(label_ptr + i, mask=i < n, other=0)
        at = tl.load(count_ptr + label, mask=i < n, other=0, cache_modifier=".cg")
        tl.store(place_ptr + i * columns, at.to(tl.int16), mask=i < n)
    tl.debug_barrier()
    for begin in range(0, n, BLOCK):
        i = begin + tl.arange(0, BLOCK)  # [BLOCK]
        label = tl.load(label_ptr + i, mask=i < n, other=0)
        at = tl.atomic_add(count_ptr + label, 1, mask=i < n, sem="relaxed", scope="cta")
        tl.store(member_ptr + at, i.to(tl.int16), mask=i < n)
    tl.atomic_add(totals_ptr + table.whole(row_ptr, table.LAYER) * TOTALS + CLUSTERS, clusters, sem="relaxed")


@table.kernel
def cover_kernel(
    table_ptr, owner_ptr, report_ptr,
    keep_ptr, score_ptr,
    cluster_ptr, place_ptr, member_ptr,  # words of clusters are written, too
    gain_ptr,  # scratch memory
    order_ptr, gains_ptr, kept_ptr, totals_ptr,  # results
    RANDOM: tl.constexpr,  # ties are broken by random bits, not by scores
    FILTERS: tl.constexpr, COLUMNS: tl.constexpr, MEMBERS: tl.constexpr,  # at once
):  # fmt: skip
    """Choose keep[layer] filters of one layer, or all, by one program.

    gain[i] is how many clusters filter i would be first to cover. A step takes the filter with the largest key (gain,
    tie, reversed index). Then every cluster that it is first to cover takes 1 off the gain of each member: over all
    steps one subtraction for every filter and channel at most. So the filter itself comes to 0. One subtraction more
    brings it to -1, and it is never taken again.

    Ties: RANDOM draws new bits for every step and filter, tl.randint(seed, step * n + i). Else the filter with the
    largest score goes first, and of equal scores the lowest.

    gain, order, gains, kept and score are (filters,), of all layers. order, gains: the choices and their gains, from
    where the layer begins. kept, zero at first: 1 for a chosen filter, at its own number.

    No race. In a step gains are read, then after a barrier changed by atomics alone, which commute, and a barrier ends
    the step; loads bypass the first-level cache (.cg), as atomics do. A cluster's word belongs to one lane. If several
    threads compute that lane, one may load what another has just stored. Then it finds the current step, which counts
    as not covered before, and does the same.
    """
    row_ptr, _ = table.locate(table_ptr, owner_ptr)
    layer = table.whole(row_ptr, table.LAYER)
    n = table.points_to_cluster(row_ptr, report_ptr)
    columns = table.whole(row_ptr, table.COLUMNS)
    forest = tl.load(row_ptr + table.FOREST)
    first = tl.load(row_ptr + table.FILTER)
    filters = tl.load(row_ptr + table.FILTERS)
    seed = tl.load(row_ptr + table.TIE_SEED)
    keep = tl.minimum(tl.load(keep_ptr + layer), n)
    cluster_ptr += forest
    place_ptr += forest
    member_ptr += forest
    gain_ptr += first
    for begin in range(0, n, FILTERS):
        i = begin + tl.arange(0, FILTERS)  # [FILTERS]
        tl.store(gain_ptr + i, columns, mask=i < n)
    tl.debug_barrier()
    covered = 0
    for step in range(0, keep):
        best = tl.full((FILTERS,), -1, tl.int64)  # [FILTERS]
        for begin in range(0, n, FILTERS):
            i = begin + tl.arange(0, FILTERS)  # [FILTERS]
            gain = tl.load(gain_ptr + i, mask=i < n, other=-1, cache_modifier=".cg")  # [FILTERS]
            if RANDOM:
                tie = (tl.randint(seed, step * n + i).to(tl.uint32, bitcast=True) >> 1).to(tl.int64)
            else:
                tie = tl.load(score_ptr + first + table.pick(filters, i, i < n), mask=i < n, other=0).to(tl.int64)
            key = (gain.to(tl.int64) << (INDEX_BITS + TIE_BITS)) | (tie << INDEX_BITS) | (i ^ LAST).to(tl.int64)
            best = tl.maximum(best, tl.where(gain >= 0, key, -1))
        # The halves of the largest key: two maxima of 32 bits are cheaper than one of 64.
        upper = (best >> 32).to(tl.int32)  # [FILTERS]
        most = tl.max(upper, 0)
        lower = tl.max(tl.where(upper == most, best.to(tl.uint32), 0), 0)
        choice = (lower & LAST).to(tl.int32) ^ LAST
        found = most >> (INDEX_BITS + TIE_BITS - 32)
        covered += found
        tl.store(order_ptr + first + step, choice)
        tl.store(gains_ptr + first + step, found)
        tl.store(kept_ptr + first + table.pick(filters, choice, choice >= 0), 1)
        tl.debug_barrier()
        tl.atomic_add(gain_ptr + choice, -1, sem="relaxed", scope="cta")
        for begin in range(0, columns, COLUMNS):
            j = begin + tl.arange(0, COLUMNS)  # [COLUMNS]
            at = tl.load(place_ptr + choice.to(tl.int64) * columns + j, mask=j < columns, other=0).to(tl.int64)
            at += j.to(tl.int64) * n
            word = tl.load(cluster_ptr + at, mask=j < columns, other=0)  # [COLUMNS]
            fresh = (j < columns) & (word >= step * STEP)
            size = word & SIZE
            tl.store(cluster_ptr + at, size + step * STEP, mask=fresh)
            size = tl.where(fresh, size, 0)
            for k in range(0, tl.max(size, 0), MEMBERS):
                m = k + tl.arange(0, MEMBERS)[None, :]  # [1, MEMBERS]
                use = m < size[:, None]  # [COLUMNS, MEMBERS]
                i = tl.load(member_ptr + at[:, None] + m, mask=use, other=0).to(tl.int32)  # [COLUMNS, MEMBERS]
                tl.atomic_add(gain_ptr + i, -1, mask=use, sem="relaxed", scope="cta")
        tl.debug_barrier()
    tl.store(totals_ptr + layer * TOTALS + COVERED, covered)


@table.kernel
def bits_kernel(table_ptr, owner_ptr, bits_ptr, BLOCK: tl.constexpr):
    """bits[filter] = tl.randint(draw seed of the layer, number of the filter), for every filter of one layer."""
    row_ptr, _ = table.locate(table_ptr, owner_ptr)
    n_out = table.whole(row_ptr, table.N_OUT)
    first = tl.load(row_ptr + table.FILTER)
    seed = tl.load(row_ptr + table.DRAW_SEED)
    for begin in range(0, n_out, BLOCK):
        i = begin + tl.arange(0, BLOCK)  # [BLOCK]
        tl.store(bits_ptr + first + i, tl.randint(seed, i), mask=i < n_out)
