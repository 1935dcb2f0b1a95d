"""The largest |weight| of every layer, which says whether all are finite and how they must be scaled."""

import triton.language as tl

from reprune_triton.kernels.clustering import table


@table.kernel
def magnitude_kernel(table_ptr, owner_ptr, report_ptr, BLOCK: tl.constexpr):
    """report[layer, MAGNITUDE] = bits of max |w| over the active filters and inputs of the layer.

    One program per active filter. As integers, the bits of non-negative floats are in the order of the floats, with
    infinity and then NaN above all numbers. An index that the weight does not have counts as infinity, and nothing is
    read there: so the layer is not clustered, and no other kernel reads there either.

    No race: nothing but an atomic maximum of integers is stored, which is the same in any order.
    """
    row_ptr, number = table.locate(table_ptr, owner_ptr)
    d = table.whole(row_ptr, table.D)
    n_in = tl.load(row_ptr + table.N_IN)
    count = table.whole(row_ptr, table.COLUMNS) * d
    inputs = tl.load(row_ptr + table.INPUTS)
    filter = table.pick(tl.load(row_ptr + table.FILTERS), number, number >= 0)
    exists = (filter >= 0) & (filter < tl.load(row_ptr + table.N_OUT))
    start = filter * tl.load(row_ptr + table.STRIDE_OUT)
    largest = tl.where(exists, 0, table.INFINITY_BITS)
    for begin in range(0, tl.where(exists, count, 0), BLOCK):
        offs = begin + tl.arange(0, BLOCK)  # [BLOCK]
        column = table.pick(inputs, offs // d, offs < count)  # [BLOCK]
        inside = (offs < count) & (column >= 0) & (column < n_in)
        at = start + column * tl.load(row_ptr + table.STRIDE_IN) + table.kernel_offset(row_ptr, offs % d)
        value = table.read(row_ptr, at, inside)  # [BLOCK]
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        bits = tl.where(inside | (offs >= count), bits, table.INFINITY_BITS)
        largest = tl.maximum(largest, tl.max(bits, 0))
    tl.atomic_max(table.report_of(row_ptr, report_ptr) + table.MAGNITUDE, largest)
