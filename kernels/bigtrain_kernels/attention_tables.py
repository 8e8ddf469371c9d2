"""Launches of attention's kernels: block sizes by architecture, head dimension, dtype and mask.

Every entry compiles without a spilled register within the architecture's shared memory: `python -m bigtrain_kernels.static`.
`benchmarks/tune.py` measures others on a GPU and prints rows for these tables.
"""

from __future__ import annotations

from collections.abc import Iterator

from .launch import Launch

Key = tuple[str, int, int, bool]
"""Architecture, width of the block, bytes of an element, whether there are ranges."""


def _entries(sizes: str) -> Iterator[tuple[Key, Launch]]:
    """Rows of `architectures, head dims, bytes of an element, mask, BLOCK_M, BLOCK_N, warps, stages`; the mask is ranges, plain, or any."""
    for row in sizes.strip().splitlines():
        archs, dims, size, mask, M, N, warps, stages = row.split()
        for arch in archs.split(","):
            for dim in dims.split(","):
                for ranges in {"plain": [False], "ranges": [True], "any": [False, True]}[mask]:
                    yield (arch, int(dim), int(size), ranges), Launch({"BLOCK_M": int(M), "BLOCK_N": int(N)}, int(warps), int(stages))


FORWARD = dict(
    _entries("""
        sm_80         32           2  plain  128 64  4  3
        sm_80         32           2  ranges  128 64  8  3
        sm_80         64           2  any  128  64  8  2
        sm_80         128          2  plain  128 64  8  3
        sm_80         128          2  ranges  128 64  8  2
        sm_80         256          2  any   64  32  8  2
        sm_90         32,64        2  any  128 128  8  3
        sm_90         128          2  any  128 128  8  2
        sm_100        32           2  plain  128 128  8  3
        sm_100        32           2  ranges  128  64  8  3
        sm_100        64           2  plain  128 128  8  2
        sm_100        64           2  ranges  128  64  8  3
        sm_100        128          2  any  128  64  8  3
        sm_90         256          2  any  128  32  8  2
        sm_100        256          2  plain  128 32  8  2
        sm_100        256          2  ranges  64 64  8  2
        gfx942        32,64,128    2  any  128  64  4  1
        gfx942        256          2  any   64  32  4  1
        sm_80         32           4  plain  32  16  4  1
        sm_80         32           4  ranges  32  32  4  1
        sm_80         64           4  any   32  32  4  1
        sm_80         128          4  any   32  32  8  1
        sm_80         256          4  any   16  16  8  1
        sm_90,sm_100  32           4  any   32  32  4  1
        sm_90,sm_100  64           4  plain  32  32  4  1
        sm_90         64           4  ranges  32  16  4  1
        sm_100        64           4  ranges  32  32  4  1
        sm_90,sm_100  128,256      4  any   16  16  8  1
        gfx942        32,64        4  any   32  32  4  1
        gfx942        128,256      4  any   16  16  4  1
        interpreter   32,64,128,256  2  any  32 32  4  1
        interpreter   32,64,128,256  4  any  32 32  4  1
    """)
)
BACKWARD_KV = dict(
    _entries("""
        sm_80         32           2  any   64  64  4  2
        sm_80         64           2  plain  64  64  8  2
        sm_80         64           2  ranges  32  64  8  2
        sm_80         128          2  any   32  64  8  2
        sm_80         256          2  any   32  32  8  1
        sm_90         32           2  any   64 128  8  2
        sm_90         64           2  any   64 128  8  3
        sm_90         128          2  any   32 128  8  2
        sm_90         256          2  any   32  32  8  2
        sm_100        32,64,128    2  any   64 128  8  2
        sm_100        256          2  any   32  64  8  1
        gfx942        32,64        2  any   64  64  4  1
        gfx942        128          2  any   32  64  4  1
        gfx942        256          2  any   32  32  4  1
        sm_80         32           4  any   32  32  8  1
        sm_80         64,128       4  any   16  32  8  1
        sm_80         256          4  any   16  16  8  1
        sm_90,sm_100  32           4  any   32  32  8  1
        sm_90         64           4  any   32  32  8  1
        sm_100        64           4  any   16  32  8  1
        sm_90,sm_100  128,256      4  any   16  16  8  1
        gfx942        32,64        4  any   32  32  4  1
        gfx942        128,256      4  any   16  16  4  1
        interpreter   32,64,128,256  2  any  32 32  4  1
        interpreter   32,64,128,256  4  any  32 32  4  1
    """)
)
BACKWARD_Q = dict(
    _entries("""
        sm_80         32           2  any   64  64  4  2
        sm_80         64           2  any  128  64  8  2
        sm_80         128          2  any   64  32  8  2
        sm_80         256          2  plain  32  32  4  1
        sm_80         256          2  ranges  32  32  8  1
        sm_90,sm_100  32,128       2  any  128  64  8  2
        sm_90         64           2  any  128 128  8  2
        sm_100        64           2  any  128  64  8  2
        sm_90         256          2  any   32  64  8  1
        sm_100        256          2  any   64  32  8  1
        gfx942        32,64        2  any   64  64  4  1
        gfx942        128          2  any   64  32  4  1
        gfx942        256          2  any   32  32  4  1
        sm_80,sm_90   32           4  any   32  16  4  1
        sm_80         64           4  plain  32  16  4  1
        sm_80         64           4  ranges  32  32  4  1
        sm_90         64           4  any   32  32  4  1
        sm_80         128          4  any   32  32  8  1
        sm_80         256          4  any   16  16  8  1
        sm_100        32,64        4  any   32  32  4  1
        sm_90,sm_100  128,256      4  any   16  16  8  1
        gfx942        32,64        4  any   32  32  4  1
        gfx942        128,256      4  any   16  16  4  1
        interpreter   32,64,128,256  2  any  32 32  4  1
        interpreter   32,64,128,256  4  any  32 32  4  1
    """)
)


CAPPED: dict[str, dict[Key, Launch]] = {
    "forward": dict(_entries("sm_90  64  2  ranges  128  64  8  3")),
    "backward_kv": dict(_entries("sm_90  64  2  ranges  32  128  8  2\n sm_90  128  2  ranges  32  64  8  2")),
    "backward_q": {},
}
"""By kernel, in place of the entry where that spills under a soft-cap."""
