"""Greedy maximum coverage: which kernels share a cluster, and the filters that cover most clusters, one after another.

    labels -> membership -> (place, cluster, member) -> cover -> order of the chosen filters

The clusters of input channel j stand in a row of n places, each cluster's members side by side (CSR form):

    member   (points,) int16  [columns, n]: the filters of channel j, cluster after cluster
    cluster  (points,) int32  [columns, n]: where a cluster begins in its row, its size and when it was covered
    place    (points,) int16  [n, columns]: where the cluster of filter i in channel j begins; read along j
"""

import triton.language as tl

from reprune_triton.kernels.clustering import table

# A cluster's word: its size, and in the upper half the step at which it was covered first.
SIZE = tl.constexpr(0xFFFF)
STEP = tl.constexpr(1 << 16)
NEVER = tl.constexpr(0x7FFF)  # later than all steps: there are at most 4096

# The key by which filters are chosen: gain | tie | reversed index. See reference.cover.
INDEX_BITS, TIE_BITS = tl.constexpr(12), tl.constexpr(31)
LAST = tl.constexpr((1 << 12) - 1)

# Per layer, int32, zero at first.
TOTALS = tl.constexpr(2)
COVERED, CLUSTERS = tl.constexpr(0), tl.constexpr(1)


@table.kernel
def membership_kernel(
    table_ptr, owner_ptr, report_ptr,
    label_ptr, count_ptr, cluster_ptr, place_ptr, member_ptr, totals_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows of one input channel, by counting: labels are numbers under n.

    count (points,) is scratch memory: the size of each cluster, then where its next member goes. The order of members
    within a cluster is left to the atomics; nothing that follows depends on it, as gains are sums of integers.

    No race. Each pass ends in a barrier: counts are cleared, counted by atomics, turned into places by the thread that
    loads them, read, and at last advanced by atomics. They are loaded past the first-level cache (.cg), as atomics
    happen behind it.
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
        i = begin + tl.arange(0, BLOCK)  # [BLOCK], here labels
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
    table_ptr, owner_ptr, report_ptr, keep_ptr,
    level_ptr, cluster_ptr, place_ptr, member_ptr, gain_ptr,
    order_ptr, gains_ptr, kept_ptr, totals_ptr,
    RANDOM: tl.constexpr, FILTERS: tl.constexpr, COLUMNS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """One program chooses the filters of one layer: keep[layer] of them, or all.

    gain[i] is how many clusters filter i would be first to cover. A step takes the largest key (gain, tie, reversed
    index), and then every cluster that is first covered takes 1 off the gain of each of its members: over all steps
    that is one subtraction for every filter and channel at most. So the filter itself comes to 0, and with one more to
    -1, which is never taken again.

    Ties: RANDOM draws fresh bits for every step and filter, tl.randint(seed, step * n + i); else level (all filters,)
    orders the filters, and the lowest index goes first where that is equal.

    order, gains (all filters,): the choices and their gains, from where the layer begins. kept (all filters,), zero at
    first: 1 for a chosen filter, at its own number. gain (all filters,): scratch memory.

    No race. Gains are read, a barrier, then changed by atomics alone, which commute, and a barrier ends the step; they
    are loaded past the first-level cache (.cg). A cluster's word belongs to one lane. If threads hold copies of that
    lane, one may load what another has just stored: then it finds the current step there, which still counts as not
    covered before.
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
        best = tl.full((FILTERS,), -1, tl.int64)
        for begin in range(0, n, FILTERS):
            i = begin + tl.arange(0, FILTERS)  # [FILTERS]
            gain = tl.load(gain_ptr + i, mask=i < n, other=-1, cache_modifier=".cg")
            if RANDOM:
                tie = (tl.randint(seed, step * n + i).to(tl.uint32, bitcast=True) >> 1).to(tl.int64)
            else:
                tie = tl.load(level_ptr + first + table.pick(filters, i, i < n), mask=i < n, other=0).to(tl.int64)
            key = (gain.to(tl.int64) << (INDEX_BITS + TIE_BITS)) | (tie << INDEX_BITS) | (i ^ LAST).to(tl.int64)
            best = tl.maximum(best, tl.where(gain >= 0, key, -1))
        # The halves of the largest key: two maxima of 32 bits are cheaper than one of 64.
        upper = (best >> 32).to(tl.int32)
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
            word = tl.load(cluster_ptr + at, mask=j < columns, other=0)
            fresh = (j < columns) & (word >= step * STEP)
            size = word & SIZE
            tl.store(cluster_ptr + at, size + step * STEP, mask=fresh)
            size = tl.where(fresh, size, 0)
            for k in range(0, tl.max(size, 0), MEMBERS):
                m = k + tl.arange(0, MEMBERS)[None, :]  # [1, MEMBERS]
                use = m < size[:, None]  # [COLUMNS, MEMBERS]
                i = tl.load(member_ptr + at[:, None] + m, mask=use, other=0).to(tl.int32)
                tl.atomic_add(gain_ptr + i, -1, mask=use, sem="relaxed", scope="cta")
        tl.debug_barrier()
    tl.store(totals_ptr + layer * TOTALS + COVERED, covered)


@table.kernel
def bits_kernel(table_ptr, owner_ptr, bits_ptr, BLOCK: tl.constexpr):
    """bits[filter] = tl.randint(seed of the layer's draw, number of the filter), for every filter of one layer."""
    row_ptr, _ = table.locate(table_ptr, owner_ptr)
    n_out = table.whole(row_ptr, table.N_OUT)
    first = tl.load(row_ptr + table.FILTER)
    seed = tl.load(row_ptr + table.DRAW_SEED)
    for begin in range(0, n_out, BLOCK):
        i = begin + tl.arange(0, BLOCK)  # [BLOCK]
        tl.store(bits_ptr + first + i, tl.randint(seed, i), mask=i < n_out)
