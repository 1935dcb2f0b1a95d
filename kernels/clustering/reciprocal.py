"""Ward clustering by merging all reciprocal nearest neighbours, in rounds."""

import triton
import triton.language as tl

from reprune_triton.kernels.clustering import table
from reprune_triton.kernels.configuration import cdiv

COLS = 32  # clusters side by side in a block of means, and in a tile of distances


def scratch(n: int, d: int) -> tuple[int, int]:
    """Return the floats (mean (d), inverse, size, newest, dist; twice) and ints (lowest, near, twice; stale, place)."""
    room = cdiv(n, COLS) * COLS
    return room * 2 * (d + 4), room * 6


@triton.jit
def _mean_at(i, d, COLS: tl.constexpr):
    """Return the offset at which the mean of cluster i begins. i: any shape.

    Means stand in blocks [d + 1, COLS], whose last line is 1 / size. So coordinate k is COLS * k further on, neighbours
    are read together, and the compiler knows the step.
    """
    return (i // COLS) * (COLS * (d + 1)) + i % COLS


@triton.jit
def _add_square(total, row_ptr, col_ptr):
    """Return total [ROWS, COLS] + (x_row - x_col)^2 for one coordinate, from pointers [ROWS] and [COLS]."""
    step = tl.load(row_ptr)[:, None] - tl.load(col_ptr)[None, :]  # [ROWS, COLS]
    return tl.fma(step, step, total)


@table.kernel
def reciprocal_kernel(
    table_ptr, owner_ptr, report_ptr,
    parent_ptr, height_ptr, work_ptr,  # results
    floats_ptr, ints_ptr,  # scratch memory
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cluster the n kernels of one input channel, by one program: parent and height of every point (see ops.Merges).

        I(A, B) = |A||B| / (|A| + |B|) * ||m_A - m_B||^2      m_(A+B) = m_A + |B| / (|A| + |B|) * (m_B - m_A)

    Ward 1963; reciprocal neighbours: Murtagh 1983. Ward's linkage is reducible: a merge never brings the new cluster
    nearer to a third than the nearer of its parts was. So two clusters that are each other's nearest stay so until they
    merge, and all such pairs can merge at once.

    D is kh * kw where that is unrolled, 0 where it is read from the table.

    A round has three steps, each a loop over the m live clusters, which stand in columns 0 .. m - 1 in the order of
    their lowest members:
      search    for every stale cluster the nearest other one: near, dist. Tiles of ROWS x COLS distances from means.
      merge     pairs with near[near[i]] == i become one, in the lower column; the survivors move up, in order.
      renumber  near follows its cluster to the new column. Clusters that merged, or whose nearest merged, are stale;
                the distances of all others are what they were.
    Ties: the nearest with the lowest column wins. d(i, j) and d(j, i) are the same bits, so of all nearest pairs the
    one with the lowest i, then the lowest j, are each other's nearest: after a search of all clusters there is always a
    pair. If rounding leaves none after a search of some, all become stale; if there is none then either, the program
    stops and says so in the report. Hence every loop is bounded: each round but one ends a cluster.
    In the first round all exact copies of a point join the first of them at once; in pairs they took n - 1 rounds.

    No race. What is stored and loaded again is in scratch memory of this program alone, and every array is written in
    one step and read in later ones, with a barrier after each step:
      mean (with 1 / size), size, newest, lowest  read by search and merge in one copy, written by merge in the other
      near, dist   written by search, read by merge and renumber, whose new values go to the other copy
      place        written by merge, read by renumber
      stale        written by renumber, read by search
    The copies change roles after renumber. Within a step two threads never write one place: survivors and stale
    clusters are numbered by a cumulative sum, a cluster dies once, and the sizes of copies are added by atomics, whose
    sums of small whole numbers are exact in any order. After the last cluster merge writes infinity as far as a tile
    reaches, so that search need not ask where the clusters end.

    Precision: float32, by direct differences. 1 / (1/|A| + 1/|B|) is the square of a reciprocal square root, at 2 ulp.
    Heights along a path are kept in order by a maximum, since rounding is not.
    """
    row_ptr, number, n, d, scale, parent_ptr, height_ptr, floats_ptr, ints_ptr = table.begin_problem(
        table_ptr, owner_ptr, report_ptr, parent_ptr, height_ptr, floats_ptr, ints_ptr
    )
    # Where the arrays begin. All but the last two have two copies, side by side.
    room = (n + COLS - 1) // COLS * COLS
    size, newest, dist = (2 * d + 2) * room, (2 * d + 4) * room, (2 * d + 6) * room
    lowest, near, stale, place = 0, 2 * room, 4 * room, 5 * room

    for begin in range(0, n, BLOCK):
        i = begin + tl.arange(0, BLOCK)  # [BLOCK]
        inside = i < n
        offs = table.point_offsets(row_ptr, number, i, inside)  # [BLOCK]
        for k in range(d):
            x = table.read(row_ptr, offs + table.kernel_offset(row_ptr, k), inside) * scale
            x = tl.where(inside, x, float("inf"))  # after the last cluster is infinity, which is never nearest
            tl.store(floats_ptr + _mean_at(i, d, COLS) + COLS * k, x, mask=i < room)
        one = tl.full((BLOCK,), 1.0, tl.float32)
        tl.store(floats_ptr + _mean_at(i, d, COLS) + COLS * d, one, mask=i < room)
        tl.store(floats_ptr + size + i, one, mask=inside)
        tl.store(floats_ptr + newest + i, one * 0.0, mask=inside)
        tl.store(ints_ptr + lowest + i, i, mask=inside)
        tl.store(ints_ptr + stale + i, i, mask=inside)
        tl.store(parent_ptr + i, i, mask=inside)
        tl.store(height_ptr + i, one * float("inf"), mask=inside)
    tl.debug_barrier()

    m = n
    searches = n  # how many clusters are stale
    now = 0  # where the copy that is read begins, in arrays of one number per cluster
    rounds = 0
    tiles = 0
    idle = 0  # rounds without a merge, in a row
    while (m > 1) & (idle < 2):
        then = room - now

        # search
        for begin in range(0, searches, ROWS):
            r = begin + tl.arange(0, ROWS)  # [ROWS]
            row = tl.load(ints_ptr + stale + r, mask=r < searches, other=0)
            row_mean_ptr = floats_ptr + now * (d + 1) + _mean_at(row, d, COLS)  # [ROWS]
            row_inverse = tl.load(row_mean_ptr + COLS * d)  # [ROWS]
            best = tl.full((ROWS, COLS), float("inf"), tl.float32)  # [ROWS, COLS]
            best_begin = tl.zeros((ROWS, COLS), tl.int32)  # [ROWS, COLS]
            for c_begin in range(0, m, COLS):
                c = c_begin + tl.arange(0, COLS)  # [COLS]
                col_mean_ptr = floats_ptr + now * (d + 1) + c_begin * (d + 1) + tl.arange(0, COLS)  # [COLS]
                growth = tl.zeros((ROWS, COLS), tl.float32)  # [ROWS, COLS]
                if D > 0:
                    for k in tl.static_range(D):
                        growth = _add_square(growth, row_mean_ptr + COLS * k, col_mean_ptr + COLS * k)
                else:
                    for k in range(d):
                        growth = _add_square(growth, row_mean_ptr + COLS * k, col_mean_ptr + COLS * k)
                root = tl.rsqrt(row_inverse[:, None] + tl.load(col_mean_ptr + COLS * d)[None, :])  # [ROWS, COLS]
                growth = growth * (root * root)
                growth = tl.where(row[:, None] == c[None, :], float("inf"), growth)
                nearer = growth < best  # [ROWS, COLS]; of equal ones the first
                best = tl.where(nearer, growth, best)
                best_begin = tl.where(nearer, c_begin, best_begin)
            # As integers, the bits of non-negative floats are in the order of the floats, and quicker to compare.
            found = tl.min(best.to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)  # [ROWS]
            column = best_begin + tl.arange(0, COLS)[None, :]  # [ROWS, COLS]
            column = tl.min(tl.where(best == found[:, None], column, n), 1)  # [ROWS]; of equal ones the lowest
            tl.store(ints_ptr + near + now + row, column, mask=r < searches)
            tl.store(floats_ptr + dist + now + row, found, mask=r < searches)
        tiles += ((searches + ROWS - 1) // ROWS) * ((m + COLS - 1) // COLS)
        tl.debug_barrier()

        # merge
        copy_at = tl.where(rounds == 0, 0.0, -1.0)  # distance of an exact copy; there are none in later rounds
        left = 0
        merged = 0
        copies = 0
        for begin in range(0, m, BLOCK):
            i = begin + tl.arange(0, BLOCK)  # [BLOCK]
            live = i < m
            j = tl.load(ints_ptr + near + now + i, mask=live, other=0)  # [BLOCK], as all that follow
            back = tl.load(ints_ptr + near + now + j, mask=live, other=0)
            far = tl.load(floats_ptr + dist + now + i, mask=live, other=float("inf"))
            pair = live & (back == i)
            lead = pair & (i < j)
            # The first of the copies of a point is the nearest of all others, and leads the pair with the second.
            copy = live & (far == copy_at) & (j < i) & (j < back) & (back != i)
            copy = copy & (tl.load(ints_ptr + near + now + back, mask=live, other=0) == j)
            dies = (pair & (j < i)) | copy
            stays = live & (dies == 0)
            to = left + tl.cumsum(stays.to(tl.int32), 0) - 1
            tl.store(ints_ptr + place + i, tl.where(stays, 2 * to + lead.to(tl.int32), -1), mask=live)

            low = tl.load(ints_ptr + lowest + now + i, mask=live, other=0)
            of_near = tl.load(ints_ptr + lowest + now + j, mask=live, other=0)
            own_newest = tl.load(floats_ptr + newest + now + i, mask=live, other=0.0)
            top = tl.maximum(own_newest, tl.load(floats_ptr + newest + now + j, mask=live, other=0.0))
            top = tl.maximum(top, far)
            tl.store(parent_ptr + of_near, low, mask=lead)
            tl.store(height_ptr + of_near, top, mask=lead)
            tl.store(parent_ptr + low, of_near, mask=copy)
            tl.store(height_ptr + low, far, mask=copy)

            a = tl.load(floats_ptr + size + now + i, mask=live, other=1.0)
            b = tl.load(floats_ptr + size + now + j, mask=lead, other=0.0)
            share = b / (a + b)
            tl.store(floats_ptr + size + then + to, a + b, mask=stays)
            tl.store(floats_ptr + newest + then + to, tl.where(lead, top, own_newest), mask=stays)
            tl.store(floats_ptr + dist + then + to, far, mask=stays)
            tl.store(ints_ptr + lowest + then + to, low, mask=stays)
            own_ptr = floats_ptr + now * (d + 1) + _mean_at(i, d, COLS)
            near_ptr = floats_ptr + now * (d + 1) + _mean_at(j, d, COLS)
            to_ptr = floats_ptr + then * (d + 1) + _mean_at(to, d, COLS)
            for k in range(d):
                x = tl.load(own_ptr + COLS * k, mask=stays, other=0.0)
                y = tl.load(near_ptr + COLS * k, mask=lead, other=0.0)
                tl.store(to_ptr + COLS * k, tl.where(lead, tl.fma(share, y - x, x), x), mask=stays)
            tl.store(to_ptr + COLS * d, 1.0 / (a + b), mask=stays)
            counts = stays.to(tl.int32) | (lead.to(tl.int32) << 10) | (copy.to(tl.int32) << 20)  # BLOCK < 1 << 10
            counts = tl.sum(counts, 0)
            left += counts & 1023
            merged += (counts >> 10) & 1023
            copies += counts >> 20
        pad = left + tl.arange(0, COLS)  # [COLS] after the last cluster
        pad_ptr = floats_ptr + then * (d + 1) + _mean_at(pad, d, COLS)  # [COLS]
        for k in range(d):
            tl.store(pad_ptr + COLS * k, tl.full((COLS,), float("inf"), tl.float32), mask=pad < room)
        tl.store(pad_ptr + COLS * d, tl.full((COLS,), 1.0, tl.float32), mask=pad < room)
        tl.debug_barrier()

        # renumber
        everyone = tl.where(merged > 0, 0, m)
        searches = 0
        for begin in range(0, m, BLOCK):
            i = begin + tl.arange(0, BLOCK)  # [BLOCK]
            live = i < m
            own = tl.load(ints_ptr + place + i, mask=live, other=-1)  # [BLOCK], as all that follow
            j = tl.load(ints_ptr + near + now + i, mask=live, other=0)
            of_near = tl.load(ints_ptr + place + j, mask=live, other=0)
            stays = own >= 0
            lost = (of_near < 0) | ((of_near & 1) == 1) | ((own & 1) == 1)
            again = stays & (lost | (i < everyone))
            tl.store(ints_ptr + near + then + (own >> 1), of_near >> 1, mask=stays)
            to = searches + tl.cumsum(again.to(tl.int32), 0) - 1
            tl.store(ints_ptr + stale + to, own >> 1, mask=again)
            searches += tl.sum(again.to(tl.int32), 0)
            if copies > 0:
                back = tl.load(ints_ptr + near + now + j, mask=live, other=0)
                joins = live & (own < 0) & (back != i)
                one = tl.full((BLOCK,), 1.0, tl.float32)
                tl.atomic_add(floats_ptr + size + then + (of_near >> 1), one, mask=joins)
        if copies > 0:
            tl.debug_barrier()
            for begin in range(0, left, BLOCK):
                i = begin + tl.arange(0, BLOCK)  # [BLOCK]
                whole_size = tl.load(floats_ptr + size + then + i, mask=i < left, other=1.0)
                to_ptr = floats_ptr + then * (d + 1) + _mean_at(i, d, COLS)
                tl.store(to_ptr + COLS * d, 1.0 / whole_size, mask=i < left)
        tl.debug_barrier()
        idle = tl.where(merged > 0, 0, idle + 1)
        m = left
        now = then
        rounds += 1

    table.end_problem(row_ptr, number, report_ptr, work_ptr, rounds, tiles, m)
