"""What kernels of several families share: the order of the tiles of a matrix product, and tanh."""

import triton
import triton.language as tl


@triton.jit
def grouped(blocks_m, blocks_n, GROUP: tl.constexpr):
    """Row and column of this program's tile of a [blocks_m, blocks_n] grid. Programs go down GROUP tiles before they go right: those
    that run at the same time share rows of both factors, which the L2 cache then holds."""
    first = tl.program_id(0) // (GROUP * blocks_n) * GROUP
    rows = tl.minimum(blocks_m - first, GROUP)
    inside = tl.program_id(0) % (GROUP * blocks_n)
    return first + inside % rows, inside // rows


@triton.jit
def tanh(x):
    """tanh(x) within a few roundings of itself at any size: by its series where 2 sigmoid(2 x) - 1 would cancel."""
    y = x * x
    series = x + x * y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835 - y * (1382 / 155925)))))
    return tl.where(y < 0.1, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)
