"""The cut: one cut height for each layer, and the clusters that it leaves of every problem."""

import triton.language as tl

from reprune_triton.kernels.clustering import table


@table.kernel
def cut_height_kernel(table_ptr, owner_ptr, report_ptr, keep_ptr, height_ptr, BLOCK: tl.constexpr):
    """report[layer, CUT] = 1 + bits of h, where h = max over the layer's problems of the c-th smallest merge height.

    One program per problem, c = n - keep[layer]. The c-th smallest height is the least number that c heights do not
    exceed. Halving the range finds it: as integers, the bits of non-negative floats are in the order of the floats.
    With c = 0 nothing merges, not even copies at height 0: the report keeps its 0.

    No race: nothing but an atomic maximum of integers is stored, which is the same in any order.
    """
    row_ptr, number = table.locate(table_ptr, owner_ptr)
    n = table.points_to_cluster(row_ptr, report_ptr)
    wanted = n - tl.load(keep_ptr + table.whole(row_ptr, table.LAYER))  # merges; less than 1: none
    height_ptr += tl.load(row_ptr + table.FOREST) + number.to(tl.int64) * n
    low = 0
    high = tl.where(wanted > 0, table.INFINITY_BITS, 0)
    for _ in range(31):  # as INFINITY_BITS is less than 2^31
        middle = low + (high - low) // 2
        count = 0
        for begin in range(0, n, BLOCK):
            i = begin + tl.arange(0, BLOCK)  # [BLOCK]
            bits = tl.load(height_ptr + i, mask=i < n, other=float("inf")).to(tl.int32, bitcast=True)  # [BLOCK]
            count += tl.sum((bits <= middle).to(tl.int32), 0)
        enough = count >= wanted
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    if wanted > 0:
        tl.atomic_max(table.report_of(row_ptr, report_ptr) + table.CUT, low + 1)


@table.kernel
def label_kernel(
    table_ptr, owner_ptr, report_ptr,
    parent_ptr, height_ptr,
    label_ptr, clusters_ptr,  # results
    BLOCK: tl.constexpr,
):  # fmt: skip
    """label[problem, i] = cluster of point i, and clusters[problem] = how many there are, after all merges up to h.

    Clusters are numbered by their lowest members. Heights never fall along a path, so a point's cluster is found by
    going from parent to parent as long as their merges happen. A parent is lower than its children, so n steps do.

    No race: a first pass stores the labels of roots alone; after a barrier a second reads these, and stores the labels
    of all other points alone. parent and height are only read.
    """
    row_ptr, number = table.locate(table_ptr, owner_ptr)
    n = table.points_to_cluster(row_ptr, report_ptr)
    over = tl.load(table.report_of(row_ptr, report_ptr) + table.CUT)  # the least bits of a height greater than h
    start = tl.load(row_ptr + table.FOREST) + number.to(tl.int64) * n
    parent_ptr += start
    height_ptr += start
    label_ptr += start
    roots = 0
    for begin in range(0, n, BLOCK):
        i = begin + tl.arange(0, BLOCK)  # [BLOCK]
        inside = i < n
        root = inside & (tl.load(height_ptr + i, mask=inside, other=0.0).to(tl.int32, bitcast=True) >= over)
        tl.store(label_ptr + i, roots + tl.cumsum(root.to(tl.int32), 0) - 1, mask=root)
        roots += tl.sum(root.to(tl.int32), 0)
    tl.debug_barrier()
    for begin in range(0, n, BLOCK):
        i = begin + tl.arange(0, BLOCK)  # [BLOCK]
        at = i  # [BLOCK], where each point has come on its path
        moves = i < n
        climbing = 1
        steps = 0
        while (climbing > 0) & (steps <= n):
            bits = tl.load(height_ptr + at, mask=moves, other=float("inf")).to(tl.int32, bitcast=True)
            moves = moves & (bits < over)
            at = tl.where(moves, tl.load(parent_ptr + at, mask=moves, other=0), at)
            climbing = tl.sum(moves.to(tl.int32), 0)
            steps += 1
        child = (i < n) & (at != i)
        tl.store(label_ptr + i, tl.load(label_ptr + at, mask=child, other=0), mask=child)
    tl.store(clusters_ptr + table.whole(row_ptr, table.PROBLEM) + number, roots)
