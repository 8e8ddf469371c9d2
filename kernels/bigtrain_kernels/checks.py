"""What interpreted kernels do to memory: accesses out of bounds, races, elements never written, offsets that overflow.

Each tensor argument's address carries its number in the 16 bits above the 48 of an address. Pointer arithmetic hands them on for
nothing, whatever a kernel does with a pointer, so that every load and store knows which argument it means: an element of k
reached through the pointer of q is out of bounds, however close they lie. Per element of memory two numbers are kept during a
launch, the program that wrote it and the one that read it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter as stock

Grid = tuple[int, int, int]

TAG = np.uint64(48)
ADDRESS = np.uint64((1 << 48) - 1)
SEVERAL = -1
"""In place of a program's number: more than one program read the element."""
POISON = {2: 0x7FE5, 4: 0x7FE5E5E5, 8: 0x7FFDE5E5E5E5E5E5}
"""By bytes of an element: a NaN that no arithmetic makes, in bf16, fp16, float32 and float64; a large number as an integer."""
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
WRAPPING = (np.add, np.subtract, np.multiply)
NORESERVE = 0x4000
"""Linux's MAP_NORESERVE, which Python's mmap names from 3.13 on: the size counts against nothing until it is touched."""


class KernelError(AssertionError):
    """A kernel touched memory that it must not, or left some that it must write."""


class Launched(NamedTuple):
    """What one launch did."""

    kernel: str
    grid: Grid
    read: int
    """Bytes loaded, each time that they are."""
    written: int


@contextlib.contextmanager
def checked(*, shuffle: int | None = None, programs: Callable[[Grid], Iterable[Grid]] | None = None) -> Iterator[list[Launched]]:
    """Inside, every launch of an interpreted kernel is checked, and raises KernelError that names kernel, argument and program, for

    - a lane of a load or store outside the tensor that was passed (its shape and strides, not its storage),
    - an element that two programs write, or that one writes and another reads, in whatever order they run,
    - an element that one store writes twice,
    - a sum, difference or product that overflows int32 (or a smaller signed integer),
    - a load of memory that is fresh from `torch.empty`, `empty_like`, `empty_strided` or `new_empty`: all of it is poisoned,
    - at the end: fresh tensors that were passed to a launch and still hold poison somewhere.

    `shuffle` seeds the order in which programs run: any gives the same bits, or the kernel depends on an order that a GPU does not
    have. `programs` picks those of a grid that run, for tensors too large for all; nothing is poisoned then. Yields the list of
    launches so far. Fresh tensors are kept alive until the end. Refuses atomics, and does not nest.
    """
    if isinstance(stock._interpreter, _Memory):
        raise RuntimeError("checked() does not nest")
    checks = _Checks(stock._interpreter, shuffle, programs)
    builder, executor = stock.InterpreterBuilder, stock.GridExecutor
    with contextlib.ExitStack() as stack:
        for owner, name, wrap in (
            (executor, "__call__", checks.launch), (executor, "_init_args_hst", checks.arguments), (stock, "_implicit_cvt", checks.convert),
            (builder, "set_grid_dim", checks.dimensions), (builder, "set_grid_idx", checks.enter),
            (builder, "binary_op", checks.arithmetic),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, wrap(getattr(owner, name))))
        stack.enter_context(mock.patch.object(stock, "_interpreter", _Memory(checks)))
        if programs is None:
            for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
                stack.enter_context(mock.patch.object(owner, name, checks.poisoned(getattr(owner, name))))
        yield checks.launches
    checks.finish()


def poison(tensor: Tensor) -> Tensor:
    """Fill with the NaN (for integers the large number) that marks memory which nothing has written; bytes are left alone."""
    if tensor.element_size() in POISON:
        tensor.detach().view(INTEGER[tensor.element_size()]).fill_(POISON[tensor.element_size()])
    return tensor


def huge(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory before they are touched, as many as an address space holds: to run a few `programs` beyond 2^31."""
    shape = tuple(shape)
    return torch.frombuffer(_lazy(math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


def _lazy(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)


class _Storage:
    """Who wrote and who read what of a storage in this launch, one number each per element of its narrowest argument; 0 is nobody."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.start, self.size, self.granule = storage.data_ptr(), storage.nbytes(), tensor.element_size()

    def allocate(self) -> None:
        self.writer, self.reader = (np.frombuffer(_lazy(4 * (self.size // self.granule + 1)), np.int32) for _ in range(2))


class _Argument:
    def __init__(self, name: str, tensor: Tensor, storage: _Storage) -> None:
        self.name, self.tensor, self.storage = name, tensor, storage
        self.start, self.itemsize = tensor.data_ptr(), tensor.element_size()
        sized = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride()) if size != 1 and stride)
        self.dimensions: list[tuple[int, int]] = []  # (stride, size), adjacent ones joined, the widest stride last
        for stride, size in sized:
            if self.dimensions and stride == math.prod(self.dimensions[-1]):
                self.dimensions[-1] = self.dimensions[-1][0], self.dimensions[-1][1] * size
            else:
                self.dimensions.append((stride, size))

    def outside(self, offset: np.ndarray) -> np.ndarray:
        """Which of the offsets, in elements from the tensor's first, are none of its elements."""
        bad = offset < 0 if self.tensor.numel() else np.ones(offset.shape, bool)
        for stride, size in reversed(self.dimensions):
            index, offset = np.divmod(offset, stride) if stride > 1 else (offset, 0)
            bad |= index >= size
        return bad | (offset != 0)


class _Checks:
    """The state of one `checked`; its methods that take a function return what stands in for it."""

    def __init__(self, memory: Any, shuffle: int | None, programs: Callable[[Grid], Iterable[Grid]] | None) -> None:
        self.memory, self.shuffle, self.programs = memory, shuffle, programs
        self.launches: list[Launched] = []
        self.fresh: dict[int, Tensor] = {}  # by the address of the storage
        self.passed: dict[int, str] = {}  # fresh ones, to a launch: its name and that of the argument

    def launch(self, call: Callable) -> Callable:
        def checked_call(executor, *arguments, **options):
            self.kernel, self.read, self.written = executor.fn.__name__, 0, 0
            self.grid, grid = (0, 0, 0), executor.grid

            def numbered(arguments) -> tuple[int]:
                """Programs are numbered in the order in which they run; `enter` knows where each one stands in the grid."""
                asked = grid(arguments) if callable(grid) else grid
                self.grid = (*(int(n) for n in asked), 1, 1)[:3]
                self.order = list(self.programs(self.grid) if self.programs else itertools.product(*map(range, self.grid)))
                if self.shuffle is not None:
                    random.Random(self.shuffle).shuffle(self.order)
                return (len(self.order),)

            executor.grid = numbered
            try:
                call(executor, *arguments, **options)
            except stock.InterpreterError as error:
                self.fresh.clear()  # what a failed launch leaves unwritten says nothing
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, KernelError):
                    cause = cause.__cause__
                if cause is None:
                    raise
                raise cause from None
            self.launches.append(Launched(self.kernel, self.grid, self.read, self.written))

        return checked_call

    def arguments(self, to_host: Callable) -> Callable:
        def checked_arguments(executor, arguments, options):
            arguments, options = to_host(executor, arguments, options)
            storages: dict[int, _Storage] = {}
            self.known: list[_Argument] = []
            self.tags: dict[int, int] = {}
            for name, tensor in tensors({**dict(zip(executor.arg_names, arguments)), **options}.items()):
                storage = storages.setdefault(tensor.untyped_storage().data_ptr(), _Storage(tensor))
                storage.granule = min(storage.granule, tensor.element_size())
                self.known.append(_Argument(name, tensor, storage))
                self.tags[id(tensor)] = len(self.known)
                if storage.start in self.fresh:
                    self.passed.setdefault(storage.start, f"{self.kernel}: {name}")
            for storage in storages.values():
                storage.allocate()
            return arguments, options

        return checked_arguments

    def convert(self, convert: Callable) -> Callable:
        def tagged(argument):
            value = convert(argument)
            if id(argument) in self.tags:
                value.handle.data = value.handle.data | (np.uint64(self.tags[id(argument)]) << TAG)
            return value

        return tagged

    def dimensions(self, set_grid_dim: Callable) -> Callable:
        return lambda builder, *numbered: set_grid_dim(builder, *self.grid)

    def enter(self, set_grid_idx: Callable) -> Callable:
        def set_program(builder, number, *_):
            self.program, self.number = self.order[number], number + 1
            set_grid_idx(builder, *self.program)

        return set_program

    def arithmetic(self, binary_op: Callable) -> Callable:
        def checked_op(builder, lhs, rhs, op):
            result = binary_op(builder, lhs, rhs, op)
            if op in WRAPPING and result.data.dtype.kind == "i" and result.data.itemsize < 8:
                bad = op(lhs.data.astype(np.int64), rhs.data.astype(np.int64)) != result.data
                if bad.any():
                    self.fail(f"overflows {result.data.dtype} in {op.__name__}: {bad.sum()} of {bad.size} lanes")
            return result

        return checked_op

    def access(self, pointers: np.ndarray, mask: Any, size: int, store: bool) -> np.ndarray:
        """The plain addresses of a load or store of elements of `size` bytes, after all checks that need no values."""
        tagged = np.broadcast_to(pointers, np.broadcast_shapes(pointers.shape, np.shape(mask)))[np.broadcast_to(mask, pointers.shape)]
        if store:
            self.written += tagged.size * size
        else:
            self.read += tagged.size * size
        tags = (tagged >> TAG).astype(np.int64)
        for tag in np.unique(tags):
            verb = "stores to" if store else "loads from"
            if not 1 <= tag <= len(self.known):
                self.fail(f"{verb} {np.sum(tags == tag)} of {len(tags)} addresses that belong to no argument")
            argument = self.known[tag - 1]
            start = (tagged[tags == tag] & ADDRESS).astype(np.int64)
            offset = (start - argument.start) // argument.itemsize
            bad = argument.outside(offset)
            if bad.any():
                shape, stride = tuple(argument.tensor.shape), argument.tensor.stride()
                self.fail(
                    f"{verb} {argument.name} out of bounds: {bad.sum()} of {len(tags)} lanes, first at offset {offset[bad][0]} "
                    f"of shape {shape}, strides {stride}"
                )
            element = (start - argument.storage.start) // argument.storage.granule
            (self.store if store else self.load)(argument, element)
        return pointers & ADDRESS

    def store(self, argument: _Argument, element: np.ndarray) -> None:
        storage, lanes = argument.storage, -np.arange(2, len(element) + 2, dtype=np.int32)
        self.others(storage.writer[element], f"stores to {argument.name} what {{}} stores too")
        self.others(storage.reader[element], f"stores to {argument.name} what {{}} loads")
        storage.writer[element] = lanes
        twice = storage.writer[element] != lanes
        if twice.any():
            self.fail(f"stores to {argument.name} twice at once: {twice.sum()} of {len(element)} lanes")
        storage.writer[element] = self.number

    def load(self, argument: _Argument, element: np.ndarray) -> None:
        storage = argument.storage
        self.others(storage.writer[element], f"loads from {argument.name} what {{}} stores")
        reader = storage.reader[element]
        storage.reader[element] = np.where((reader == 0) | (reader == self.number), self.number, SEVERAL)

    def others(self, programs: np.ndarray, fault: str) -> None:
        other = (programs != 0) & (programs != self.number)
        if other.any():
            first = programs[other][0]
            who = "several programs" if first == SEVERAL else f"program {self.order[first - 1]}"
            self.fail(f"{fault.format(who)}: {other.sum()} of {len(programs)} lanes")

    def fail(self, fault: str) -> None:
        raise KernelError(f"{self.kernel}: program {self.program} of {self.grid} {fault}")

    def poisoned(self, allocate: Callable) -> Callable:
        def allocate_poisoned(*arguments, **options):
            tensor = allocate(*arguments, **options)
            if type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.numel() and tensor.element_size() in POISON:
                self.fresh[tensor.untyped_storage().data_ptr()] = poison(tensor)
            return tensor

        return allocate_poisoned

    def unwritten(self, pointers: np.ndarray, mask: Any, values: np.ndarray) -> None:
        """Look for poison among loaded values."""
        pattern = POISON.get(values.itemsize)
        if not self.fresh or pattern is None:
            return
        bad = (values.view(f"i{values.itemsize}") == pattern) & mask
        if bad.any():
            argument = self.known[int(np.broadcast_to(pointers, bad.shape)[bad][0] >> TAG) - 1]
            self.fail(f"loads from {argument.name} what nothing has written: {bad.sum()} of {bad.size} lanes")

    def finish(self) -> None:
        faults = []
        for address, tensor in self.fresh.items():
            left = int((tensor.detach().view(INTEGER[tensor.element_size()]) == POISON[tensor.element_size()]).sum())
            if left and address in self.passed:
                faults.append(f"{self.passed[address]} of shape {tuple(tensor.shape)} has {left} elements that nothing has written")
        if faults:
            raise KernelError("\n".join(faults))


class _Memory:
    """In the place of the module that the interpreter touches memory with."""

    def __init__(self, checks: _Checks) -> None:
        self.checks = checks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.checks.memory, name)

    def load(self, pointers, mask, other, dtype):
        values = self.checks.memory.load(self.checks.access(pointers, mask, np.dtype(dtype).itemsize, store=False), mask, other, dtype)
        self.checks.unwritten(pointers, mask, values)
        return values

    def store(self, pointers, values, mask):
        self.checks.memory.store(self.checks.access(pointers, mask, values.itemsize, store=True), values, mask)

    def atomic_rmw(self, *_):
        raise KernelError(f"{self.checks.kernel}: an atomic operation, whose order no launch repeats")

    atomic_cas = atomic_rmw


def tensors(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors among arguments, also those in tuples and tensor descriptors."""
    for name, value in named:
        if isinstance(value, tuple):
            yield from tensors((f"{name}[{i}]", x) for i, x in enumerate(value))
        elif isinstance(value, stock.TensorDescriptor):
            yield name, value.base
        elif isinstance(value, Tensor):
            yield name, value
