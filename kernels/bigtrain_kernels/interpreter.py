"""Triton's interpreter, made to compute what a GPU computes.

With TRITON_INTERPRET=1 (set before anything imports Triton) kernels run on the host, program by program in numpy. As Triton ships
it, 3.6 to 3.9, its bf16 is wrong: numpy has no such type, so arithmetic and `tl.dot` work on the raw bits and casts truncate.
`install` repairs that and what else would make a kernel look better, or other, than it is on a GPU; `verify` shows that the repair
holds, so that a new version of Triton fails loudly. `checks.py` looks at what the kernels do to memory.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import FunctionType

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as stock

from .checks import KernelError, checked, huge, poison, tensors

__all__ = ["KernelError", "checked", "huge", "install", "narrow", "poison", "verify", "widen"]

TF32 = np.uint32(0xFFFFE000)
"""The bits of a float32 that a tensor core reads as tf32; Triton does not round before."""


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16, as the uint16 that the interpreter keeps it in, to float32."""
    return np.asarray(bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 to bf16 as uint16, to nearest and ties to even; every NaN becomes the quiet one."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


@functools.cache
def install() -> None:
    """Repair the interpreter of this process; a second call does nothing.

    - bf16: casts round to nearest even; arithmetic and comparisons are float32's, rounded once; `tl.dot` has float32 products and sums;
      `tl.sum`, `tl.max` and other reductions and scans run in float32; one by a function of the kernel's own rounds at every step.
    - `tl.dot` with tf32 inputs drops the 13 bits that a tensor core drops (tf32x3 stays float32), and asks for the 16 columns that
      NVIDIA GPUs ask for.
    - Float arguments arrive as float32; `tl.maximum` and `tl.minimum` pass over a NaN unless told otherwise.
    - The bound of a loop may be a loaded number (Triton 3.6 hands numpy an array of one element, which numpy 2.4 refuses).
    - Launches take half the time: the language is patched once a launch rather than at each call of a function, the check for
      integer overflow, which stock computes and drops, is left to `checked`, and arguments on the CPU are not copied onto themselves.
    """
    builder = stock.InterpreterBuilder
    builder.cast_impl = _cast(builder.cast_impl)
    builder.unary_op, builder.binary_op = _in_float32(builder.unary_op), _in_float32(builder.binary_op)
    builder.create_fma = _in_float32(builder.create_fma)
    builder.create_dot = _dot(builder.create_dot)
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    builder.get_bf16 = lambda self, value: stock.TensorHandle(narrow(np.array([value], np.float32)), tl.bfloat16)
    for owner, names in ((stock.ReduceOps, ("sum", "min_max")), (stock.ScanOps, ("cumsum", "cumprod"))):
        for name in names:
            setattr(owner, name, _reduced_in_float32(getattr(owner, name)))
    stock.interpreter_builder.codegen_fns["min_dot_size"] = lambda lhs, rhs: (1, 1, 32 if lhs.scalar.primitive_bitwidth == 8 else 16)
    stock.interpreter_builder.options = dataclasses.replace(stock.interpreter_builder.options, sanitize_overflow=False)
    stock._implicit_cvt = _float_arguments(stock._implicit_cvt)
    stock._patch_lang_tensor = _loaded_bounds(stock._patch_lang_tensor)
    stock._patch_lang = _once_a_launch(stock._patch_lang)
    stock.GridExecutor.__call__ = np.errstate(all="ignore")(stock.GridExecutor.__call__)
    stock.GridExecutor._restore_args_dev = _restore_from_device(stock.GridExecutor._restore_args_dev)


def _is_bf16(handle: stock.TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle: stock.TensorHandle) -> stock.TensorHandle:
    return stock.TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _in_float32(method: Callable) -> Callable:
    """A method of the builder on handles and perhaps a numpy function, whose result has the type of its operands."""

    def call(self, first, *others):
        if not _is_bf16(first):
            return method(self, first, *others)
        out = method(self, _wide(first), *(_wide(x) if isinstance(x, stock.TensorHandle) else x for x in others)).data
        return stock.TensorHandle(out, tl.int1) if out.dtype == np.bool_ else stock.TensorHandle(narrow(out), tl.bfloat16)

    return call


def _cast(method: Callable) -> Callable:
    def call(self, source, target):
        if target.scalar != tl.bfloat16:
            return method(self, _wide(source), target)
        return stock.TensorHandle(narrow(method(self, _wide(source), tl.float32).data), tl.bfloat16)

    return call


def _dot(method: Callable) -> Callable:
    def call(self, a, b, total, precision, *others):
        if a.dtype.scalar == tl.float32 and precision == stock._ir.INPUT_PRECISION.TF32:
            a, b = (stock.TensorHandle((x.data.view(np.uint32) & TF32).view(np.float32), tl.float32) for x in (a, b))
        return method(self, _wide(a), _wide(b), total, precision, *others)

    return call


def _reduced_in_float32(method: Callable) -> Callable:
    """A reduction or scan. Before 3.8 triton.language itself widens for all but `tl.sum`."""

    def retyped(tensor, data, dtype):
        handle = stock.TensorHandle(data, dtype)
        return tl.core.tensor(handle, tl.block_type(dtype, tensor.type.shape) if tensor.type.is_block() else dtype)

    def narrowed(result):
        if isinstance(result, (list, tuple)):
            return type(result)(map(narrowed, result))
        return retyped(result, narrow(result.handle.data), tl.bfloat16) if result.dtype == tl.float32 else result  # an index stays one

    def call(self, tensor, *arguments, **options):
        if not _is_bf16(tensor.handle):
            return method(self, tensor, *arguments, **options)
        return narrowed(method(self, retyped(tensor, widen(tensor.handle.data), tl.float32), *arguments, **options))

    return call


def _float_arguments(convert: Callable) -> Callable:
    def call(argument):
        if isinstance(argument, float):
            return tl.core.tensor(stock.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return convert(argument)

    return call


def _loaded_bounds(patch: Callable) -> Callable:
    def call(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return call


def _once_a_launch(patch: Callable) -> Callable:
    """Stock patches triton.language again, 1.4 ms, at every call of one kernel function by another, and leaves that patch behind."""
    scopes, patched = [], set()

    @functools.cache
    def languages(function: FunctionType) -> frozenset:
        return frozenset(x for x in function.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core))

    def restore() -> None:
        while scopes:
            type(scopes[-1]).restore(scopes.pop())
        patched.clear()

    def call(function):
        if languages(function) <= patched:
            return scopes[0]  # stock drops it, in a call inside a launch
        scopes.append(patch(function))
        patched.update(languages(function))
        scopes[0].restore = restore  # the launch's own scope, which stock restores at its end
        return scopes[-1]

    return call


def _restore_from_device(method: Callable) -> Callable:
    def call(self, arguments, on_host, options, options_on_host):
        passed = tensors([*enumerate(arguments), *options.items()])
        if any(x.device.type != "cpu" for _, x in passed):
            method(self, arguments, on_host, options, options_on_host)

    return call


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _everything(X, Y, OUT, FLAGS, WHOLE, SQUARE, scale, N: tl.constexpr):
    """Row i of OUT (bf16), FLAGS (int32), WHOLE (float32) is one operation; `verify` has the same list in torch."""
    at = tl.arange(0, N)
    x, y = tl.load(X + at), tl.load(Y + at)
    tl.store(OUT + at, x + y)
    tl.store(OUT + N + at, x - y)
    tl.store(OUT + 2 * N + at, x * y)
    tl.store(OUT + 3 * N + at, tl.fma(x, y, x))
    tl.store(OUT + 4 * N + at, tl.where(x < y, x, y))
    tl.store(OUT + 5 * N + at, (x.to(tl.float32) * 1.01).to(tl.bfloat16))
    tl.store(OUT + 6 * N + at, (at * 257).to(tl.bfloat16))
    tl.store(OUT + 7 * N + at, tl.full([N], 3.14159, tl.bfloat16))
    tl.store(OUT + 8 * N + at, -tl.abs(x))
    tl.store(OUT + 9 * N + at, tl.zeros([N], tl.bfloat16) + tl.sum(x))
    tl.store(OUT + 10 * N + at, tl.zeros([N], tl.bfloat16) + tl.reduce(x, 0, _add))
    tl.store(OUT + 11 * N + at, tl.cumsum(x, 0))
    tl.store(FLAGS + at, (x < y).to(tl.int32))
    tl.store(FLAGS + N + at, (x >= y).to(tl.int32))
    tl.store(FLAGS + 2 * N + at, (x == x).to(tl.int32))
    tl.store(FLAGS + 3 * N + at, tl.zeros([N], tl.int32) + tl.argmax(x, 0))
    tl.store(WHOLE + at, x / y)
    tl.store(WHOLE + N + at, tl.maximum(x, y))
    tl.store(WHOLE + 2 * N + at, tl.clamp(x, -0.5, 0.5))
    tl.store(WHOLE + 3 * N + at, tl.zeros([N], tl.float32) + tl.max(x))
    tl.store(WHOLE + 4 * N + at, tl.zeros([N], tl.float32) + tl.min(x))
    tl.store(WHOLE + 5 * N + at, tl.maximum(tl.where(at == 0, float("nan"), x.to(tl.float32)), 0.0))
    tl.store(WHOLE + 6 * N + at, tl.zeros([N], tl.float32) + scale * scale)
    count = tl.zeros([N], tl.float32)
    for _ in range(tl.load(FLAGS + 3 * N), N, 1):
        count += 1
    tl.store(WHOLE + 7 * N + at, count)
    rows = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    a, b = tl.load(X + rows), tl.load(Y + rows)
    tl.store(SQUARE + rows, tl.dot(a, b))
    tl.store(SQUARE + N + rows, tl.dot(a.to(tl.float16), b.to(tl.float16)))
    tl.store(SQUARE + 2 * N + rows, tl.dot(a.to(tl.float32) * 1.01, b.to(tl.float32), input_precision="ieee"))
    tl.store(SQUARE + 3 * N + rows, tl.dot(a.to(tl.float32) * 1.01, b.to(tl.float32), input_precision="tf32"))


@triton.jit
def _short_dot(X, OUT):
    at = tl.arange(0, 16)[:, None] * 8 + tl.arange(0, 8)[None, :]
    x = tl.load(X + at)
    tl.store(OUT + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], tl.dot(x, tl.trans(x)))


def verify() -> None:
    """Run each repaired operation in a kernel and compare with torch on the CPU. Raises RuntimeError with those that differ."""
    N, generator = 256, torch.Generator().manual_seed(0)
    x, y = (torch.randn(N, generator=generator).bfloat16() for _ in range(2))
    scaled = x.float() * 1.01
    step = x[0]
    for value in x[1:]:
        step = step + value
    expected = {
        "bf16": {
            "x + y": x + y, "x - y": x - y, "x * y": x * y, "tl.fma": (x.float() * y.float() + x.float()).bfloat16(),
            "tl.where": torch.minimum(x, y), "float32 to bf16": scaled.bfloat16(), "int32 to bf16": (torch.arange(N) * 257).bfloat16(),
            "tl.full": torch.full((N,), 3.14159).bfloat16(), "-tl.abs": -x.abs(), "tl.sum": x.double().sum().bfloat16().expand(N),
            "tl.reduce": step.expand(N), "tl.cumsum": torch.from_numpy(x.float().numpy().cumsum()).bfloat16(),
        },
        "comparison": {"x < y": x < y, "x >= y": x >= y, "x == x": x == x, "tl.argmax": x.argmax().expand(N)},
        "float32": {
            "x / y": x.float() / y.float(), "tl.maximum": torch.maximum(x, y), "tl.clamp": x.clamp(-0.5, 0.5), "tl.max": x.max().expand(N),
            "tl.min": x.min().expand(N), "tl.maximum of NaN": torch.where(torch.arange(N) == 0, 0.0, x.relu()),
            "float argument": torch.tensor(0.1).square().expand(N), "loop from a loaded number": N - x.argmax().expand(N),
        },
        "tl.dot": {
            kind: (a.double().view(16, 16) @ y.double().view(16, 16)).flatten()
            for kind, a in (("bf16", x), ("fp16", x), ("ieee", scaled), ("tf32", (scaled.view(torch.int32) & -8192).view(torch.float32)))
        },
    }  # fmt: skip
    dtypes = {"bf16": torch.bfloat16, "comparison": torch.int32}
    found = {family: torch.full((len(rows), N), 99, dtype=dtypes.get(family, torch.float32)) for family, rows in expected.items()}
    faults = []
    try:
        _everything[(1,)](x, y, *found.values(), 0.1, N=N)
    except Exception as error:
        raise RuntimeError(f"the interpreter of Triton {triton.__version__} does not run the repaired operations: {error}") from error
    for family, rows in expected.items():
        for (name, right), ours in zip(rows.items(), found[family]):
            close = {"rtol": 1e-5, "atol": 1e-5} if family == "tl.dot" else {"rtol": 0, "atol": 0}
            if not torch.allclose(ours.double(), right.double(), **close):
                faults.append(f"{family} {name}")
    try:
        _short_dot[(1,)](x, torch.empty(N))
        faults.append("tl.dot of 8 columns")
    except Exception as error:
        if "K >= 16" not in str(error):
            raise
    if faults:
        raise RuntimeError(f"the repair of Triton {triton.__version__}'s interpreter does not hold for: {', '.join(faults)}")
