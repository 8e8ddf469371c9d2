"""What kernels of several families share: the order of the tiles of a matrix product, their halves, and tanh."""

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
def halves(tile):
    """The left and the right columns of a tile: each thread keeps what it has. What follows a product takes one after the other, since
    both are more than the registers hold."""
    return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def tanh(x, slope, EXACT: tl.constexpr):
    """tanh(x * slope). EXACT: within a few roundings of itself, by its series where the rest would cancel. Otherwise within 2e-7, and
    without a division, which takes ten instructions and registers with them."""
    if EXACT:
        x *= slope
        y = x * x
        series = x + x * y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835 - y * (1382 / 155925)))))
        return tl.where(y < 0.1, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)
    root = tl.rsqrt(tl.exp2(x * (slope * 2.8853900817779268) - 1.0) + 0.5)  # 1 - 2 / (1 + exp(2 x)), and 2 log2(e)
    return 1.0 - root * root
