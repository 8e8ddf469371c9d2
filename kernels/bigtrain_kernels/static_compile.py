"""What would a GPU be given? Kernels compiled through their own host functions, for an architecture that is not here.

The host functions run on meta tensors; in place of each launch stands the compile that it would begin with, so that types,
alignment, block sizes and options are those of a real run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .launch import ARCHITECTURES, interpreted

INTERPRETED_HERE = "kernels cannot be compiled under TRITON_INTERPRET=1: unset it and start a new process"


class Launched(NamedTuple):
    """One launch of a kernel, compiled."""

    kernel: str
    compiled: Any
    """Triton's CompiledKernel: its `asm` and `metadata`."""
    grid: tuple[int, ...]
    constants: dict[str, object]
    """The arguments that are compiled in, block sizes among them."""
    warps: int
    stages: int


def target(architecture: str) -> GPUTarget:
    """Triton's name for one of ARCHITECTURES."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r}: expected one of {', '.join(ARCHITECTURES)}")
    backend, _, number = architecture.partition("_")
    return GPUTarget("cuda", int(number), 32) if backend == "sm" else GPUTarget("hip", architecture, 64)


class AbsentGpu:
    """Stands in for Triton's driver: it answers what a compile asks, as the GPU of this architecture would."""

    def __init__(self, architecture: str):
        self._target = target(architecture)
        self._device = ARCHITECTURES.index(architecture)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        """A number of its own for each architecture: a kernel keeps what it has compiled by device, whatever its target."""
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compile_only(architecture: str) -> Iterator[list[Launched]]:
    """Within it every launch of a Triton kernel compiles for `architecture` and is added to the list; nothing runs.

    Raises RuntimeError under TRITON_INTERPRET=1: kernels defined for the interpreter cannot be compiled in the same process.
    """
    if interpreted():
        raise RuntimeError(INTERPRETED_HERE)
    launched: list[Launched] = []
    launch = JITFunction.run

    def compile_instead(kernel: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> object:
        compiled = launch(kernel, *args, grid=grid, warmup=True, **options)
        arguments = dict(zip(kernel.arg_names, args)) | options
        constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr and p.name in arguments}
        size = grid(arguments) if callable(grid) else grid
        meta = compiled.metadata
        launched.append(Launched(meta.name, compiled, tuple(size), constants, meta.num_warps, meta.num_stages))
        return compiled

    before = driver._active  # the property would look for a GPU
    driver.set_active(AbsentGpu(architecture))
    JITFunction.run = compile_instead
    try:
        yield launched
    finally:
        JITFunction.run = launch
        driver.set_active(before)
