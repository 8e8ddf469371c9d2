"""How a kernel is launched: which processor it meets, and the block sizes chosen for it ahead of time.

Each kernel family keeps a small table, `(architecture, ...) -> Launch`, beside its kernels. Nothing is tuned while a job
runs: every rank launches the same code, a run starts at once, and every entry has been compiled and checked before
(`python -m bigtrain_kernels.static`). `benchmarks/tune.py` measures other entries on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
"""What the tables know: A100, H100 and H200, B200, MI300. Others get the entries of the nearest one."""
INTERPRETED = "interpreter"


class Launch(NamedTuple):
    """Block sizes by their names in the kernel, and the options of the compiler."""

    blocks: dict[str, int]
    warps: int
    stages: int = 1
    """Depth of the software pipeline: iterations of a loop whose loads are in flight together."""

    def arguments(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.warps, "num_stages": self.stages}


class Case(NamedTuple):
    """One launch for the static gate: what a host function launches for one entry of a table."""

    name: str
    run: Callable[[], object]
    """Calls the host function on meta tensors."""
    flops: int
    """Floating-point operations of the launch, by formula."""
    bytes: int
    """Bytes that it must move: each input read once, each output written once."""


def operator(name: str, mutates_args: Sequence[str] = ()) -> Callable[[Callable], Any]:
    """`torch.library.custom_op`, whose function runs with the GPU of its first argument, a tensor, as the current one.

    Triton launches on the current GPU, whatever its arguments are on.
    """

    def register(function: Callable) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        return torch.library.custom_op(name, on_its_gpu(function), mutates_args=mutates_args, schema=schema)

    return register


def on_its_gpu(function: Callable) -> Callable:
    """`function`, during which the GPU of its first argument is the current one; as it is for a tensor on no GPU."""

    @functools.wraps(function)
    def on_it(first: torch.Tensor, *rest: object) -> object:
        with torch.cuda.device_of(first):
            return function(first, *rest)

    return on_it


def interpreted() -> bool:
    """True where kernels run in Triton's interpreter, on the host: TRITON_INTERPRET=1 was set before they were imported."""
    return triton.knobs.runtime.interpret


def architecture() -> str:
    """One of ARCHITECTURES for the GPU that the next launch meets, or INTERPRETED."""
    if interpreted():
        return INTERPRETED
    target = driver.active.get_current_target()
    return nearest(target.backend, target.arch)


@functools.cache
def nearest(backend: str, arch: int | str) -> str:
    """The table's name for a compile target: ("cuda", 89) -> "sm_80", ("hip", "gfx950") -> "gfx942".

    120 and on (RTX 50) are nearest to sm_80: tensor cores of a warp, and 99 KiB of shared memory a block, as 86 and 89 have.
    """
    if backend == "hip":
        return "gfx942"
    return "sm_80" if arch < 90 or arch >= 120 else "sm_90" if arch < 100 else "sm_100"
