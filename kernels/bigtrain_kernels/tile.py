"""In which order the tiles of a matrix product are computed."""

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
