"""The repaired interpreter against torch's own bf16: every repair, and that `verify` sees when one is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import proof
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.errors import InterpreterError

from bigtrain_kernels import interpreter


@triton.jit
def binary(X, Y, OUT, OP: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(X + at), tl.load(Y + at)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "div":
        out = x / y
    elif OP == "fma":
        out = tl.fma(x, y, y)
    elif OP == "less":
        out = x < y
    elif OP == "equal":
        out = x == y
    elif OP == "unequal":
        out = x != y
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "where":
        out = tl.where(x > y, x, y)
    elif OP == "both":
        out = (x > 0) & (y > 0)
    elif OP == "negative":
        out = -x
    elif OP == "abs":
        out = tl.abs(y)
    elif OP == "weak":
        out = x * 1.1
    elif OP == "integer":
        out = x.to(tl.int32)
    tl.store(OUT + at, out)


def quiet(bits: torch.Tensor) -> torch.Tensor:
    """int32 to the bf16 of those 16 bits; signalling NaN, which numpy's fmax hands on and a GPU does not, become quiet ones."""
    x = bits.to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), float("nan"), x)


@pytest.mark.parametrize(
    ("op", "right"),
    [
        ("add", lambda x, y: x + y),
        ("sub", lambda x, y: x - y),
        ("mul", lambda x, y: x * y),
        ("div", lambda x, y: x.float() / y.float()),
        ("fma", lambda x, y: (x.float() * y.float() + y.float()).bfloat16()),
        ("less", lambda x, y: x < y),
        ("equal", lambda x, y: x == y),
        ("unequal", lambda x, y: x != y),
        ("maximum", lambda x, y: torch.fmax(x.float(), y.float())),
        ("where", lambda x, y: torch.where(x > y, x, y)),
        ("both", lambda x, y: (x > 0) & (y > 0)),
        ("negative", lambda x, y: -x),
        ("abs", lambda x, y: y.abs()),
        ("weak", lambda x, y: x * torch.tensor(1.1).bfloat16()),
    ],
)
def test_bf16_operations_are_those_of_torch(op, right):
    """On every bf16 there is, subnormal, infinite and NaN: against random ones, and the second half against itself."""
    x = quiet(torch.arange(-(2**15), 2**15))
    y = torch.cat([quiet(torch.randint(-(2**15), 2**15, (2**15,))), x[2**15 :]])
    expected = right(x, y)
    found = torch.empty_like(expected)
    binary[(1,)](x, y, found, OP=op, N=2**16)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def cast(X, OUT, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(OUT + at, tl.load(X + at).to(OUT.dtype.element_ty))


def test_casts_round_to_nearest_even():
    random = torch.randint(-(2**31), 2**31, (2**16 - 8,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    # Ties to an even and to an odd neighbour, the largest values and the smallest, infinity by rounding.
    patterns = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F7F7FFF, 0x00000001, 0x00008000, 0x7F800001]
    x = torch.cat([random, torch.tensor(patterns, dtype=torch.int32).view(torch.float32)])
    found = torch.empty(len(x), dtype=torch.bfloat16)
    cast[(1,)](x, found, N=len(x))
    torch.testing.assert_close(found, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    wide = torch.empty(len(x))
    cast[(1,)](found, wide, N=len(x))
    torch.testing.assert_close(wide, found.float(), rtol=0, atol=0, equal_nan=True)
    half = torch.randn(2**12).half()
    found = torch.empty(2**12, dtype=torch.bfloat16)
    cast[(1,)](half, found, N=2**12)
    torch.testing.assert_close(found, half.bfloat16(), rtol=0, atol=0)


@triton.jit
def matmul(A, B, OUT, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(A + m[:, None] * K + k[None, :]), tl.load(B + k[:, None] * N + n[None, :])
    tl.store(OUT + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision=PRECISION))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_sums_in_float32(dtype):
    a, b = torch.randn(32, 256).to(dtype), torch.randn(256, 16).to(dtype)
    out, rough = torch.empty(32, 16), torch.empty(32, 16)
    matmul[(1,)](a, b, out, M=32, N=16, K=256, PRECISION="ieee")
    exact = a.double() @ b.double()
    proof.check(out, a.float() @ b.float(), exact, limit=proof.FORWARD)
    matmul[(1,)](a, b, rough, M=32, N=16, K=256, PRECISION="tf32")
    error = float((rough - exact).norm() / exact.norm())
    assert 2e-4 < error < 1e-3 if dtype == torch.float32 else torch.equal(rough, out)


def test_dot_asks_for_sixteen_columns_as_a_gpu_does():
    a, out = torch.randn(16, 8), torch.empty(16, 16)
    with pytest.raises(InterpreterError, match="K >= 16"):
        matmul[(1,)](a, a.T.contiguous(), out, M=16, N=16, K=8, PRECISION="ieee")


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def larger(a, b):
    return tl.maximum(a, b).to(tl.bfloat16)


@triton.jit
def reduce(X, OUT, OP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(X + m[:, None] * N + n[None, :])
    if OP == "sum":
        out = tl.sum(x, 1)
    elif OP == "max":
        out = tl.max(x, 1)
    elif OP == "min":
        out = tl.min(x, 1)
    elif OP == "argmax":
        out = tl.argmax(x, 1)
    elif OP == "argmin":
        out = tl.argmin(x, 1)
    elif OP == "steps":
        out = tl.reduce(x, 1, add)
    elif OP == "larger":
        out = tl.reduce(x, 1, larger)
    elif OP == "all":
        out = tl.sum(x) + tl.zeros([M], x.dtype)
    if OP == "scan":
        tl.store(OUT + m[:, None] * N + n[None, :], tl.cumsum(x, 1))
    else:
        tl.store(OUT + m, out)


def stepwise(x: torch.Tensor) -> torch.Tensor:
    total = x[:, 0]
    for column in x[:, 1:].T:
        total = total + column
    return total


@pytest.mark.parametrize(
    ("op", "right"),
    [
        ("sum", lambda x: x.double().sum(1).bfloat16()),
        ("max", lambda x: x.amax(1).float()),
        ("min", lambda x: x.amin(1).float()),
        ("argmax", lambda x: x.argmax(1).int()),
        ("argmin", lambda x: x.argmin(1).int()),
        ("steps", stepwise),
        ("larger", lambda x: x.amax(1)),
        ("all", lambda x: x.double().sum().bfloat16().expand(4)),
        ("scan", lambda x: torch.from_numpy(x.float().numpy().cumsum(1)).bfloat16()),
    ],
)
def test_bf16_reductions(op, right):
    x = torch.randn(4, 64).bfloat16()
    expected = right(x).contiguous()
    found = torch.empty_like(expected)
    reduce[(1,)](x, found, OP=op, M=4, N=64)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@triton.jit
def scaled(OUT, scale):
    tl.store(OUT, scale * scale)


def test_float_arguments_arrive_as_float32():
    out = torch.empty(1)
    scaled[(1,)](out, 0.1)
    assert out.item() == (torch.tensor(0.1) * torch.tensor(0.1)).item() != float(np.float32(0.1 * 0.1))


def test_a_launch_leaves_the_language_as_it_was():
    x = torch.randn(4, 64)
    before = {module: dict(vars(module)) for module in (tl, tl.core)}
    reduce[(1,)](x, torch.empty(4), OP="sum", M=4, N=64)
    with pytest.raises(InterpreterError):
        reduce[(1,)](x, torch.empty(4), OP="none", M=4, N=64)
    assert all(dict(vars(module)) == names for module, names in before.items())


REPAIRS = [
    (stock.InterpreterBuilder, "cast_impl", "float32 to bf16"),
    (stock.InterpreterBuilder, "binary_op", "x + y"),
    (stock.InterpreterBuilder, "create_fma", "tl.fma"),
    (stock.InterpreterBuilder, "create_dot", "tl.dot bf16"),
    (stock.InterpreterBuilder, "create_maxnumf", "tl.maximum of NaN"),
    (stock.ReduceOps, "sum", "tl.sum"),
    (stock, "_implicit_cvt", "float argument"),
]


def original(owner, name):
    """What `install` wrapped; for what it replaced, the stock method."""
    cells = getattr(owner, name).__closure__ or ()
    found = [cell.cell_contents for cell in cells if callable(cell.cell_contents) and cell.cell_contents.__module__ == stock.__name__]
    return found[0] if found else lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.maximum)


@pytest.mark.parametrize(("owner", "name", "fault"), REPAIRS, ids=[x[1] for x in REPAIRS])
def test_verify_sees_that_a_repair_is_missing(monkeypatch, owner, name, fault):
    monkeypatch.setattr(owner, name, original(owner, name))
    with pytest.raises(RuntimeError, match=re.escape(fault)):
        interpreter.verify()


def test_verify_sees_a_dot_too_short_for_a_gpu(monkeypatch):
    monkeypatch.setitem(stock.interpreter_builder.codegen_fns, "min_dot_size", lambda lhs, rhs: (1, 1, 1))
    with pytest.raises(RuntimeError, match="8 columns"):
        interpreter.verify()


def test_install_again_changes_nothing():
    before = stock.InterpreterBuilder.binary_op
    interpreter.install()
    assert stock.InterpreterBuilder.binary_op is before


# The folder


def pytest_in(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)


def test_the_folder_stands_aside_unless_asked_for():
    tests = Path(__file__).parents[1]
    assert "no tests collected" in pytest_in("tests", f"--ignore-glob={tests}/[!i]*").stdout
    assert "test_casts_round_to_nearest_even" in pytest_in("tests/interpreted/test_interpreter.py").stdout


def test_triton_imported_too_early_ends_the_run():
    found = pytest_in("-p", "triton", "tests/interpreted/test_interpreter.py")
    assert found.returncode and "by itself" in found.stdout + found.stderr
